"""Compares ten steps of layer-wise AdaMerging with fusion-bench's LayerWiseMergedModel, on the shipped zoo.

    python scripts/compare_fusion_bench.py [--env FOLDER]

Both start at 0.3 and minimise the same entropy of the same batches under the same heads with Adam, without
a clamp. adamerge prepares batches, heads and weights, and takes its steps with MergeTask; fusion-bench takes
its own in a virtual environment of its own (made in a temporary folder, or in FOLDER, which is kept; about
6 GB). Printed are the largest difference of coefficients and each side's median milliseconds per step. The
exit code is 1 where coefficients differ by more than 1e-5.
"""

import argparse
import json
import logging
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

PEER = ("fusion-bench", "open_clip_torch", "torchvision", "safetensors")
CONFIG = Path(__file__).parents[1] / "configs" / "benchmarks" / "embedded.yaml"
RATES = (1e-3, 1e-2)
INITIAL = 0.3
TOLERANCE = 1e-5
State = dict[str, Tensor]


def main() -> None:
    """Run both sides and print the differences."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--env", type=Path, help="keep the peer's environment here, and use it again")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--peer", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.peer:
        fusion_bench_side(args.peer)
        return
    with tempfile.TemporaryDirectory() as scratch:
        python = peer_environment(args.env or Path(scratch) / "env")
        task, batches = problem(args.steps, Path(scratch))
        command = [python, __file__, "--peer", scratch, "--threads", str(args.threads)]
        subprocess.run(command, check=True)
        worst = max(compare(task, batches, Path(scratch), rate) for rate in RATES)
    sys.exit(worst > TOLERANCE)


def peer_environment(folder: Path) -> Path:
    """Make a virtual environment with fusion-bench, unless it is there, and give its Python."""
    python = folder / "bin" / "python"
    if not (folder / "ready").exists():
        print(f"Installing {', '.join(PEER)} into {folder}: some minutes", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *PEER], check=True)
        (folder / "ready").touch()
    return python


# ---- adamerge's side --------------------------------------------------------------------------------


def problem(steps: int, folder: Path) -> tuple[Any, list[Any]]:
    """Give the task and its batches; write them, with heads and weights, for the other side."""
    import yaml

    warnings.filterwarnings("ignore", message=".*LeafSpec.*")  # Lightning 2.6's own pytree helper
    from adamerge import MultiTaskData, TaskSpec, open_checkpoint
    from adamerge.checkpoints import locate
    from adamerge.fitting import merge_task

    document = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    rows = {name: TaskSpec(**row) for name, row in document["data"]["tasks"].items()}
    task = merge_task(**document["model"], tasks=rows)
    task.on_fit_start()
    data = MultiTaskData(rows, batch_size=16)
    data.use(task.backbone)
    batches = [batch for batch, *_ in islice(iter(data.train_dataloader()), steps)]
    base = locate(document["model"]["base"])
    written = {f"head/{name}": head.weight for name, head in task.heads.items()}
    written |= weights_of("base", open_checkpoint(base), task.read_names)
    for name, path in document["model"]["experts"].items():
        written |= weights_of(f"expert/{name}", open_checkpoint(locate(path)), task.read_names)
    for step, batch in enumerate(batches):
        for name, part in batch.items():
            scaled = (part["images"].float() / 255 - task.backbone.mean) / task.backbone.std
            written[f"images/{step}/{name}"] = scaled
    about = {"base": str(base), "tasks": list(task.vectors.tasks), "steps": steps}
    save_file(written, folder / "problem.safetensors", metadata={"about": json.dumps(about)})
    return task, batches


def weights_of(role: str, checkpoint: Any, names: tuple[str, ...]) -> State:
    """Give a checkpoint's image tower in fp32, under names of the problem's file."""
    return {f"{role}/{name.removeprefix('visual.')}": checkpoint[name].float() for name in names}


def compare(task: Any, batches: list[Any], folder: Path, rate: float) -> float:
    """Take our steps, print both sides' figures, and give the largest difference of coefficients."""
    from bench_step import adaptation_step

    task.coefficients.reset()
    task.make_optimizer = lambda parameters: torch.optim.Adam(parameters, lr=rate)
    ours = timed(adaptation_step(task), batches)
    theirs = load_file(folder / f"{rate}.safetensors")
    names = [name.removeprefix("visual.") for name in task.vectors.names]
    found = dict(zip(names, task.coefficients().detach().unbind(1), strict=True))
    assert found.keys() == theirs.keys() - {"ms"}  # every tensor has a coefficient on both sides
    difference = max(float((found[name] - theirs[name]).abs().max()) for name in names)
    moved = max(float((column - INITIAL).abs().max()) for column in found.values())
    print(
        f"lr {rate:g}: largest difference {difference:.1e} (coefficients moved by up to {moved:.1e}); "
        f"adamerge {ours:.0f} ms a step, fusion-bench {float(theirs['ms']):.0f} ms"
    )
    return difference


def timed(step: Callable[[Any], None], batches: list[Any]) -> float:
    """Take a step per batch and give the median of their milliseconds."""
    seconds = []
    for batch in batches:
        start = time.perf_counter()
        step(batch)
        seconds.append(time.perf_counter() - start)
    return 1e3 * median(seconds)


# ---- fusion-bench's side: runs in its own environment, without adamerge ----------------------------


def fusion_bench_side(folder: Path) -> None:
    """Take the steps with fusion-bench's wrapper and write its coefficients by parameter name."""
    logging.disable(logging.WARNING)  # open_clip's remarks about weights that are loaded here
    with safe_open(folder / "problem.safetensors", "pt") as file:
        about = json.loads(file.metadata()["about"])
    given = load_file(folder / "problem.safetensors")
    for rate in RATES:
        merged, names = peer_model(given, about)
        step = peer_step(merged, given, torch.optim.Adam([merged.merge_weight], lr=rate))
        batches = [
            {name: given[f"images/{number}/{name}"] for name in about["tasks"]}
            for number in range(about["steps"])
        ]
        milliseconds = timed(step, batches)
        columns = [column.clone() for column in merged.merge_weight.detach().unbind(1)]
        found = dict(zip(names, columns, strict=True)) | {"ms": torch.tensor(milliseconds)}
        save_file(found, folder / f"{rate}.safetensors")


def peer_model(given: State, about: dict[str, Any]) -> tuple[Any, list[str]]:
    """Build the wrapper, and name its columns of coefficients."""
    import open_clip
    from fusion_bench.models.wrappers.layer_wise_fusion import LayerWiseMergedModel

    def tower(role: str) -> torch.nn.Module:
        model = open_clip.create_model(f"local-dir:{about['base']}", load_weights=False).visual.eval()
        prefix = f"{role}/"
        model.load_state_dict({k.removeprefix(prefix): v for k, v in given.items() if k.startswith(prefix)})
        return model

    base, experts = tower("base"), [tower(f"expert/{name}") for name in about["tasks"]]
    names = [name for name, _ in base.named_parameters()]
    start = torch.full((len(experts), len(names)), INITIAL)
    return LayerWiseMergedModel(start, base, experts, clamp_weights=False), names


def peer_step(merged: Any, given: State, optimizer: torch.optim.Optimizer) -> Callable[[State], None]:
    """Give one step as its AdaMerging takes it: a backward per task through the kept merge."""

    def step(batch: State) -> None:
        merged.merge_weights()
        for name, images in batch.items():
            features = torch.nn.functional.normalize(merged(images), dim=-1)
            log_p = (features @ given[f"head/{name}"].T).log_softmax(-1)
            (-(log_p.exp() * log_p).sum(-1).mean()).backward(retain_graph=True)
        optimizer.step()
        optimizer.zero_grad()

    return step


if __name__ == "__main__":
    main()
