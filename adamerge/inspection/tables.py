"""A report as tables and sentences: cut to what a terminal holds, or whole in Markdown."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from adamerge.errors import shortlist
from adamerge.inspection.geometry import Geometry, Ranks
from adamerge.inspection.report import Report
from adamerge.progress import print_columns, terminal

_LINES = 16  # what a terminal shows of a table
_REASONS = {
    "integer": "integers and booleans",
    "excluded": "excluded",
    "no expert": "no expert has a fitting one",
}


@dataclass(frozen=True)
class Table:
    """A header and its lines, as text; the first column names the lines.

    Attributes:
        title: What it shows.
        header: Names of the columns.
        lines: The cells.
    """

    title: str
    header: list[str]
    lines: list[list[str]]


def tables_of(report: Report) -> Iterator[Table]:
    """Give a report's tables: experts, tensors that differ, vectors, pairs, blocks."""
    yield _experts(report)
    if report.misfits:
        lines = [[m.tensor, m.role, m.verdict, m.base or "-", m.found or "-"] for m in report.misfits]
        yield Table("Tensors that differ", ["tensor", "of", "verdict", "base", "found"], lines)
    if report.vectors:
        yield _vectors(report, report.vectors)
        if len(report.tasks) > 1:
            yield _pairs(report.vectors)
        yield _blocks(report.vectors)


def sentences_of(report: Report) -> Iterator[str]:
    """Say in words what tables do not show: problems, notes, and what stays the base's."""
    if report.vectors and report.vectors.conflict.share is not None:
        conflict = report.vectors.conflict
        yield (
            f"signs differ at {_percent(conflict.share)} of the entries that several experts change "
            f"({_percent(conflict.weighted)} by magnitude)"
        )
    for reason, count in Counter(kept.reason for kept in report.kept).items():
        named = [f"{kept.tensor} {kept.found}" for kept in report.kept if kept.reason == reason]
        yield f"taken from the base, {_REASONS[reason]}: {count} tensors: {shortlist(named, 3)}"
    partial = [f"{name} ({', '.join(tasks)})" for name, tasks in report.partial.items()]
    if partial:
        yield f"only some experts have {len(partial)} tensors: {shortlist(partial, 3)}"
    if report.tied:
        yield f"tied: {shortlist((f'{alias} = {name}' for alias, name in report.tied.items()), 3)}"
    yield from (f"note: {note}" for note in report.notes)
    yield from (f"problem: {problem}" for problem in report.problems)
    yield "A merge would be refused." if report.problems else "A merge would be accepted."


def markdown(report: Report, pictures: Sequence[str] = ()) -> str:
    """Give the whole report in Markdown.

    Args:
        report: What was found.
        pictures: Names of the picture files beside it.
    """
    parts = ["# Base and experts before a merge\n", "".join(f"- {text}\n" for text in sentences_of(report))]
    for table in tables_of(report):
        ruler = ["---", *["---:"] * (len(table.header) - 1)]
        rows = [" | ".join(cell.replace("|", r"\|") for cell in row) for row in (table.header, *table.lines)]
        rows.insert(1, " | ".join(ruler))
        parts.append(f"## {table.title}\n\n" + "".join(f"| {row} |\n" for row in rows))
    parts += [f"![{name.removesuffix('.png')}]({name})\n" for name in pictures]
    return "\n".join(parts)


def show(report: Report) -> None:
    """Print the report to the terminal: of long tables the first lines, of wide ones every column."""
    for table in map(_cut, tables_of(report)):
        print_columns(table.header, table.lines, table.title)
    for text in sentences_of(report):
        terminal().print(text, markup=False, highlight=False, soft_wrap=True)


def _cut(table: Table) -> Table:
    """Return a table's first lines, and the number of the others."""
    lines = table.lines[:_LINES]
    if len(table.lines) > _LINES:
        lines = [*lines, [f"and {len(table.lines) - _LINES} more", *[""] * (len(table.header) - 1)]]
    return Table(table.title, table.header, lines)


def _experts(report: Report) -> Table:
    lines = []
    for role, facts in {"base": report.base, **report.experts}.items():
        differ = Counter(row.verdict for row in report.misfits if row.role == role)
        verdict = [f"{count} {kind}" for kind, count in differ.items()]
        verdict += [f"{n} non-finite" for n in [sum(r.role == role for r in report.nonfinite)] if n]
        verdict += ["equals the base"] if role in report.zero else []
        verdict += [f"equals {a if b == role else b}" for a, b in report.repeated if role in (a, b)]
        verdict += ["of another base"] if not report.same_base.get(role, True) else []
        ratio = report.vectors.relative_norm.get(role) if report.vectors else None
        dtypes = shortlist((f"{dtype} x{count}" for dtype, count in facts.dtypes.items()), 3)
        lines.append([role, str(facts.tensors), dtypes, _number(ratio), ", ".join(verdict) or "ok"])
    return Table("Base and experts", ["", "tensors", "dtypes", "|vector| / |base|", "verdict"], lines)


def _vectors(report: Report, found: Geometry) -> Table:
    lines = [
        [
            task,
            _number(found.norm[task]),
            _percent(found.density[task]),
            f"{found.unchanged[task]} of {found.tensors}",
            *_rank_cells(found.ranks, task),
            shortlist(f"{rank} x{count}" for rank, count in report.experts[task].lora_ranks.items()) or "-",
        ]
        for task in report.tasks
    ]
    header = ["expert", "norm", "non-zero", "unchanged tensors", "effective rank", "stable rank", "LoRA rank"]
    return Table("Task vectors (ranks: means over matrices)", header, lines)


def _pairs(found: Geometry) -> Table:
    tasks, cosine, conflict = list(found.norm), found.cosine, found.conflict.pairs
    lines = []
    for i, task in enumerate(tasks):
        below = ["-" if value is None else f"{value:.2f}" for value in cosine[i][:i]]
        lines.append([task, *below, "", *map(_percent, conflict[i][i + 1 :])])
    return Table("Pairs: cosine below the diagonal, opposite signs above it", ["", *tasks], lines)


def _blocks(found: Geometry) -> Table:
    lines = [
        [
            facts.block,
            _number(_mean(facts.ranks.effective) if facts.ranks else None),
            _number(_mean(facts.relative_norm)),
            *map(_number, facts.relative_norm.values()),
        ]
        for facts in found.blocks
    ]
    header = ["block", "effective rank", "mean", *found.norm]
    return Table("Blocks: mean effective rank; |vector| / |base|", header, lines)


def _rank_cells(ranks: Ranks | None, task: str) -> list[str]:
    return [_number(ranks.effective[task]), _number(ranks.stable[task])] if ranks else ["-", "-"]


def _mean(values: Mapping[str, float | None]) -> float | None:
    known = [value for value in values.values() if value is not None]
    return sum(known) / len(known) if known else None


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"
