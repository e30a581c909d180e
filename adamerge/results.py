"""Rows of results to tables: terminal, Markdown, CSV and JSON."""

import csv
import io
import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from adamerge.atomic import write_text
from adamerge.progress import print_columns, terminal


@dataclass
class ResultRow:
    """One method's line in a table.

    Attributes:
        method: Name of the method.
        accuracy: Top-1 accuracy in percent by task (micro average, task known).
        mean: Plain mean over tasks that have an expert; None where none has labelled test images.
        normalized_mean: Mean of accuracy / the own expert's accuracy, in percent; None where the
            experts were not evaluated.
        transductive: Tasks whose test images were among the adaptation images.
        notes: Anything a reader of the row must know: stopped early, rolled back, ...
        unknown: Accuracy by task where the task is not known: over all tasks' classes together.
        details: What belongs to one kind of model: routing weights, baselines, stored bytes, latency.
        provenance: Digests of base, experts, data, configuration and code version.
        unseen: Tasks that are evaluated only: no expert of theirs was merged.
        unseen_mean: Plain mean over those.
        source: The publication that the row was taken from; empty for what was computed here.
        inputs: What the tasks' inputs are called: "images" or "texts".
    """

    method: str
    accuracy: dict[str, float]
    mean: float | None
    normalized_mean: float | None = None
    transductive: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    unknown: dict[str, float] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    unseen: list[str] = field(default_factory=list)
    unseen_mean: float | None = None
    source: str = ""
    inputs: str = "images"

    @property
    def label(self) -> str:
        """What tables and pictures call the row: what was not computed here is marked."""
        return f"published: {self.method}" if self.source else self.method


def make_row(
    method: str,
    accuracy: Mapping[str, float],
    individual: Mapping[str, float] | None = None,
    *,
    unseen: Collection[str] = (),
    **more: Any,
) -> ResultRow:
    """Make a row, with its means.

    Args:
        method: Name of the method.
        accuracy: Percent by task.
        individual: The experts' own accuracies, for the normalised mean.
        unseen: Tasks without an expert, which have a mean of their own.
        more: Other attributes of `ResultRow`.
    """
    seen = {task: value for task, value in accuracy.items() if task not in unseen}
    rest = {task: value for task, value in accuracy.items() if task in unseen}
    normalized = None
    if seen and individual and all(individual.get(task) for task in seen):
        normalized = _mean({task: 100 * seen[task] / individual[task] for task in seen})
    more |= {"unseen": list(rest), "unseen_mean": _mean(rest)}
    return ResultRow(method, dict(accuracy), _mean(seen), normalized, **more)


def write_row(path: Path, row: ResultRow) -> None:
    """Write one row as JSON."""
    write_text(path, json.dumps(asdict(row), indent=2) + "\n")


def read_row(path: Path) -> ResultRow:
    """Read a row that `write_row` wrote."""
    return ResultRow(**json.loads(path.read_text(encoding="utf-8")))


def write_table(folder: Path, rows: Sequence[ResultRow], stem: str = "results") -> None:
    """Write the table as Markdown, CSV and JSON."""
    tasks = _tasks_of(rows)
    document = {"tasks": tasks, "rows": [asdict(row) for row in rows]}
    write_text(folder / f"{stem}.json", json.dumps(document, indent=2) + "\n")
    header, *lines = table_lines(rows)
    stream = io.StringIO()
    csv.writer(stream, lineterminator="\n").writerows([header, *lines])
    write_text(folder / f"{stem}.csv", stream.getvalue())
    write_text(folder / f"{stem}.md", markdown_table(rows))
    known = [row for row in rows if row.unknown]
    if known and stem == "results":
        unknown = [replace(row, accuracy=row.unknown, unknown={}, mean=_mean(row.unknown)) for row in known]
        unknown = [replace(row, normalized_mean=None) for row in unknown]
        write_table(folder, unknown, "results_task_unknown")


def markdown_table(rows: Sequence[ResultRow]) -> str:
    """Give the table in Markdown."""
    return markdown(table_lines(rows))


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """Give lines of cells, the first of which is the header, as a Markdown table."""
    header, *lines = lines
    ruler = ["---", *["---:"] * (len(header) - 1)]
    return "".join("| " + " | ".join(line) + " |\n" for line in (header, ruler, *lines))


def table_lines(rows: Sequence[ResultRow]) -> list[list[str]]:
    """Give header and lines of the table as text; ``*`` marks a transductive accuracy.

    Where a row knows them, further columns have the mean of unseen tasks, the mean with the task unknown,
    and the publication that the row was taken from.
    """
    tasks = _tasks_of(rows)
    means: dict[str, list[float | None]] = {
        "mean": [row.mean for row in rows],
        "normalized": [row.normalized_mean for row in rows],
        "unseen": [row.unseen_mean for row in rows],
        "task unknown": [_mean(row.unknown) for row in rows],
    }
    for name in ("unseen", "task unknown"):
        if all(value is None for value in means[name]):
            means.pop(name)
    is_mixed = any(row.source for row in rows)
    lines = [["method", *tasks, *means, *["source"] * is_mixed]]
    for row, *values in zip(rows, *means.values(), strict=True):
        cells = [_percent(row.accuracy.get(t)) + "*" * (t in row.transductive) for t in tasks]
        lines.append([row.label, *cells, *map(_percent, values), *[row.source or "here"] * is_mixed])
    return lines


_ODD_NORMALIZED_MEAN = 110.0  # percent: a merged model this far above its experts is a sign of weak experts


def doubts(
    individual: Mapping[str, float], n_classes: Mapping[str, int], row: ResultRow | None = None
) -> list[str]:
    """Return notes on results that look wrong: experts at chance, a merged model far above its experts.

    Args:
        individual: The experts' own accuracies, percent by task.
        n_classes: Number of classes by task.
        row: The merged model's row.
    """
    notes = [
        f"the expert of {task!r} is no better than chance: {value:.1f} % of {n_classes[task]} classes. "
        "Are its head, class order and preprocessing right?"
        for task, value in individual.items()
        if value <= 100 / n_classes[task]
    ]
    if row and (row.normalized_mean or 0) > _ODD_NORMALIZED_MEAN:
        notes.append(
            f"normalized mean {row.normalized_mean:.1f}: above {_ODD_NORMALIZED_MEAN:.0f} % of the experts. "
            f"Do they fit these test {row.inputs}?"
        )
    return notes


def print_table(rows: Sequence[ResultRow], title: str) -> None:
    """Print the table to the terminal."""
    header, *lines = table_lines([replace(row, method=row.label, source="") for row in rows])
    print_columns(header, lines, title)
    out = terminal()
    for note in footnotes(rows):
        out.print(f"* {note}", highlight=False)
    for row in rows:
        unmeasured = [task for task in row.details.get("agreement", {}) if task not in row.accuracy]
        for note in [*row.notes, *agreements(row, unmeasured)]:
            out.print(f"{row.method}: {note}", markup=False, highlight=False, soft_wrap=True)


def footnotes(rows: Iterable[ResultRow]) -> Iterator[str]:
    """Return what the star behind an accuracy means, if there is one."""
    marked = next((row for row in rows if row.transductive), None)
    if marked:
        yield f"transductive: the test {marked.inputs} were among the adaptation {marked.inputs}"


def outcome(row: ResultRow) -> str:
    """Return what a row reached, as a clause: its accuracy, or its agreement with the experts."""
    agreement = [share["now"] for share in row.details.get("agreement", {}).values()]
    if row.mean is not None:
        share = f" ({row.normalized_mean:.1f} % of the experts)" if row.normalized_mean is not None else ""
        return f"mean accuracy {row.mean:.1f} %{share}"
    if agreement:
        return f"agrees with the experts on {sum(agreement) / len(agreement):.1f} % of held-out inputs"
    return "merged, not evaluated"


def agreements(row: ResultRow, tasks: Iterable[str]) -> Iterator[str]:
    """Tell how often the merged model names the same class as a task's expert: a measure without labels."""
    for task in tasks:
        share = row.details["agreement"][task]
        yield (
            f"{task}: agrees with its expert on {share['now']:.1f} % of held-out adaptation {row.inputs} "
            f"({share['start']:.1f} % at the start)"
        )


def write_predictions(
    path: Path, batches: Iterable[Mapping[str, Any]], classes: Mapping[str, Sequence[str]]
) -> None:
    """Write one CSV line per image: task, index, class, class name, probability.

    Args:
        path: The file.
        batches: With ``task``, and ``index``, ``class`` and ``probability`` of equal length.
        classes: Class names by task; may be empty for a task.
    """
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["task", "index", "class", "class_name", "probability"])
    for batch in batches:
        names = classes.get(batch["task"]) or ()
        columns = (batch[key].tolist() for key in ("index", "class", "probability"))
        for index, label, probability in zip(*columns, strict=True):
            name = names[label] if label < len(names) else ""
            writer.writerow([batch["task"], index, label, name, f"{probability:.6f}"])
    write_text(path, stream.getvalue())


def _tasks_of(rows: Iterable[ResultRow]) -> list[str]:
    return list(dict.fromkeys(task for row in rows for task in row.accuracy))


def _mean(values: Mapping[str, float]) -> float | None:
    return sum(values.values()) / len(values) if values else None


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
