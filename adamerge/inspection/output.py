"""A report as a folder: JSON, Markdown and pictures."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from adamerge.atomic import atomic_folder
from adamerge.inspection.geometry import Geometry
from adamerge.inspection.report import Report
from adamerge.inspection.tables import markdown
from adamerge.plots import block_map, pair_map, save_picture

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def write(report: Report, target: Path, *, overwrite: bool = False) -> None:
    """Write ``inspect.json``, ``inspect.md`` and pictures to a folder that appears whole or not at all.

    Raises:
        InputError: The folder exists and ``overwrite`` is false.
        EnvironmentProblem: matplotlib is not installed, or the folder cannot be written.
    """
    pictures = pictures_of(report.vectors) if report.vectors else {}
    with atomic_folder(target, overwrite=overwrite) as folder:
        (folder / "inspect.json").write_text(report.document(), encoding="utf-8")
        (folder / "inspect.md").write_text(markdown(report, list(pictures)), encoding="utf-8")
        for name, draw in pictures.items():
            save_picture(folder / name, draw)


def pictures_of(found: Geometry) -> dict[str, Callable[[], "Figure"]]:
    """Give what draws each picture, by file name."""
    tasks, blocks = list(found.norm), [facts.block for facts in found.blocks]
    norms = _tensor([list(facts.relative_norm.values()) for facts in found.blocks]).T
    pictures = {
        "norms.png": partial(block_map, tasks, blocks, norms, "norm of vector / norm of base"),
        "cosine.png": partial(pair_map, tasks, _tensor(found.cosine), "cosine", signed=True),
        "sign_conflict.png": partial(
            pair_map, tasks, _tensor(found.conflict.pairs), "share of opposite signs"
        ),
    }
    ranked = [facts for facts in found.blocks if facts.ranks]
    if ranked:
        ranks = _tensor([list(f.ranks.effective.values()) for f in ranked if f.ranks]).T
        names = [facts.block for facts in ranked]
        pictures["effective_rank.png"] = partial(block_map, tasks, names, ranks, "mean effective rank")
    return pictures


def _tensor(values: list[Any]) -> Tensor:
    """Give nested lists as a tensor, NaN where nothing is defined."""
    return torch.tensor([[torch.nan if v is None else v for v in row] for row in values])
