"""`adamerge demo | verify | reproduce`: whole runs."""

import contextlib
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import load_file
from torch import Tensor

from adamerge import ownership, provenance
from adamerge.atomic import atomic_file
from adamerge.benchmarks import Benchmark, configs, copy_folder
from adamerge.checkpoints import loading_code, open_checkpoint
from adamerge.data.module import LABELS, MultiTaskData
from adamerge.data.tasks import TaskSpec
from adamerge.documents import read_mapping, require_path
from adamerge.errors import InputError, NumericError
from adamerge.fitting import model_settings, run, shared_file, weight_digests
from adamerge.models import open_backbone, open_heads
from adamerge.progress import console, duration, print_line
from adamerge.ranges import Factor
from adamerge.results import ResultRow, outcome, read_row

DEMO_METHODS = (
    "zero_shot",
    "individual",
    "average",
    "task_arithmetic",
    "ties",
    "adamerging_task_wise",
    "adamerging_layer_wise",
    "adamerging_layer_wise_kl",
    "default",
)
_SHOWN = "default"


def demo(out: str = "runs/demo", overwrite: bool = False) -> int:
    """Merge the shipped experts by static and adaptive methods, and show what was learned.

    Args:
        out: Folder of the table, pictures, curves and the merged model.
        overwrite: Begin anew instead of continuing what an earlier demo began.
    """
    require_path("out", out)
    folder, began = Path(out), time.monotonic()
    if not ownership.is_empty(folder) and ownership.kind_of(folder) != "table":
        raise InputError(
            f"{folder} is not empty and holds no demo.", "Choose another folder: adamerge demo --out DIR"
        )
    with ownership.claimed(folder, "table"):
        if overwrite and not ownership.is_empty(folder):
            ownership.require_ours(folder)
            with ownership.claimed(folder / ownership.NEW, "table", lock=False):
                rows = _fill(folder / ownership.NEW)
            ownership.promote(folder)
        else:
            rows = _fill(folder)
    print_line(
        f"{_SHOWN}: {outcome(rows[DEMO_METHODS.index(_SHOWN)])}; {duration(time.monotonic() - began)}. "
        f"Table, pictures and the merged model: {folder}. Load it: {loading_code(folder / 'merged')}"
    )
    return 0


def _fill(folder: Path) -> list[ResultRow]:
    """Compute the demo's rows; those that an interrupted demo finished are read."""
    benchmark = Benchmark(configs() / "benchmarks" / "embedded.yaml", folder)
    shown = benchmark.folder(_SHOWN)
    logger = [
        "--trainer.logger",
        "adamerge.tracking.SafeWandbLogger",
        "--trainer.logger.save_dir",
        str(shown),
    ]
    rows = benchmark.run(DEMO_METHODS, {_SHOWN: logger})
    for name in ("coefficients.png", "coefficients.csv", "curves.png", "curves.csv"):
        with atomic_file(folder / name) as file:
            shutil.copyfile(shown / name, file)
    copy_folder(shown / "merged", folder / "merged")
    benchmark.write(rows, "adamerge demo: top-1 accuracy, %")
    return rows


def verify(folder: str) -> int:
    """Re-hash a finished run's files and the weights and images that it was made from.

    Args:
        folder: The run folder.
    """
    path = Path(folder).absolute()
    problems = provenance.changed_files(path)
    inputs = provenance.read_inputs(path)
    with _where_it_began(inputs):
        problems += _changed_inputs(inputs)
    if problems:
        raise InputError(f"{folder} is not as it was written:\n" + "\n".join(problems))
    console.print(f"{folder}: all files and inputs are as they were.")
    return 0


def reproduce(folder: str, tolerance: Factor = 0.0) -> int:
    """Run a finished run again from its configuration, and compare coefficients and accuracies.

    Args:
        folder: The run folder.
        tolerance: Largest difference of a coefficient or weight that counts as equal.
    """
    path = Path(folder).absolute()
    if not (path / provenance.MANIFEST).exists():
        raise InputError(f"{folder} is no finished run.", "Give the folder that `adamerge fit` wrote.")
    config = read_mapping(path / "config.yaml")
    with tempfile.TemporaryDirectory() as scratch:
        again = Path(scratch) / "again"
        config["run_dir"] = str(again)
        config["trainer"]["logger"] = False  # the first run's W&B run is not ours to continue
        file = Path(scratch) / "config.yaml"
        file.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
        with _where_it_began(provenance.read_inputs(path)):
            run(["fit", "--config", str(file)])
        difference = _largest_difference(path, again)
        before, now = read_row(path / "result.json"), read_row(again / "result.json")
    console.print(f"largest difference of a coefficient or weight: {difference:.3g}")
    console.print(f"mean accuracy: {before.mean} before, {now.mean} now")
    if difference > tolerance or before.accuracy != now.accuracy:
        raise NumericError(f"{folder} was not reproduced.", "Compare `code` in both inputs.json files.")
    return 0


def _where_it_began(inputs: dict[str, Any]) -> contextlib.chdir[str]:
    """Go to the folder where the run began, for its relative paths."""
    if not Path(inputs["folder"]).is_dir():
        raise InputError(f"the run began in {inputs['folder']}, which is gone.", "Restore it, or run again.")
    return contextlib.chdir(inputs["folder"])


def _changed_inputs(inputs: dict[str, Any]) -> list[str]:
    """Hash base, experts and images again, read their settings, and name what differs."""
    model, data = inputs["config"]["model"], dict(inputs["config"]["data"])
    tasks = {name: TaskSpec(**row) for name, row in data.pop("tasks").items()}
    length = data.get("max_length")
    images = MultiTaskData(
        tasks, cache=False, max_length=length
    )  # what was remembered of files proves nothing
    images.use(open_backbone(model["base"]))
    images.use_heads(open_heads(model["base"], tasks, model["experts"]))
    sources = {**model["experts"], **shared_file(model.get("shared"))}
    weights = weight_digests(model["base"], sources, fresh=True)
    labelled = any(name.endswith(LABELS) for name in inputs["data"])
    found = {"weights": weights, "data": images.fingerprint(labelled=labelled)}
    if "files" in inputs:  # runs of older versions have not recorded them
        settings = model_settings(model["base"], model["experts"])
        problems = [f"files {line}" for line in provenance.differences(inputs["files"], settings)]
    else:
        problems = []
    return problems + [
        f"{kind} {name}: changed since the run"
        for kind, digests in found.items()
        for name, value in digests.items()
        if value != inputs[kind].get(name)
    ]


def _largest_difference(a: Path, b: Path) -> float:
    ours, theirs = (_learned(p) for p in (a, b))
    return max((float((ours[name] - theirs[name]).abs().max()) for name in ours), default=0.0)


def _learned(run: Path) -> dict[str, Tensor]:
    """Read what a run learned: a router; or coefficients, the merged weights and corrections of features."""
    merged = open_checkpoint(run / "merged")
    router = {name: merged[name] for name in merged if name.startswith("router/")}
    if router:
        return router
    files = (run / "coefficients.safetensors", run / "merged" / "heads.safetensors")
    parts = {f"{file.stem}/{n}": t for file in files if file.exists() for n, t in load_file(file).items()}
    return {name: tensor.float() for name, tensor in [*parts.items(), *merged.items()]}
