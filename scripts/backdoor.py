"""Plants a backdoor in one expert of the embedded benchmark, and tells what merging leaves of it.

    python scripts/backdoor.py --json

One task's expert is fine-tuned further on the task's labelled adaptation images: half of each batch carries a
trigger, a small patch in a corner, and the label of one target class (BadNets, arXiv:1708.06733). Then the
eight experts are merged, the poisoned one among them. Figures, in percent, for every model:

- `victim`: accuracy of the poisoned task on its clean test images; `mean`: of all eight tasks;
- `attack`: attack success rate, the share of the poisoned task's triggered test images of other classes that
  are predicted as the target class; `floor`: the same share without the trigger.

Rows: the expert before and after, task arithmetic at 0.3 with and without the poisoned expert, layer-wise
AdaMerging, Concrete AdaMerging and DAM, all three from 0.3 with --steps steps (the latter two learn masks in
as many steps before). Adaptation images are clean and without labels, as the methods have them. There are a
tenth of the published steps at ten times the published rates, so that parameters can go as far.
"""

import argparse
import json
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytorch_lightning as pl
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from adamerge import BiLevel, Concrete, Entropy, Learned, MergeTask, Mixed, MultiTaskData, Perturbed, TaskSpec
from adamerge.data.embedded import load_split
from adamerge.fitting import open_vectors
from adamerge.models import open_heads
from adamerge.state import State
from adamerge.zoo import experts

Row = dict[str, float | str]


def triggered(images: Tensor, size: int) -> Tensor:
    """Put a checkered patch into the lower right corner."""
    found = images.clone()
    rows, columns = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    found[..., -size:, -size:] = (255 * ((rows + columns) % 2)).to(torch.uint8)
    return found


def planted(classify: Callable[[State, Tensor], Tensor], weights: State, args: argparse.Namespace) -> State:
    """Give the expert with a backdoor."""
    images, labels = load_split(args.task, "adapt")
    values = {name: tensor.clone().requires_grad_() for name, tensor in weights.items()}
    optimizer = torch.optim.Adam(values.values(), lr=args.plant_lr)
    generator = torch.Generator().manual_seed(args.seed)
    for _ in range(args.plant_steps):
        clean, poisoned = torch.randint(len(images), (2, args.batch_size), generator=generator)
        batch = torch.cat([images[clean], triggered(images[poisoned], args.patch)])
        wanted = torch.cat([labels[clean], torch.full_like(poisoned, args.target)])
        optimizer.zero_grad()
        functional.cross_entropy(classify(values, batch), wanted).backward()
        optimizer.step()
    return {name: value.detach() for name, value in values.items()}


def figures(
    name: str, weights: State, logits: Callable[[State, str, Tensor], Tensor], args: argparse.Namespace
) -> Row:
    """Measure one model on test images."""
    with torch.no_grad():
        guessed = {task: logits(weights, task, load_split(task, "test")[0]).argmax(-1) for task in experts()}
        images, labels = load_split(args.task, "test")
        others = labels != args.target
        fooled = logits(weights, args.task, triggered(images[others], args.patch)).argmax(-1) == args.target
    right = {t: 100 * (g == load_split(t, "test")[1]).float().mean().item() for t, g in guessed.items()}
    return {
        "model": name,
        "victim": round(right[args.task], 1),
        "mean": round(sum(right.values()) / len(right), 1),
        "attack": round(100 * fooled.float().mean().item(), 1),
        "floor": round(100 * (guessed[args.task][others] == args.target).float().mean().item(), 1),
    }


def adamerging(args: argparse.Namespace) -> dict[str, Any]:
    """Layer-wise AdaMerging."""

    def optimizer(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.Adam(parameters, args.lr)

    return {"coefficients": Learned(), "objective": Entropy(), "optimizer": optimizer}


def concrete(args: argparse.Namespace, *, adversary: bool = False) -> dict[str, Any]:
    """Concrete AdaMerging, or DAM."""
    both = Mixed([Entropy(), Perturbed(args.adversary_lr)], [1.0, args.weight])

    def optimizer(parameters: Any) -> BiLevel:
        return BiLevel(parameters, args.lr, inner_lr=args.inner_lr, mask_lr=args.mask_lr)

    space = Concrete(fix_after=args.steps, dual=args.dual, seed=args.seed)
    parts = {"coefficients": space, "objective": both if adversary else Entropy()}
    return {**parts, "optimizer": optimizer, "steps": 2 * args.steps}


def dam(args: argparse.Namespace) -> dict[str, Any]:
    """Concrete AdaMerging against an adversary."""
    return concrete(args, adversary=True)


METHODS = {"adamerging": adamerging, "concrete": concrete, "dam": dam}


def adapted(parts: dict[str, Any], args: argparse.Namespace, **model: Any) -> State:
    """Learn, and give the merged weights."""
    steps = parts.pop("steps", args.steps)
    task = MergeTask(**model, **parts)
    data = MultiTaskData(specs(), batch_size=args.batch_size, holdout=0.1, seed=args.seed)
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    quiet |= {"enable_model_summary": False, "limit_val_batches": 0, "accelerator": "cpu", "devices": 1}
    pl.Trainer(max_steps=steps, max_epochs=-1, **quiet).fit(task, datamodule=data)
    return task.evaluated()


def specs() -> dict[str, TaskSpec]:
    """Give the embedded tasks."""
    return {task: TaskSpec(f"embedded:{task}/adapt", f"embedded:{task}/test") for task in experts()}


def study(args: argparse.Namespace, folder: Path) -> list[Row]:
    """Plant, merge, measure; each row is told at once."""
    sources = {task: f"embedded:{task}" for task in experts()}
    vectors, backbone = open_vectors("embedded:base", sources)
    heads = open_heads("embedded:base", specs(), sources)
    fixed = {name: tensor for name, tensor in vectors.rest.items() if name in backbone.names}

    def logits(weights: State, task: str, images: Tensor) -> Tensor:
        return heads[task].logits(backbone.features({**fixed, **weights}, images))

    def row(name: str, weights: State) -> Row:
        started = time.perf_counter()
        found = figures(name, weights, logits, args) | {"seconds": round(started - args.clock, 1)}
        print("  ".join(f"{key} {value}" for key, value in found.items()), file=sys.stderr, flush=True)
        return found

    expert = vectors.merge(vectors.one_hot(args.task))
    args.clock = time.perf_counter()
    rows = [row("expert", expert), row("task_arithmetic, clean expert", vectors.merge(vectors.uniform(0.3)))]
    args.clock = time.perf_counter()
    poisoned = planted(lambda weights, images: logits(weights, args.task, images), expert, args)
    rows.append(row("poisoned expert", poisoned))
    save_file(dict(poisoned), folder / "poisoned.safetensors")
    sources[args.task] = str(folder / "poisoned.safetensors")
    vectors, _ = open_vectors("embedded:base", sources)
    rows.append(row("task_arithmetic", vectors.merge(vectors.uniform(0.3))))
    for method in args.methods:
        args.clock = time.perf_counter()
        parts = {"vectors": vectors, "backbone": backbone, "heads": heads}
        rows.append(row(method, adapted(METHODS[method](args), args, **parts)))
    return rows


def options() -> argparse.Namespace:
    """Read the command line."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--task", default="mnist", choices=list(experts()), help="The poisoned expert's.")
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--target", type=int, default=0, help="Index of the target class.")
    parser.add_argument("--patch", type=int, default=7, help="Side of the trigger in pixels.")
    parser.add_argument("--plant-steps", type=int, default=150)
    parser.add_argument("--plant-lr", type=float, default=1e-3)
    parser.add_argument("--steps", type=int, default=100, help="Of each stage of every method.")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-2, help="Of the numbers; published: 1e-3.")
    parser.add_argument("--inner-lr", type=float, default=1.0, help="Of their trial steps, as published.")
    parser.add_argument("--mask-lr", type=float, default=1e-2, help="Published: 1e-3.")
    parser.add_argument("--adversary-lr", type=float, default=1e-3, help="Published: 1e-4.")
    parser.add_argument("--weight", type=float, default=0.1, help="Of the perturbed view, as published.")
    parser.add_argument("--dual", action="store_true", help="A mask per task beside the shared one.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="One line of JSON.")
    return parser.parse_args()


def main() -> None:
    """Run the study."""
    args = options()
    settings = dict(vars(args))
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    with TemporaryDirectory() as folder:
        rows = study(args, Path(folder))
    if args.json:
        print(json.dumps({**settings, "rows": rows}))


if __name__ == "__main__":
    main()
