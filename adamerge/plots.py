"""Pictures of what was learned; matplotlib is imported only here, and only when a picture is made."""

import csv
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxtyping import Float
from torch import Tensor

from adamerge.atomic import atomic_file
from adamerge.errors import EnvironmentProblem
from adamerge.results import ResultRow

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def heat_map(tasks: Sequence[str], groups: Sequence[str], values: Float[Tensor, "task group"]) -> "Figure":
    """Draw coefficients, task by group; white is 0, red pulls towards the expert, blue away."""
    limit = max(float(values.abs().quantile(0.98)), 1e-6)  # a few that ran away must not pale the rest
    figure = _map(tasks, groups, values, "merging coefficient", cmap="RdBu_r", vmin=-limit, vmax=limit)
    figure.colorbar(figure.axes[0].images[0], ax=figure.axes[0], extend="both")
    return figure


def block_map(
    tasks: Sequence[str], blocks: Sequence[str], values: Float[Tensor, "task block"], title: str
) -> "Figure":
    """Draw values that are not negative, task by block; where one is NaN, nothing is drawn."""
    figure = _map(tasks, blocks, values, title, cmap="viridis", vmin=0)
    figure.colorbar(figure.axes[0].images[0], ax=figure.axes[0])
    return figure


def pair_map(
    tasks: Sequence[str], values: Float[Tensor, "task task"], title: str, *, signed: bool = False
) -> "Figure":
    """Draw values between 0 and 1 (between -1 and 1 if `signed`) for all pairs of tasks, and write them."""
    colours = {"cmap": "RdBu_r", "vmin": -1} if signed else {"cmap": "Reds", "vmin": 0}
    figure = _map(tasks, tasks, values, title, cell=0.5, vmax=1, **colours)
    for i, row in enumerate(values.tolist()):
        for j, value in enumerate(row):
            colour = "white" if abs(value) > 0.6 else "black"
            text = "-" if math.isnan(value) else f"{value:.2f}"
            figure.axes[0].text(j, i, text, ha="center", va="center", fontsize=7, color=colour)
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


def _map(
    tasks: Sequence[str], groups: Sequence[str], values: Tensor, title: str, cell: float = 0.17, **image: Any
) -> "Figure":
    figure = _figure(width=max(4.0, 1.6 + cell * len(groups)), height=1.6 + 0.32 * len(tasks))
    axes = figure.add_subplot()
    axes.imshow(values.numpy(), aspect="auto", **image)
    axes.set_yticks(range(len(tasks)), list(tasks))
    axes.set_xticks(range(len(groups)), _short(groups), rotation=90, fontsize=6)
    axes.set_title(title)
    return figure


def require_matplotlib() -> None:
    """Check that pictures can be drawn, before long work that ends in one.

    Raises:
        EnvironmentProblem: matplotlib is not installed.
    """
    _figure(width=1.0, height=1.0)


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
