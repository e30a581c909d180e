"""`adamerge table RUNS...`: one table of several runs and benchmarks."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from adamerge.errors import InputError, shortlist
from adamerge.plots import accuracy_bars, save_picture
from adamerge.progress import console
from adamerge.results import ResultRow, make_row, print_table, read_row, write_table


def table(runs: list[str], *, out: str | None = None, mixed: bool = False) -> int:
    """Join the rows of finished runs and benchmark tables to one table.

    All rows must be of the same tasks, test images and base. They are normalised by the accuracies of their
    own experts, where a row has these.

    Args:
        runs: Folders of `adamerge fit` (with result.json) or of `adamerge bench run` (with results.json).
        out: Folder of the table as Markdown, CSV, JSON and a picture; default: it is printed only.
        mixed: Join rows of other tasks, test images or bases all the same; a note at each says so.
    """
    found = [(folder, row) for folder in runs for row in _rows(Path(folder))]
    rows = _distinct([*_compared(found, mixed=mixed)])
    bounds = [row for row in rows if row.method.partition(" #")[0] == "individual" and not row.source]
    for row in rows:
        if row.normalized_mean is None and not row.source:
            own = next((bound.accuracy for bound in bounds if _experts(bound) >= _experts(row)), None)
            row.normalized_mean = make_row(row.method, row.accuracy, own, unseen=row.unseen).normalized_mean
    if out:
        write_table(Path(out), rows)
        save_picture(Path(out) / "accuracy.png", lambda: accuracy_bars(rows))
        console.print(f"The table is in {out}.")
    print_table(rows, "top-1 accuracy, %")
    return 0


def _rows(folder: Path) -> list[ResultRow]:
    """Read the rows of a run, or of a table.

    Raises:
        InputError: There are none.
    """
    single, several = folder / "result.json", folder / "results.json"
    try:
        if several.exists():
            return [ResultRow(**row) for row in json.loads(several.read_text(encoding="utf-8"))["rows"]]
        return [read_row(single)]
    except FileNotFoundError as error:
        raise InputError(
            f"{folder} holds neither result.json nor results.json.",
            "Give folders of finished runs: adamerge table runs/a runs/b",
        ) from error
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise InputError(f"{folder} holds no table of adamerge: {type(error).__name__} {error}.") from error


def _compared(found: list[tuple[str, ResultRow]], *, mixed: bool) -> Iterator[ResultRow]:
    """Give the rows, each compared with the first that was computed here.

    Raises:
        InputError: A row is of other tasks, test images or another base, and ``mixed`` is false.
    """
    first = next(((f, row) for f, row in found if not row.source), None)
    families = {json.dumps(row.details, sort_keys=True) for _, row in found if row.source}
    for folder, row in found:
        problem = _difference(first[1], row) if first and not row.source else ""
        if row.source and len(families) > 1:
            problem = "published for several benchmarks, backbones or families of checkpoints"
        if problem and not mixed:
            origin = f" (compared with {first[0]})" if first else ""
            raise InputError(
                f"{folder}, {row.label}: {problem}{origin}.", "To join them all the same: --mixed"
            )
        yield replace(row, notes=[*row.notes, problem]) if problem else row


def _difference(first: ResultRow, row: ResultRow) -> str:
    """Tell why two rows do not belong into one table, if they do not."""
    others = set(first.accuracy) ^ set(row.accuracy)
    if others - set(first.unseen) - set(row.unseen):
        return f"other tasks: {shortlist(sorted(others))}"
    for task in row.accuracy:
        ours, theirs = (r.provenance.get("data", {}).get(f"{task} test") for r in (first, row))
        if task in first.accuracy and (ours is None or ours != theirs):
            return f"other test images of {task!r}"
    bases = {row.provenance.get("weights", {}).get("base") for row in (first, row)}
    return "" if len(bases) == 1 else "another base"


def _experts(row: ResultRow) -> set[tuple[str, str | None]]:
    """Give the tasks and digests of the experts that a row's accuracies are of."""
    weights = row.provenance.get("weights", {})
    return {(task, weights.get(task)) for task in row.accuracy if task not in row.unseen}


def _distinct(rows: list[ResultRow]) -> list[ResultRow]:
    """Drop rows that come twice, and number different ones of the same name."""
    kept: dict[str, ResultRow] = {}
    for row in rows:
        same = [
            other for other in kept.values() if (other.source, other.accuracy) == (row.source, row.accuracy)
        ]
        if any(other.method.partition(" #")[0] == row.method for other in same):
            continue
        count = sum(name.partition(" #")[0] == row.label for name in kept)
        named = replace(row, method=f"{row.method} #{count + 1}") if count else row
        kept[named.label] = named
    return list(kept.values())
