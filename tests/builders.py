"""Builds runs on the tiny models of conftest.py, through Python objects and through the command line."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import yaml
from conftest import CLASSES, SIZE, TASKS
from safetensors.torch import load_file
from torch import Tensor

from adamerge import Learned, MergeTask, MultiTaskData, TaskSpec
from adamerge.cli import main
from adamerge.data.datasets import Images
from adamerge.fitting import open_vectors
from adamerge.models import zero_shot_heads

REPOSITORY = Path(__file__).parents[1]


def specs() -> dict[str, TaskSpec]:
    """Rows whose images `memory_data` puts in place itself."""
    return {task: TaskSpec("memory", "memory", list(CLASSES[task])) for task in TASKS}


def noise(count: int, seed: int, n_classes: int | None = None) -> Images:
    """Random images, labelled where a number of classes is given."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, 3, SIZE, SIZE), generator=generator, dtype=torch.uint8)
    labels = None if n_classes is None else torch.randint(0, n_classes, (count,), generator=generator)
    return Images(images, labels)


def memory_data(n_adapt: int = 40, n_test: int = 12, **options: Any) -> MultiTaskData:
    """A data module whose images are in memory."""
    data = MultiTaskData(specs(), **{"batch_size": 4, **options})
    for seed, task in enumerate(TASKS):
        data._loaded[task, "adaptation"] = noise(n_adapt, seed)
        data._loaded[task, "test"] = noise(n_test, 100 + seed, len(CLASSES[task]))
    return data


def make_task(clip: Path, coefficients: Learned | None = None, **options: Any) -> MergeTask:
    """A MergeTask on the tiny CLIP."""
    experts = {task: str(clip / "experts" / f"{task}.safetensors") for task in TASKS}
    vectors, backbone = open_vectors(str(clip / "base"), experts, codec=options.pop("codec", "fp32"))
    heads = zero_shot_heads(clip / "base", specs())
    return MergeTask(vectors, backbone, heads, coefficients, **options)


def make_trainer(max_steps: int, *callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    """A silent trainer on the CPU."""
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    quiet |= {"enable_model_summary": False, "limit_val_batches": 0, "accelerator": "cpu", "devices": 1}
    quiet |= {"max_steps": max_steps, "max_epochs": 1, "callbacks": list(callbacks)}
    return pl.Trainer(**(quiet | options))


def adapt(
    task: MergeTask, data: MultiTaskData, steps: int, *callbacks: pl.Callback, **options: Any
) -> Tensor:
    """Adapt and give the learned coefficients."""
    make_trainer(steps, *callbacks, **options).fit(task, datamodule=data)
    return task.coefficients.table()[1].clone()


def write_benchmark(folder: Path, clip: Path, rows: Mapping[str, Any], **data: Any) -> Path:
    """Write a benchmark file for the command line; the experts are those of the tasks, or all."""
    folder.mkdir(parents=True, exist_ok=True)
    experts = {task: str(clip / "experts" / f"{task}.safetensors") for task in data.pop("tasks", TASKS)}
    document = {
        "model": {"base": str(clip / "base"), "experts": experts},
        "data": {"batch_size": 4, **data, "tasks": dict(rows)},
    }
    path = folder / "benchmark.yaml"
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    return path


def method(name: str) -> Path:
    """Path of a shipped method file."""
    return REPOSITORY / "configs" / "methods" / f"{name}.yaml"


def fit_arguments(benchmark: Path, run: Path, *more: str, name: str = "adamerging_layer_wise") -> list[str]:
    """Give the command line of a short run."""
    files = ["--config", str(benchmark), "--config", str(method(name))]
    return ["fit", *files, "--run_dir", str(run), "--trainer.max_steps", "6", *more]


def fit(benchmark: Path, run: Path, *more: str, name: str = "adamerging_layer_wise") -> int:
    """Run `adamerge fit` in this process and give its exit code."""
    return main(fit_arguments(benchmark, run, *more, name=name))


def coefficients_of(run: Path) -> dict[str, Tensor]:
    """Read a run's learned coefficients."""
    return load_file(run / "coefficients.safetensors")
