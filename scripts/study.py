"""Runs methods on variants of a benchmark, over seeds, and writes one table: what does each case do to each?

    python scripts/study.py stress --benchmark embedded --methods adamerging_layer_wise --out runs/study
    python scripts/study.py fractions --benchmark FILE.yaml --methods NAME,FILE.yaml --seeds 0,1,2 --out DIR
    python scripts/study.py steps ...
    python scripts/study.py grid ...         # composes its own methods: see STARTS and OBJECTIVES

Cases are in `study_cases.py`. Everything that is made lies in --out; a run that was interrupted goes on where
it was. Static methods (average, ties, individual, ...) do not depend on the seed and are computed once.

The table has the cases of this call (--cases), and is written after each of them: the mean over seeds, and
its sample standard deviation, of the tasks' mean accuracy; and the same of its difference to the accuracy
under the run's own initial coefficients.
"""

import argparse
import csv
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING

import yaml
from study_cases import TABLES, Case, Source, steps_of

from adamerge.atomic import write_text
from adamerge.benchmarks import Benchmark, configs, method_name
from adamerge.benchmarks.opened import is_static
from adamerge.errors import AdamergeError
from adamerge.plots import save_picture
from adamerge.results import ResultRow, markdown

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass
class Found:
    """What one run came to.

    Attributes:
        case: The column.
        method: The row.
        seed: Of the images' order and whatever else is random; None of a static method.
        mean: Mean accuracy in percent over the tasks that have an expert; None where the method was refused.
        start: The same under the initial coefficients; None where nothing is learned.
        accuracy: By task.
        accuracy_at_start: By task.
        notes: What the run has to say; why it was refused.
    """

    case: str
    method: str
    seed: int | None
    mean: float | None = None
    start: float | None = None
    accuracy: dict[str, float] = field(default_factory=dict)
    accuracy_at_start: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def gain(self) -> float | None:
        """Points above the start."""
        return None if self.mean is None or self.start is None else self.mean - self.start


def run_case(case: Case, methods: Sequence[str], seeds: Sequence[int], steps: int, out: Path) -> list[Found]:
    """Run all methods of one case; those that refuse it are noted."""
    document, found = case.make(), []
    methods = case.methods or methods
    static = [name for name in methods if is_static(name)]
    learning = [name for name in methods if name not in static]
    for seed, names in [(None, static), *((seed, learning) for seed in seeds)]:
        folder = out / case.name / ("static" if seed is None else f"seed_{seed}")
        table = Benchmark(document, folder) if names else None
        for name in names:
            assert table is not None  # there are names
            options = [] if seed is None else options_of(name, case, seed, steps)
            found.append(run_one(table, Found(case.name, method_name(name), seed), name, options))
    return found


def run_one(table: Benchmark, found: Found, method: str, options: list[str]) -> Found:
    """Run one method, or read what an earlier run left."""
    try:
        (row,) = table.run([method], {method: options})
    except AdamergeError as error:
        print(f"{found.case}, {found.method}: refused: {error}")
        found.notes.append("refused: " + " ".join(str(error).split("\n")))
        return found
    start = {t: value for t, value in row.details.get("start", {}).items() if t not in row.unseen}
    found.mean, found.accuracy, found.notes = row.mean, row.accuracy, notes_of(row)
    found.start, found.accuracy_at_start = (mean(start.values()) if start else None), start
    return found


def options_of(method: str, case: Case, seed: int, steps: int) -> list[str]:
    """Give a run's further arguments."""
    options = ["--seed_everything", str(seed), *case.options]
    if own := steps_of(method):
        limit = max(1, round(case.factor * (steps or own)))
        options += ["--evaluate_start", "true", "--trainer.max_steps", str(limit)]
    return options


def notes_of(row: ResultRow) -> list[str]:
    """Give a row's remarks."""
    shared = [f"transductive: {', '.join(row.transductive)}"] if row.transductive else []
    return [*row.notes, *shared]


@dataclass(frozen=True)
class Cell:
    """A method in a case, over seeds; spreads are sample standard deviations, and None of a single run."""

    mean: float | None
    spread: float | None
    gain: float | None
    gain_spread: float | None


def cell_of(found: Sequence[Found], method: str, case: str) -> Cell:
    """Summarise the runs of one method in one case; a refusal leaves the cell empty."""
    ours = [each for each in found if (each.method, each.case) == (method, case)]
    return Cell(*summary([each.mean for each in ours]), *summary([each.gain for each in ours]))


def summary(values: Sequence[float | None]) -> tuple[float | None, float | None]:
    """Give mean and spread."""
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return None, None
    return mean(known), stdev(known) if len(known) > 1 else None


def write(found: Sequence[Found], out: Path, table: str, remarks: dict[str, str]) -> None:
    """Write TABLE.json (every run), .csv, .md and .png."""
    write_text(out / f"{table}.json", json.dumps([asdict(each) for each in found], indent=2) + "\n")
    stream = io.StringIO()
    csv.writer(stream, lineterminator="\n").writerows(csv_lines(found))
    write_text(out / f"{table}.csv", stream.getvalue())
    told = [f"- {case}: {remark}" for case, remark in remarks.items()]
    told += [
        f"- {each.case}, {each.method}, seed {each.seed}: {note}" for each in found for note in each.notes
    ]
    parts = [markdown(list(markdown_lines(found))), *(["\n".join(told) + "\n"] if told else [])]
    write_text(out / f"{table}.md", "\n".join(parts))
    draw = heat_map if table == "grid" else gains
    save_picture(out / f"{table}.png", lambda: draw(found))


def csv_lines(found: Sequence[Found]) -> Iterator[list[str]]:
    """Give a row per method and four columns per case; then the mean over cases, and the worst gain."""
    methods, cases = names(found)
    parts = ("", " sd", " minus start", " minus start sd")
    yield ["method", *(case + part for case in cases for part in parts), *_SUMMARY]
    for method in methods:
        cells = [cell_of(found, method, case) for case in cases]
        values = [value for c in cells for value in (c.mean, c.spread, c.gain, c.gain_spread)]
        yield [method, *("" if v is None else f"{v:.3f}" for v in [*values, *over_cases(cells)])]


def markdown_lines(found: Sequence[Found]) -> Iterator[list[str]]:
    """Give a row per method and a column per case: mean ± spread (points above the start)."""
    methods, cases = names(found)
    yield ["method", *cases, *_SUMMARY]
    for method in methods:
        cells = [cell_of(found, method, case) for case in cases]
        average, worst = over_cases(cells)
        ends = ["-" if average is None else f"{average:.1f}", "-" if worst is None else f"{worst:+.1f}"]
        yield [method, *map(text_of, cells), *ends]


_SUMMARY = ("mean over cases", "worst minus start")


def over_cases(cells: Sequence[Cell]) -> tuple[float | None, float | None]:
    """Give a method's mean over all cases, if it has one in each, and its smallest gain."""
    gains = [cell.gain for cell in cells if cell.gain is not None]
    return summary([cell.mean for cell in cells])[0], min(gains, default=None)


def text_of(cell: Cell) -> str:
    """Write a cell as people read it."""
    if cell.mean is None:
        return "-"
    spread = "" if cell.spread is None else f" ± {cell.spread:.1f}"
    return f"{cell.mean:.1f}{spread}" + ("" if cell.gain is None else f" ({cell.gain:+.1f})")


def names(found: Sequence[Found]) -> tuple[list[str], list[str]]:
    """Give rows and columns, in the order of the runs."""
    return list(dict.fromkeys(e.method for e in found)), list(dict.fromkeys(e.case for e in found))


def heat_map(found: Sequence[Found]) -> "Figure":
    """Draw and write the mean accuracy of every method in every case."""
    from matplotlib.figure import Figure

    methods, cases = names(found)
    values = [[cell_of(found, method, case).mean or float("nan") for case in cases] for method in methods]
    figure = Figure(figsize=(2.5 + 0.7 * len(cases), 1 + 0.25 * len(methods)))
    axes = figure.add_subplot()
    share_of = axes.imshow(values, aspect="auto", cmap="viridis").norm
    axes.set_xticks(range(len(cases)), cases)
    axes.set_yticks(range(len(methods)), methods, fontsize=8)
    for y, row in enumerate(values):
        for x, value in enumerate(row):
            colour = "black" if share_of(value) > 0.6 else "white"
            axes.text(x, y, f"{value:.1f}", ha="center", va="center", fontsize=7, color=colour)
    axes.set_title("mean accuracy, %", fontsize=9)
    return figure


def gains(found: Sequence[Found]) -> "Figure":
    """Draw the points above the start of methods that learn, by case; bars are the spread over seeds."""
    from matplotlib.figure import Figure

    methods, cases = names([each for each in found if each.gain is not None])
    figure = Figure(figsize=(2.5 + 0.9 * len(cases), 4.5))
    axes = figure.add_subplot()
    axes.axhline(0, color="grey", linewidth=0.8)
    for place, method in enumerate(methods):
        cells = [cell_of(found, method, case) for case in cases]
        drawn = [(x, c.gain, c.gain_spread or 0.0) for x, c in enumerate(cells) if c.gain is not None]
        if drawn:
            places, gains, spreads = zip(*drawn, strict=True)
            places = [x + 0.5 * (place + 0.5) / len(methods) - 0.25 for x in places]
            axes.errorbar(places, gains, spreads, fmt="o", markersize=4, capsize=2, label=method)
    axes.set_xticks(range(len(cases)), cases, rotation=30, ha="right")
    axes.set_ylabel("mean accuracy minus the start's, points")
    if axes.containers:
        axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def benchmark_of(name: str) -> dict:
    """Read a benchmark: a YAML file, or the name of a shipped one."""
    file = Path(name) if name.endswith(".yaml") else configs() / "benchmarks" / f"{name}.yaml"
    return yaml.safe_load(file.read_text(encoding="utf-8"))


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("--benchmark", default="embedded", help="embedded, or a benchmark's YAML file")
    parser.add_argument("--methods", default="adamerging_layer_wise", help="names or YAML files, with commas")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--out", type=Path, required=True, help="a folder per benchmark")
    parser.add_argument("--steps", type=int, default=0, help="of methods that learn; default: their files'")
    parser.add_argument("--cases", default="", help="some of the table's cases, with commas; default: all")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a table's cases one after another; what is known so far is written after each."""
    options = parsed(arguments)
    out = options.out.resolve()
    source = Source(benchmark_of(options.benchmark), out / options.table / "made")
    cases = list(TABLES[options.table](source))
    chosen = options.cases.split(",") if options.cases else [case.name for case in cases]
    if unknown := set(chosen) - {case.name for case in cases}:
        raise SystemExit(f"no cases {sorted(unknown)}; there are {[case.name for case in cases]}")
    source.benchmark.pass_gate()
    methods, seeds = options.methods.split(","), [int(seed) for seed in options.seeds.split(",")]
    found: list[Found] = []
    for case in (case for case in cases if case.name in chosen):
        found += run_case(case, methods, seeds, options.steps, out / options.table)
        write(found, out, options.table, source.notes)
    print((out / f"{options.table}.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    try:
        main()
    except AdamergeError as error:
        raise SystemExit(str(error)) from error
