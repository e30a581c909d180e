"""The CLIP-ViT benchmarks, from their facts in YAML to a configuration and its premises."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml

from adamerge.benchmarks.gate import Premises
from adamerge.benchmarks.published import expert_accuracies, published_rows
from adamerge.errors import InputError, nearest
from adamerge.results import ResultRow

_HERE = Path(__file__).parent
_LOCAL = "local/"
_OPTIONAL = ("image_column", "label_column")
_DATA: dict[str, Any] = {"batch_size": 16, "eval_batch_size": 128, "holdout": 0.1}

AdaptSplit = Literal["train", "test"]
Form = Literal["hf", "open_clip"]


@dataclass(frozen=True)
class Definition:
    """One benchmark with one backbone and one family of checkpoints.

    Attributes:
        name: Of the benchmark ("clip8").
        backbone: "ViT-B-32", ...
        family: Of the checkpoints ("tanganke").
        corruption: Of the images; empty: none.
        document: The configuration that `adamerge fit` reads too.
        premises: What the gate looks at.
        choices: What was chosen, as lines for the report.
    """

    name: str
    backbone: str
    family: str
    corruption: str
    document: dict[str, Any]
    premises: Premises
    choices: list[str] = field(default_factory=list)

    @property
    def title(self) -> str:
        """What stands above the table."""
        parts = [self.name, self.backbone, _facts()["families"][self.family]["title"], self.corruption]
        return ", ".join(filter(None, parts))

    @property
    def folder(self) -> str:
        """A name for the table's folder."""
        return "-".join(
            filter(None, [self.name, self.backbone, self.family, self.corruption.replace("/", "_")])
        )

    def published(self) -> list[ResultRow]:
        """Give the rows that were published of the same benchmark, backbone and checkpoints."""
        tasks, experts = self.document["data"]["tasks"], self.document["model"]["experts"]
        unseen = [task for task in tasks if task not in experts]
        return published_rows(
            self.name, self.backbone, self.family, corruption=self.corruption, unseen=unseen
        )


def defined() -> tuple[str, ...]:
    """Name the CLIP benchmarks."""
    return tuple(_facts()["benchmarks"])


def define(
    name: str,
    *,
    backbone: str = "ViT-B-32",
    family: str = "tanganke",
    form: Form | None = None,
    mirror: str | None = None,
    base: str | None = None,
    experts: Mapping[str, str] | None = None,
    adapt_split: AdaptSplit = "train",
    corruption: str = "",
    codec: str | None = None,
) -> Definition:
    """Define a benchmark's configuration and premises.

    Args:
        name: One of `defined`.
        backbone: ViT-B-32, ViT-B-16 or ViT-L-14.
        family: The checkpoints: tanganke, tanganke_lora, task_arithmetic or tall.
        form: Of base and experts: hf or open_clip; default: the family's own.
        mirror: A folder below which models and data are looked for by their hub ids, before the hub is.
        base: Another base than the benchmark's.
        experts: Other experts than the benchmark's, by task.
        adapt_split: Images to adapt on: train (disjoint from the test images), or test, as published.
        corruption: One of the usual seven, for the hub's own corrupted test splits; NAME/SEVERITY
            corrupts here, the images to adapt on too.
        codec: Stored form of the task vectors; default: fp32.

    Raises:
        InputError: A name is unknown, or there are no such checkpoints.
    """
    row = _pick("benchmark", name, _facts()["benchmarks"])
    names = {**_pick("backbone", backbone, _facts()["backbones"]), "backbone": backbone}
    checkpoints = _pick("family", family, _facts()["families"])
    form = form or next(iter(checkpoints["experts"]))
    swap, given = checkpoints.get("replaces", {}), experts or {}
    merged, unseen = ([swap.get(task, task) for task in row.get(part, ())] for part in ("tasks", "unseen"))
    for task in given:
        _pick("expert of task", task, dict.fromkeys(merged))
    paths = {task: given.get(task) or _expert(task, checkpoints, form, names, mirror) for task in merged}
    rows = {task: _task_row(task, mirror, adapt_split, corruption) for task in (*merged, *unseen)}
    for task in unseen:
        rows[task].pop("adapt")
    model = {"base": base or _at(mirror, names[form]), "experts": paths} | ({"codec": codec} if codec else {})
    protocol = "as published: transductive" if adapt_split == "test" else "disjoint from the test images"
    choices = [
        f"checkpoints: {checkpoints['title']}, {form} form",
        f"images to adapt on: the {adapt_split} split ({protocol})",
        *_corrupted(corruption, adapt_split),
    ]
    document = {"model": model, "data": {**_DATA, "tasks": rows}}
    return Definition(
        name, backbone, family, corruption, document, _premises(family, backbone, rows, paths), choices
    )


def _corrupted(corruption: str, adapt_split: AdaptSplit) -> list[str]:
    """Tell which images are corrupted, and where: by the hub only test splits are, here all images."""
    if not corruption:
        return []
    by = "computed here" if "/" in corruption else "the hub's own split"
    is_both = "/" in corruption or adapt_split == "test"
    which = (
        "test images and images to adapt on" if is_both else "test images only; images to adapt on are clean"
    )
    return [f"corruption {corruption} ({by}): {which}"]


def _premises(family: str, backbone: str, rows: Collection[str], merged: Collection[str]) -> Premises:
    accuracies, source = expert_accuracies(family, backbone)
    return Premises(
        accuracy={task: accuracies[task] for task in merged if task in accuracies},
        images={task: _tasks()[task]["images"] for task in rows},
        activation=_facts()["activation"],
        transform=_facts()["transform"],
        source=source,
    )


def _task_row(name: str, mirror: str | None, adapt_split: AdaptSplit, corruption: str) -> dict[str, Any]:
    """Give a task's row of the configuration."""
    task = _tasks()[name]
    source = _at(mirror, task["data"])
    splits = {"train": task["train"], "test": task["test"]}
    row: dict[str, Any] = {key: task[key] for key in _OPTIONAL if key in task}
    if "/" in corruption:
        row["corruption"] = corruption
    elif corruption:
        _pick("corruption", corruption, _facts()["corruptions"])
        if not task.get("corrupted"):
            raise InputError(
                f"the hub has no {corruption} images of {name}.",
                f"Corrupt them here: --corruption {corruption}/5",
            )
        splits["test"] = corruption
    row |= {"adapt": f"{source}@{splits[adapt_split]}", "test": f"{source}@{splits['test']}"}
    return row | {"classes": "\n".join(task["classes"]), "templates": list(task["templates"])}


def _expert(
    task: str, checkpoints: Mapping[str, Any], form: str, names: Mapping[str, str], mirror: str | None
) -> str:
    """Give an expert's hub id, or its place below the mirror."""
    pattern = _pick("form", form, checkpoints["experts"])
    place = pattern.format(**names, task=task, expert=_tasks()[task]["expert"])
    found = _at(mirror, place)
    if place.startswith(_LOCAL) and found == place:
        raise InputError(
            f"{checkpoints['title']}: the hub has no expert of {task!r} in {form} form.",
            f"Put it at MIRROR/{place} (--mirror MIRROR), or name it with --experts.{task} PATH.",
        )
    return found


def _at(mirror: str | None, hub_id: str) -> str:
    """Give the local copy of a hub id (with what follows ``#``) if the mirror has one, else the id."""
    name, mark, rest = hub_id.partition("#")
    local = Path(mirror or "", name)
    return f"{local}{mark}{rest}" if mirror and local.exists() else hub_id


def _pick(kind: str, name: str, known: Any) -> Any:
    if name not in known:
        raise InputError(f"{kind} {name!r} is unknown.", nearest(name, known))
    return known[name] if isinstance(known, Mapping) else name


@cache
def _facts() -> dict[str, Any]:
    return yaml.safe_load((_HERE / "benchmarks.yaml").read_text(encoding="utf-8"))


@cache
def _tasks() -> dict[str, Any]:
    return yaml.safe_load((_HERE / "tasks.yaml").read_text(encoding="utf-8"))
