"""Pictures of what was learned; matplotlib is imported only here, and only when a picture is made."""

import csv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jaxtyping import Float
from torch import Tensor

from adamerge.atomic import atomic_file
from adamerge.errors import EnvironmentProblem
from adamerge.results import ResultRow

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def heat_map(tasks: Sequence[str], groups: Sequence[str], values: Float[Tensor, "task group"]) -> "Figure":
    """Draw coefficients, task by group; white is 0, red pulls towards the expert, blue away."""
    figure = _figure(width=max(4.0, 1.6 + 0.17 * len(groups)), height=1.6 + 0.32 * len(tasks))
    axes = figure.add_subplot()
    limit = max(float(values.abs().quantile(0.98)), 1e-6)  # a few that ran away must not pale the rest
    image = axes.imshow(values.numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto")
    axes.set_yticks(range(len(tasks)), list(tasks))
    axes.set_xticks(range(len(groups)), _short(groups), rotation=90, fontsize=6)
    axes.set_title("merging coefficient")
    figure.colorbar(image, ax=axes, extend="both")
    return figure


def accuracy_bars(rows: Sequence[ResultRow]) -> "Figure":
    """Draw the mean accuracy of every method, with one dot per task."""
    rows = [row for row in rows if row.mean is not None]
    figure = _figure(width=8.0, height=1.2 + 0.36 * len(rows))
    axes = figure.add_subplot()
    places = range(len(rows))
    axes.barh(places, [row.mean or 0.0 for row in rows], color="#9ecae1")
    tasks = list(dict.fromkeys(t for row in rows for t in row.accuracy))
    colours = _colours(len(tasks))
    for task, colour in zip(tasks, colours, strict=True):
        points = [row.accuracy.get(task, float("nan")) for row in rows]
        axes.plot(points, places, "o", color=colour, markersize=4, label=task)
    for place, row in zip(places, rows, strict=True):
        axes.text(1, place, f"{row.mean:.1f}", va="center", fontsize=8)
    axes.set_yticks(places, [row.method for row in rows])
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("top-1 accuracy, % (bar: mean; dots: tasks)")
    if tasks:
        axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def learning_curves(path: Path) -> "Figure":
    """Draw the loss of every task from a run's ``curves.csv``."""
    figure = _figure(width=7.0, height=4.0)
    axes = figure.add_subplot()
    with path.open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    columns = [name for name in (rows[0] if rows else {}) if name != "step"]
    for name, colour in zip(columns, _colours(len(columns)), strict=True):
        points = [(int(row["step"]), float(row[name])) for row in rows if row[name]]
        axes.plot(*zip(*points, strict=True), color=colour, label=name, linewidth=1)
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    if axes.lines:
        axes.legend(fontsize=7)
    return figure


def save_picture(path: Path, draw: Callable[[], "Figure"]) -> None:
    """Draw and write a PNG atomically.

    Raises:
        EnvironmentProblem: matplotlib is not installed.
    """
    with atomic_file(path) as file:
        draw().savefig(file, format="png", dpi=120, bbox_inches="tight")


def _figure(width: float, height: float) -> "Figure":
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise EnvironmentProblem(
            "pictures need matplotlib, which is not installed.", "pip install 'adamerge[plot]'"
        ) from error
    return Figure(figsize=(width, height))


def _colours(count: int) -> list[tuple[float, ...]]:
    from matplotlib import colormaps

    return [colormaps["tab20"](i / max(count - 1, 1)) for i in range(count)]


def _short(groups: Sequence[str]) -> list[str]:
    return [g.replace("visual.", "").replace("transformer.resblocks.", "block ") for g in groups]
