"""Published rows, beside which ours stand; every one names its source and its checkpoints."""

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path

from adamerge.results import ResultRow, make_row

_FOLDER = Path(__file__).parent / "published"
_EXPERTS = "experts.csv"
_KEYS = ("benchmark", "backbone", "family", "corruption")
_FACTS = (*_KEYS, "method", "mean", "unseen_mean", "needs_test_images", "source")
_EXPERT = ("fine-tuned", "individual")


def published_rows(
    benchmark: str, backbone: str, family: str, *, corruption: str = "", unseen: Sequence[str] = ()
) -> list[ResultRow]:
    """Give what was published of a benchmark, with a backbone, for one family of checkpoints.

    Means are as published; the normalised mean is ours, where the same table has the experts.

    Args:
        benchmark: Its name ("clip8").
        backbone: "ViT-B-32", ...
        family: Of the checkpoints; rows of another never come along.
        corruption: Of the images; empty: none.
        unseen: Tasks without an expert.
    """
    key = dict(zip(_KEYS, (benchmark, backbone, family, corruption), strict=True))
    files = [path for path in sorted(_FOLDER.glob("*.csv")) if path.name != _EXPERTS]
    lines = [{"corruption": ""} | line for file in files for line in _read(file)]
    lines = [line for line in lines if key.items() <= line.items()]
    found = [(line, _accuracies(line)) for line in lines]
    experts = next((a for line, a in found if line["method"].lower().startswith(_EXPERT) and a), None)
    return [_row(line, accuracy, experts, unseen) for line, accuracy in found]


def expert_accuracies(family: str, backbone: str) -> tuple[dict[str, float], str]:
    """Give the published accuracies of a family's experts by task, and their source, where there are any."""
    for line in _read(_FOLDER / _EXPERTS):
        if (line["family"], line["backbone"], line["method"]) == (family, backbone, "individual"):
            return _accuracies(line), line["source"]
    return {}, ""


def _row(
    line: dict[str, str], accuracy: dict[str, float], experts: dict[str, float] | None, unseen: Sequence[str]
) -> ResultRow:
    row = make_row(line["method"], accuracy, experts, unseen=unseen, source=line["source"])
    row.mean = float(line["mean"]) if line.get("mean") else row.mean
    row.unseen_mean = float(line["unseen_mean"]) if line.get("unseen_mean") else row.unseen_mean
    row.details = {key: line[key] for key in _KEYS}
    return row


def _read(path: Path) -> Iterator[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as stream:
        yield from csv.DictReader(stream)


def _accuracies(line: dict[str, str]) -> dict[str, float]:
    return {task: float(value) for task, value in line.items() if task not in _FACTS and value}
