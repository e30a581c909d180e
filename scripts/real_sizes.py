"""Takes random CLIPs of real sizes through inspect, merge, adaptation and export, and tells time and memory.

    python scripts/real_sizes.py --arch ViT-B-32 --form hf --json
    python scripts/real_sizes.py --arch ViT-L-14 --form open_clip --dtype float16 --images-per-task 1 --json

The base is a complete CLIP, each expert an image tower near it, all written once to --folder as the hub has
them: HF folders with tokenizer and processor, or open_clip folders and safetensors files. Every step is the
command that users run, in a process of its own; peak memory is that process's, libraries included. At the end
transformers or open_clip load the merged folder.
"""

import argparse
import gzip
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

SIZES = {  # width, layers, heads, patch, image size, projection; then the text tower's width, layers, heads
    "tiny": (32, 2, 2, 8, 32, 16, 32, 1, 2),
    "ViT-B-32": (768, 12, 12, 32, 224, 512, 512, 12, 8),
    "ViT-B-16": (768, 12, 12, 16, 224, 512, 512, 12, 8),
    "ViT-L-14": (1024, 24, 16, 14, 224, 768, 768, 12, 12),
}
NOISE = 1e-3  # standard deviation of what an expert adds to the base
EXAMPLES = 4  # images of a task
CHILD = """
import sys
from adamerge.cli import main
code = main(sys.argv[1:])
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
sys.exit(code)
"""
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def main() -> int:
    """Make the models, run the commands, print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--arch", choices=SIZES, default="ViT-B-32")
    parser.add_argument("--form", choices=("hf", "open_clip"), default="hf")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--dtype", choices=("float32", "float16"), default="float32", help="of the files")
    parser.add_argument("--codec", default="bf16", help="of the vectors in memory")
    parser.add_argument("--images-per-task", type=int, default=2, help="per step")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "adamerge-sizes")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    folder = args.folder / f"{args.arch}-{args.form}-{args.dtype}-{args.experts}"
    if not (folder / "benchmark.yaml").exists():
        make(folder, args)
    found = {"arch": args.arch, "form": args.form, "experts": args.experts, **run_all(folder, args)}
    print(json.dumps(found) if args.json else "\n".join(f"{k}: {v}" for k, v in found.items()))
    return 0


def run_all(folder: Path, args: argparse.Namespace) -> dict[str, float]:
    """Run the commands; the merged model of the last is loaded by its own library."""
    shutil.rmtree(folder / "out", ignore_errors=True)
    document = yaml.safe_load((folder / "benchmark.yaml").read_text())
    model = ["--base", document["model"]["base"]]
    for task, path in document["model"]["experts"].items():
        model += ["--experts", f"{task}={path}"]
    fit = ["--config", str(folder / "benchmark.yaml"), "--run_dir", str(folder / "out" / "fit")]
    fit += [
        "--model.codec",
        args.codec,
        "--trainer.max_steps",
        str(args.steps),
        "--trainer.accelerator",
        "cpu",
    ]
    fit += ["--data.batch_size", str(args.images_per_task), "--evaluate_experts", "false"]
    found = command("inspect", ["inspect", *model, "--rank", "false", "--out", str(folder / "out" / "audit")])
    found |= command("merge", ["merge", "task_arithmetic", *model, "--out", str(folder / "out" / "merged")])
    found |= command("fit", ["fit", *fit])
    load(folder / "out" / "merged", args)
    load(folder / "out" / "fit" / "merged", args)
    return found


def command(name: str, arguments: list[str]) -> dict[str, float]:
    """Run an adamerge command; give its seconds and its peak memory in MiB."""
    start = time.perf_counter()
    child = [sys.executable, "-c", CHILD, *arguments]
    done = subprocess.run(child, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"adamerge {' '.join(arguments)} ended with {done.returncode}.")
    peak = int(done.stdout.rsplit(maxsplit=1)[-1]) // 1024
    return {f"{name}_s": round(time.perf_counter() - start, 1), f"{name}_peak_mib": peak}


def load(folder: Path, args: argparse.Namespace) -> None:
    """Load a merged folder as its users do."""
    if args.form == "hf":
        import transformers

        _, info = transformers.CLIPModel.from_pretrained(folder, output_loading_info=True)
        assert not [*info["missing_keys"], *info["unexpected_keys"]], info
        return
    import open_clip

    open_clip.create_model(f"local-dir:{folder}")


def make(folder: Path, args: argparse.Namespace) -> None:
    """Write base, experts, images and the benchmark's YAML file."""
    torch.manual_seed(0)
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "base").mkdir(parents=True)
    state, tower = (hf_base if args.form == "hf" else open_clip_base)(folder / "base", SIZES[args.arch])
    dtype = getattr(torch, args.dtype)
    state = {name: t.to(dtype) if t.is_floating_point() else t for name, t in state.items()}
    file = "model.safetensors" if args.form == "hf" else "open_clip_model.safetensors"
    save_file(state, folder / "base" / file, {"format": "pt"})
    tasks = [f"task{i}" for i in range(args.experts)]
    for task in tasks:
        near = {n: t + NOISE * torch.randn_like(t) for n, t in state.items() if n.startswith(tower)}
        save_file(near, folder / f"{task}.safetensors", {"format": "pt"})
        write_images(folder / "images" / task, SIZES[args.arch][4])
    experts = {task: str(folder / f"{task}.safetensors") for task in tasks}
    rows = {task: {"adapt": str(folder / "images" / task), "classes": ["cat", "dog"]} for task in tasks}
    document = {"model": {"base": str(folder / "base"), "experts": experts}, "data": {"tasks": rows}}
    (folder / "benchmark.yaml").write_text(yaml.safe_dump(document, sort_keys=False))


def write_images(folder: Path, size: int) -> None:
    """Write a task's random images."""
    folder.mkdir(parents=True)
    for i in range(EXAMPLES):
        pixels = np.random.default_rng(i).integers(0, 256, (size, size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")


def hf_base(folder: Path, size: tuple[int, ...]) -> tuple[dict[str, torch.Tensor], str]:
    """Write a CLIPModel folder without weights; give random ones, and the prefix of the image tower."""
    import transformers

    width, layers, heads, patch, pixels, projection, text_width, text_layers, text_heads = size
    vocabulary = write_tokenizer(folder)
    ends = {"eos_token_id": vocabulary - 1, "bos_token_id": vocabulary - 2}
    vision = tower(width, layers, heads) | {"patch_size": patch, "image_size": pixels}
    text = tower(text_width, text_layers, text_heads) | {"vocab_size": vocabulary, **ends}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=projection)
    model: Any = transformers.CLIPModel(config)
    config.architectures = ["CLIPModel"]
    config.save_pretrained(folder)
    square = {"height": pixels, "width": pixels}
    shape = {"size": {"shortest_edge": pixels}, "crop_size": square, "image_mean": MEAN, "image_std": STD}
    transformers.CLIPImageProcessor(**shape).save_pretrained(folder)
    return {name: t.detach() for name, t in model.state_dict().items()}, "vision_model."


def tower(width: int, layers: int, heads: int) -> dict[str, Any]:
    """Give the configuration that both towers of a CLIPModel have."""
    found = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers}
    return found | {"num_attention_heads": heads, "hidden_act": "quick_gelu"}


def write_tokenizer(folder: Path) -> int:
    """Write CLIP's tokenizer, whose merges open_clip brings along; give the size of its vocabulary."""
    import open_clip

    words = open_clip.tokenizer.SimpleTokenizer().encoder
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {names.get(word, word): i for word, i in words.items()}
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    with gzip.open(Path(open_clip.tokenizer.default_bpe())) as stream:
        merges = stream.read().decode("utf-8").split("\n")[1 : 49152 - 256 - 2 + 1]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")
    ends = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "model_max_length": 77}
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "unk_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(ends | settings))
    return len(vocabulary)


def open_clip_base(folder: Path, size: tuple[int, ...]) -> tuple[dict[str, torch.Tensor], str]:
    """Write an open_clip folder without weights; give random ones, and the prefix of the image tower."""
    import open_clip

    width, layers, heads, patch, pixels, projection, text_width, text_layers, text_heads = size
    vision = {"width": width, "layers": layers, "head_width": width // heads, "patch_size": patch}
    text = {"width": text_width, "layers": text_layers, "heads": text_heads}
    model = {
        "embed_dim": projection,
        "quick_gelu": True,
        "vision_cfg": vision | {"image_size": pixels},
        "text_cfg": text | {"context_length": 77, "vocab_size": 49408},
    }
    config = {"model_cfg": model, "preprocess_cfg": {"mean": MEAN, "std": STD}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return {name: t.detach() for name, t in open_clip.CLIP(**model).state_dict().items()}, "visual."


if __name__ == "__main__":
    sys.exit(main())
