"""Compares static merges with mergekit and fusion-bench, where they have the same variant.

    python scripts/compare_merges.py [--env FOLDER] [--speed]

A small random checkpoint set in fp32 is merged by all; printed is, per method, the largest difference
relative to the largest entry of the merged task vector. The exit code is 1 where one is beyond 1e-5 without
a known reason. Peers run in virtual environments of their own (made in a temporary folder, or in FOLDER,
which is kept; about 6 GB). With --speed, mergekit's seconds are compared on 8 experts of 100 M parameters in
bf16, by turns and in fresh processes, imports not counted; the better of the runs is printed.
"""

import argparse
import math
import os
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from itertools import starmap
from pathlib import Path
from typing import Any, NamedTuple

import torch
from bench_merge import MODELS, experts_of, make_checkpoints
from safetensors.torch import load_file, save_file
from torch import Tensor

PACKAGES = {"mergekit": ["mergekit"], "fusion-bench": ["fusion-bench"]}
TOLERANCE = 1e-5
SPREAD, SHARED = 0.02, 0.5  # of experts around the base, whose own entries are 0.1; of that, in common
PER_TENSOR = "mergekit trims every tensor on its own"
MATRIX = "model.layers.1.mlp.down_proj.weight"
State = dict[str, Tensor]


class Row(NamedTuple):
    """A merge that both sides do: `theirs` is a peer's method and its options."""

    method: str
    options: dict[str, Any]
    peer: str
    theirs: tuple[str, dict[str, Any]]
    reason: str = ""  # why results may differ
    experts: int = 3
    only: str = ""  # the one tensor that takes part


def rows() -> list[Row]:
    """What is compared."""
    size = math.prod((64, 176))
    one_less = (int(0.2 * size) - 1) / size  # we keep the entry at the threshold as well, mergekit does not
    mean, top = {"aggregate": "mean", "scale": 1.0}, {"weight": 1.0, "density": 0.2}
    tails = {"keep": 0.3, "outliers": 0.05, "scale": 0.2}
    trims = {"density": 0.3, "gamma": 0.05, "weight": 0.2}
    mk, fb = "mergekit", "fusion-bench"
    return [
        Row("average", {}, mk, ("linear", {"weight": 1.0})),
        Row("task_arithmetic", {"scale": 0.3}, mk, ("task_arithmetic", {"weight": 0.3})),
        Row("slerp", {"t": 0.3}, mk, ("slerp", {"t": 0.3}), experts=2),
        Row("slerp", {"many": "karcher"}, mk, ("karcher", {"max_iter": 100, "tol": 1e-9})),
        Row("slerp", {"on": "task_vector"}, mk, ("multislerp", {"weight": 1.0}),
            "one step in the tangent plane there, the Karcher mean here"),
        Row("ties", {"density": 1.0, **mean}, mk, ("ties", {"weight": 1.0, "density": 1.0})),
        Row("ties", {"density": one_less, **mean}, mk, ("ties", top), only=MATRIX),
        Row("ties", {"density": 0.2, **mean}, mk, ("ties", top), PER_TENSOR),
        Row("breadcrumbs", {"scope": "tensor", **tails}, mk, ("breadcrumbs", trims)),
        Row("breadcrumbs", {"scope": "row", **tails}, mk, ("breadcrumbs", trims), "tensors, not rows"),
        Row("model_stock", {"min_cosine": -1.0}, mk, ("model_stock", {})),
        Row("model_stock", {"per_row": True, "min_cosine": -1.0}, mk, ("model_stock", {"filter_wise": True})),
        Row("average", {}, fb, ("average", {})),
        Row("task_arithmetic", {"scale": 0.3}, fb, ("task_arithmetic", {})),
        Row("ties", {"density": 0.2, "scale": 0.3}, fb, ("ties", {"merge_func": "sum"})),
        Row("ties", {"density": 0.2, **mean, "scale": 0.3}, fb, ("ties", {"merge_func": "mean"})),
        Row("iso_c", {}, fb, ("iso_c", {})),
        Row("iso_cts", {}, fb, ("iso_cts", {})),
        Row("tsv", {}, fb, ("tsv", {})),
        Row("magmax", {"scale": 0.5}, fb, ("magmax", {})),
        Row("emr", {}, fb, ("emr", {})),
        Row("wudi", {}, fb, ("wudi", {})),
        Row("slerp", {"t": 0.3}, fb, ("slerp", {}), experts=2),
    ]  # fmt: skip


SPEED = {  # ours, with its options on the command line; mergekit's parameters; experts
    "linear": (["average"], {"weight": 1.0}, 8),
    "ties": (["ties", "--aggregate", "mean", "--scale", "1"], {"weight": 1.0, "density": 0.2}, 8),
    "dare_ties": (["dare", "--merger", "ties", "--density", "1"], {"weight": 0.3, "density": 0.5}, 8),
    "breadcrumbs": (
        ["breadcrumbs", "--scope", "tensor"], {"weight": 0.2, "density": 0.15, "gamma": 0.006}, 8
    ),
    "slerp": (["slerp"], {"t": 0.5}, 2),
}  # fmt: skip


def main() -> int:
    """Run all sides, print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--env", type=Path, help="keep the peers' environments here, and use them again")
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--methods", nargs="+", choices=SPEED, default=list(SPEED), help="of --speed")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--dtype", default="bfloat16", help="in which mergekit computes, with --speed")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "adamerge-bench")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.child:
        CHILDREN[args.child[0]](args.child[1], args)
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        args.env = args.env or Path(scratch) / "env"
        os.environ["ADAMERGE_CACHE"] = str(Path(scratch) / "cache")
        return speed(args) if args.speed else differences(args, Path(scratch))


def child(kind: str, what: str, args: argparse.Namespace) -> str:
    """Run one side in its own process and environment, and give the last line that it prints."""
    python = peer_environment(args.env, kind) if kind in PACKAGES else sys.executable
    command = [python, __file__, "--threads", str(args.threads), "--folder", str(args.folder)]
    command += ["--dtype", args.dtype, "--child", kind, what]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{kind} failed:\n{done.stderr[-3000:]}")
    return (done.stdout.splitlines() or [""])[-1]


def peer_environment(folder: Path, peer: str) -> Path:
    """Make a peer's virtual environment unless it is there."""
    home = folder / peer
    if not (home / "ready").exists():
        print(f"Installing {peer} into {home}: some minutes", flush=True)
        for command in (
            ["-m", "venv", "--clear", home],
            ["-m", "pip", "--python", home, "install", "-q", *PACKAGES[peer]],
        ):
            subprocess.run([sys.executable, *command], check=True)
        (home / "ready").touch()
    return home / "bin" / "python"


# ---- results ----------------------------------------------------------------------------------------


def differences(args: argparse.Namespace, scratch: Path) -> int:
    """Print a line per method; give 1 where a difference has no known reason."""
    args.folder = scratch / "tiny"
    make_checkpoints(args.folder, MODELS["tiny"])
    widen(args.folder)
    for peer in PACKAGES:
        child(peer, "all", args)
    print(
        "| adamerge | options | peer | largest relative difference | equal to 1e-5 |\n|---|---|---|---|---|"
    )
    found = list(starmap(lambda i, row: compare(row, args.folder, i), enumerate(rows())))
    return int(not all(found))


def widen(folder: Path) -> None:
    """Rewrite the checkpoints in fp32: bf16 leaves many entries of task vectors equal."""
    for config in folder.glob("*/config.json"):
        config.write_text(config.read_text().replace("bfloat16", "float32"))
    for file in folder.glob("*/*.safetensors"):
        save_file(
            {name: entries(x, name, file) for name, x in load_file(file).items()}, file, {"format": "pt"}
        )


def entries(like: Tensor, name: str, file: Path) -> Tensor:
    """Random entries: a base, a part that experts share, and their own."""

    def noise(role: str) -> Tensor:
        return torch.randn(
            like.shape, generator=torch.Generator().manual_seed(zlib.crc32(f"{role}/{name}".encode()))
        )

    role = file.parent.name
    base = 0.1 * noise("base")
    return base if role == "base" else base + SPREAD * (SHARED * noise("shared") + noise(role))


def compare(row: Row, folder: Path, number: int) -> bool:
    """Merge, print the row, and say whether it is as expected."""
    from adamerge import TaskVectors, edit, merge
    from adamerge.static.run import expert_tensors

    experts = {path.name: path for path in experts_of(folder)[: row.experts]}
    vectors = TaskVectors.open(folder / "base", experts, names=[row.only] if row.only else None)
    if row.method == "emr":
        ours = dict(expert_tensors(edit(vectors, row.method), "expert0"))
    else:
        ours = merge(vectors, row.method, **row.options)
    base, theirs = read(folder / "base"), read(folder / f"out{number}")
    names = [row.only] if row.only else list(ours)
    size = max(float((ours[n] - base[n]).abs().max()) for n in names)
    worst = max(float((ours[n] - theirs[n]).abs().max()) for n in names) / size
    equal = worst <= TOLERANCE
    options = ", ".join(
        f"{k}={v:.6g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.options.items()
    )
    options += f" (of {row.only} alone)" if row.only else ""
    verdict = "yes" if equal else f"no: {row.reason or 'UNEXPECTED'}"
    print(f"| {row.method} | {options} | {row.peer} {row.theirs[0]} | {worst:.1e} | {verdict} |", flush=True)
    return equal or bool(row.reason)


def read(folder: Path) -> State:
    """All tensors of a checkpoint."""
    return {name: x for file in folder.glob("*.safetensors") for name, x in load_file(file).items()}


# ---- the peers: these run in their own environments, without adamerge -------------------------------


def mergekit_side(what: str, args: argparse.Namespace) -> None:
    """Do mergekit's rows, or one method of the speed table."""
    if what in SPEED:
        _, parameters, n_experts = SPEED[what]
        run = mergekit_run(args.folder, what, parameters, n_experts, dtype=args.dtype, out="out-mergekit")
        began = time.perf_counter()
        run()
        print(time.perf_counter() - began)
        return
    for number, row in enumerate(rows()):
        if row.peer == "mergekit":
            mergekit_run(args.folder, *row.theirs, row.experts, dtype="float32", out=f"out{number}")()


def mergekit_run(
    folder: Path, method: str, parameters: dict[str, Any], n: int, *, dtype: str, out: str
) -> Callable[[], None]:
    """Prepare one merge."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import MergeOptions, run_merge

    experts = [str(path) for path in experts_of(folder)[:n]]
    shared = parameters.keys() & {"t", "max_iter", "tol", "filter_wise"}
    own = {key: value for key, value in parameters.items() if key not in shared}
    config = {
        "merge_method": method, "dtype": dtype, "parameters": {key: parameters[key] for key in shared},
        "models": [{"model": path, "parameters": own} for path in experts],
    }  # fmt: skip
    if method not in ("linear", "karcher"):
        config["base_model"] = experts[0] if method == "slerp" else str(folder / "base")
    options = MergeOptions(lazy_unpickle=True, copy_tokenizer=False, write_model_card=False, quiet=True)
    return lambda: run_merge(MergeConfiguration.model_validate(config), str(folder / out), options)


def fusion_bench_side(_what: str, args: argparse.Namespace) -> None:
    """Do fusion-bench's rows."""
    from transformers import LlamaForCausalLM

    def load(path: Path) -> torch.nn.Module:
        return LlamaForCausalLM.from_pretrained(path, torch_dtype=torch.float32)

    for number, row in enumerate(rows()):
        if row.peer == "fusion-bench":
            base, *models = map(load, [args.folder / "base", *experts_of(args.folder)[: row.experts]])
            out = args.folder / f"out{number}"
            out.mkdir()
            with torch.no_grad():
                state = fusion_bench_merge(row, base, models)
                torch.set_default_dtype(torch.float32)
            save_file(
                {name: x.detach().contiguous().clone() for name, x in state.items()},
                out / "model.safetensors",
            )


def fusion_bench_merge(row: Row, base: Any, models: list[Any]) -> State:
    """Merge Llama models."""
    from fusion_bench.method.magmax.magmax import magmax_merge
    from fusion_bench.method.simple_average import simple_average
    from fusion_bench.method.slerp.slerp import slerp_on_state_dicts

    states = [model.state_dict() for model in models]
    if row.method == "average":
        return simple_average(states)
    if row.method == "slerp":
        return slerp_on_state_dicts(row.options["t"], *states)
    if row.method == "magmax":
        return magmax_merge(base, models, scaling_factor=row.options["scale"]).state_dict()
    start = {name: x.clone() for name, x in base.state_dict().items()}
    vectors = [{name: state[name] - start[name] for name in start} for state in states]
    merged = fusion_bench_vector(row, vectors)
    return {name: start[name] + merged[name].float() for name in start}


def fusion_bench_vector(row: Row, vectors: list[State]) -> State:
    """Merge task vectors."""
    from fusion_bench.method.emr_merging.utils import emr_merge
    from fusion_bench.method.isotropic_merging.iso_utils import iso_c, iso_cts
    from fusion_bench.method.task_singular_vector.utils import TSVM_utils
    from fusion_bench.method.ties_merging import ties_merging_utils as ties
    from fusion_bench.method.wudi.wudi import wudi_merging
    from fusion_bench.utils.state_dict_arithmetic import state_dict_mul, state_dict_sum

    if row.method == "ties":
        flat = torch.stack([ties.state_dict_to_vector(vector) for vector in vectors])
        merged = ties.ties_merging(flat, row.options["density"], row.theirs[1]["merge_func"])
        return ties.vector_to_state_dict(row.options["scale"] * merged, vectors[0])
    if row.method == "task_arithmetic":
        return state_dict_mul(state_dict_sum(vectors), row.options["scale"])
    if row.method == "emr":
        unified, masks, rescalers = emr_merge(vectors)
        return {name: rescalers[0] * masks[name][0] * x for name, x in unified.items()}
    if row.method == "wudi":
        with torch.enable_grad():
            return wudi_merging(vectors, "cpu")
    if row.method in ("tsv", "iso_cts"):  # whose fp32 rounding is amplified by close singular values
        torch.set_default_dtype(torch.float64)
        vectors = [{name: x.double() for name, x in vector.items()} for vector in vectors]
    if row.method == "tsv":
        return TSVM_utils.compute_and_sum_svd_mem_reduction(vectors, accelerator="cpu")
    return iso_c(vectors, "cpu") if row.method == "iso_c" else iso_cts(vectors, 0.8, "cpu")


# ---- speed ------------------------------------------------------------------------------------------


def speed(args: argparse.Namespace) -> int:
    """Time both sides by turns."""
    make_checkpoints(args.folder / "8x100m", MODELS["8x100m"])
    args.folder /= "8x100m"
    print(f"| mergekit's method | experts | adamerge s | first run s | mergekit s ({args.dtype}) | ratio |")
    print("|---|---|---|---|---|---|", flush=True)
    for method in args.methods:
        turns = [
            [float(child(kind, method, args)) for kind in ("adamerge", "mergekit")]
            for _ in range(args.repeats)
        ]
        ours, theirs = map(min, zip(*turns, strict=True))
        row = [method, SPEED[method][2], *(f"{x:.2f}" for x in (ours, turns[0][0], theirs, theirs / ours))]
        print("", *row, "", sep=" | ", flush=True)
    return 0


def adamerge_side(what: str, args: argparse.Namespace) -> None:
    """Time one merge as the command does it: inputs are hashed in the first run and remembered."""
    from adamerge.cli import main as adamerge
    from adamerge.commands import merge  # noqa: F401  imports are not what is measured

    command, _, n_experts = SPEED[what]
    experts = [f"--experts={path.name}={path}" for path in experts_of(args.folder)[:n_experts]]
    files = [
        "--base",
        str(args.folder / "base"),
        *experts,
        "--out",
        str(args.folder / "out-adamerge"),
        "--overwrite",
    ]
    began = time.perf_counter()
    if code := adamerge(["merge", *command, *files]):
        sys.exit(code)
    print("\n", time.perf_counter() - began)


CHILDREN = {"adamerge": adamerge_side, "mergekit": mergekit_side, "fusion-bench": fusion_bench_side}

if __name__ == "__main__":
    sys.exit(main())
