"""Measures `adamerge merge` against the floor: reading all inputs once and writing the output once.

    python scripts/bench_merge.py --model 8x100m --methods task_arithmetic --threads 1 --json
    python scripts/bench_merge.py --model 3x1b --methods ties iso_c --repeats 1 --json

The checkpoints are random, in bf16, in Hugging Face's Llama layout (the large one in shards), and are made
once in --folder. Merge and floor run by turns, each in a process of its own, imports not counted; the files
are in the page cache for both. `merge_s` is the median of runs in which the digests of the inputs were
remembered from an earlier run, `first_s` the run before, which hashes them too. Peak memory is that of the
whole process, libraries included. The exit code is 1 where a merge went beyond --memory-limit.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import torch
from safetensors import safe_open
from safetensors.torch import save_file

MODELS = {  # experts, hidden size, intermediate size, layers, vocabulary, shards
    "tiny": (3, 64, 176, 2, 1000, 2),
    "8x100m": (8, 768, 2048, 10, 19000, 1),
    "3x1b": (3, 2048, 5632, 19, 32000, 3),
}
NOISE = 0.02


def main() -> int:
    """Make the checkpoints, measure by turns, print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", choices=MODELS, default="8x100m")
    parser.add_argument("--methods", nargs="+", default=["task_arithmetic"])
    parser.add_argument("--repeats", type=int, default=5, help="0: the first run alone")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "adamerge-bench")
    parser.add_argument("--memory-limit", type=float, default=4096, help="MiB")
    parser.add_argument("--json", action="store_true", help="print one JSON line per method, nothing else")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    folder = args.folder / args.model
    if args.child:
        print(json.dumps(measured(*args.child, folder)))
        return 0
    make_checkpoints(folder, MODELS[args.model])
    too_large = False
    for method in args.methods:
        row = {"model": args.model, "method": method, "threads": args.threads, **compare(method, args)}
        too_large |= row["peak_rss_mib"] > args.memory_limit
        print(json.dumps(row) if args.json else text(row), flush=True)
    return int(too_large)


def text(row: dict[str, float]) -> str:
    """Give one readable line."""
    return (
        f"{row['model']} {row['method']}: {row['merge_s']:.2f} s ({row['first_s']:.2f} s with hashing), "
        f"floor {row['floor_s']:.2f} s, ratio {row['ratio']:.2f}, peak {row['peak_rss_mib']:.0f} MiB"
    )


def compare(method: str, args: argparse.Namespace) -> dict[str, float]:
    """Run merge and floor by turns."""
    cache = Path(tempfile.mkdtemp())
    first = child("merge", method, args, cache)
    runs: dict[str, list[dict[str, float]]] = {"merge": [], "floor": []}
    for _ in range(args.repeats):
        for kind, found in runs.items():
            found.append(child(kind, method, args, cache))
    merges, floors = runs["merge"] or [first], runs["floor"] or [child("floor", method, args, cache)]
    merge_s, floor_s = (median(run["seconds"] for run in found) for found in (merges, floors))
    shutil.rmtree(cache)
    return {
        "merge_s": merge_s,
        "first_s": first["seconds"],
        "floor_s": floor_s,
        "ratio": merge_s / floor_s,
        "peak_rss_mib": max(run["peak_rss_mib"] for run in [first, *merges]),
        "imports_rss_mib": median(run["imports_rss_mib"] for run in merges),
    }


def child(kind: str, method: str, args: argparse.Namespace, cache: Path) -> dict[str, float]:
    """Measure in a fresh process."""
    command = [sys.executable, __file__, "--model", args.model, "--folder", str(args.folder)]
    command += ["--threads", str(args.threads), "--child", kind, method]
    environment = os.environ | {"ADAMERGE_CACHE": str(cache)}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def measured(kind: str, method: str, folder: Path) -> dict[str, float]:
    """Merge, or read and write, and give seconds and peak memory."""
    from adamerge.cli import main as adamerge
    from adamerge.commands import merge  # noqa: F401  imports are not what is measured

    experts = [f"--experts={path.name}={path}" for path in experts_of(folder)]
    imports = peak_mib()
    began = time.perf_counter()
    if kind == "merge":
        out = str(folder / "out")
        code = adamerge(
            ["merge", method, "--base", str(folder / "base"), *experts, "--out", out, "--overwrite"]
        )
        if code:
            sys.exit(code)
    else:
        floor(folder)
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "peak_rss_mib": peak_mib(), "imports_rss_mib": imports}


def floor(folder: Path) -> None:
    """Read every tensor of every input once into memory, and write a model of the base's size once."""
    tensors = {}
    for source in [*experts_of(folder), folder / "base"]:
        for file in sorted(source.glob("*.safetensors")):
            with safe_open(file, "pt") as handle:
                tensors = {name: handle.get_tensor(name).clone() for name in handle.keys()}  # noqa: SIM118  a handle is no mapping
            if source.name == "base":
                save_file(tensors, folder / f"floor-{file.name}")


def peak_mib() -> float:
    """Give the largest resident size of this process so far (Linux; getrusage would count the parent's)."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


# ---- checkpoints ------------------------------------------------------------------------------------


def experts_of(folder: Path) -> list[Path]:
    """Folders of the experts."""
    return sorted(folder.glob("expert*"))


def make_checkpoints(folder: Path, sizes: tuple[int, ...]) -> None:
    """Write a random base, and experts beside it, unless they are there."""
    n_experts, hidden, inner, layers, vocabulary, n_shards = sizes
    if (folder / "complete").exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    shapes = dict(llama_shapes(hidden, inner, layers, vocabulary))
    shards = [list(shapes)[i::n_shards] for i in range(n_shards)]
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden,
        "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 64, "vocab_size": vocabulary, "torch_dtype": "bfloat16",
        "tie_word_embeddings": False, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5,
    }  # fmt: skip
    for number, name in enumerate(["base", *(f"expert{i}" for i in range(n_experts))]):
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text(json.dumps(config, indent=2))
        write_shards(folder / name, shapes, shards, number)
    (folder / "complete").touch()


def write_shards(
    folder: Path, shapes: dict[str, tuple[int, ...]], shards: list[list[str]], number: int
) -> None:
    """Write one checkpoint: the base's random numbers, moved a little for experts (number > 0)."""
    files = {}
    for index, names in enumerate(shards, 1):
        many = f"model-{index:05d}-of-{len(shards):05d}.safetensors"
        file = "model.safetensors" if len(shards) == 1 else many
        tensors = {}
        for name in names:
            base = torch.Generator().manual_seed(len(name) * 1000 + sum(map(ord, name)))
            tensor = torch.randn(shapes[name], generator=base)
            if number:
                own = torch.Generator().manual_seed(number)
                tensor += NOISE * torch.randn(shapes[name], generator=own)
            tensors[name] = tensor.bfloat16()
            files[name] = file
        save_file(tensors, folder / file, metadata={"format": "pt"})
    if len(shards) > 1:
        (folder / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": files})
        )


def llama_shapes(
    hidden: int, inner: int, layers: int, vocabulary: int
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a Llama without grouped attention."""
    yield "model.embed_tokens.weight", (vocabulary, hidden)
    for i in range(layers):
        layer = f"model.layers.{i}"
        for part in ("q", "k", "v", "o"):
            yield f"{layer}.self_attn.{part}_proj.weight", (hidden, hidden)
        for part in ("gate", "up"):
            yield f"{layer}.mlp.{part}_proj.weight", (inner, hidden)
        yield f"{layer}.mlp.down_proj.weight", (hidden, inner)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{layer}.{norm}.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (vocabulary, hidden)


if __name__ == "__main__":
    sys.exit(main())
