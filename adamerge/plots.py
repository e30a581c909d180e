"""Pictures of what was learned; matplotlib is imported only here, and only when a picture is made."""

import csv
import io
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from adamerge.atomic import atomic_file, write_text
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
    _write_values(figure, values)
    return figure


def routing_map(
    tasks: Sequence[str],
    experts: Sequence[str],
    values: Float[Tensor, "task expert"],
    entropies: Sequence[float],
) -> "Figure":
    """Draw and write mean routing weights, task by expert, and beside them the mean entropy of an image's."""
    limit = max(1.0, float(values.abs().max()))
    colours = {"cmap": "RdBu_r", "vmin": -limit} if values.min() < 0 else {"cmap": "Reds", "vmin": 0}
    figure = _map(tasks, experts, values, "mean routing weight", cell=0.5, vmax=limit, **colours)
    _write_values(figure, values, limit)
    bars = figure.axes[0].inset_axes((1.04, 0, 0.4, 1), sharey=figure.axes[0])
    bars.barh(range(len(tasks)), entropies, color="#9ecae1")
    bars.tick_params(labelleft=False)
    bars.set_xlim(0, 1)
    bars.set_title("entropy / log T")
    return figure


def write_routing(
    folder: Path,
    experts: Sequence[str],
    routing: Mapping[str, Sequence[float]],
    entropies: Mapping[str, float],
) -> None:
    """Write ``routing.csv`` and ``routing.png``.

    Args:
        folder: Where to.
        experts: Their names.
        routing: Mean routing weight of each expert, by task.
        entropies: Mean entropy of an image's routing weights, in units of log T, by task.
    """
    values, spread = torch.tensor(list(routing.values())), [entropies[task] for task in routing]
    rows = zip(routing, values.tolist(), spread, strict=True)
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["task", *experts, "entropy"])
    writer.writerows([task, *map(repr, row), repr(entropy)] for task, row, entropy in rows)
    write_text(folder / "routing.csv", stream.getvalue())
    save_picture(folder / "routing.png", lambda: routing_map(list(routing), experts, values, spread))


def bytes_curve(rows: Sequence[ResultRow]) -> "Figure":
    """Draw the mean accuracy of every row that tells its stored bytes against their sum."""
    points = [
        (sum(part["n_bytes"] for part in row.details["stored"].values()) / 2**20, row.mean, row.method)
        for row in rows
        if row.details.get("stored") and row.mean is not None
    ]
    figure = _figure(width=7.0, height=4.0)
    axes = figure.add_subplot()
    for size, mean, method in sorted(points):
        axes.plot(size, mean, "o", color="#3182bd")
        axes.annotate(method, (size, mean), (4, 4), textcoords="offset points", fontsize=7)
    axes.set_xlim(left=0)
    axes.set_xlabel("stored, MiB (shared model, experts, router, heads)")
    axes.set_ylabel("mean top-1 accuracy, %")
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
    axes.set_yticks(places, [row.label for row in rows])
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


def _write_values(figure: "Figure", values: Tensor, limit: float = 1.0) -> None:
    """Write a map's values into its cells, white on what is dark."""
    for i, row in enumerate(values.tolist()):
        for j, value in enumerate(row):
            colour = "white" if abs(value) > 0.6 * limit else "black"
            text = "-" if math.isnan(value) else f"{value:.2f}"
            figure.axes[0].text(j, i, text, ha="center", va="center", fontsize=7, color=colour)


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
            "pictures need matplotlib, which is not installed.", "pip install matplotlib"
        ) from error
    return Figure(figsize=(width, height))


def _colours(count: int) -> list[tuple[float, ...]]:
    from matplotlib import colormaps

    return [colormaps["tab20"](i / max(count - 1, 1)) for i in range(count)]


def _short(groups: Sequence[str]) -> list[str]:
    return [g.replace("visual.", "").replace("transformer.resblocks.", "block ") for g in groups]
