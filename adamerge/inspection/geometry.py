"""What a person wants to see of task vectors: norms, angles, conflicts of sign, ranks, by task and block."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from adamerge.coefficients.grouping import group_of
from adamerge.inspection.measures import Measured, Sums

ByTask = dict[str, float | None]
Matrix = list[list[float | None]]


@dataclass(frozen=True)
class Ranks:
    """Ranks by task: of one matrix, or means over those that a task changed (None: it changed none).

    Attributes:
        effective: exp(entropy) of the singular values over their sum (0: a zero matrix).
        stable: Squared Frobenius norm over squared spectral norm.
    """

    effective: ByTask
    stable: ByTask


@dataclass(frozen=True)
class Conflict:
    """Where non-zero entries of the vectors differ in sign; a share of nothing is None.

    Attributes:
        share: Among the entries where at least two vectors are not zero, the share where not all agree.
        weighted: The same with every entry counted by its magnitude, the sum over tasks of |v|.
        pairs: For each pair of tasks, the share of opposite signs where both are not zero.
        weighted_pairs: The same with every entry counted as |v_a v_b|.
    """

    share: float | None
    weighted: float | None
    pairs: Matrix
    weighted_pairs: Matrix


@dataclass(frozen=True)
class BlockFacts:
    """The vectors of one transformer block, or of one module outside.

    Attributes:
        block: Its name.
        tensors: Number of tensors.
        entries: Number of entries.
        norm: Norm of each task's vector.
        relative_norm: The same over the norm of the base there.
        ranks: Means over its matrices; None where it has none, or none were measured.
    """

    block: str
    tensors: int
    entries: int
    norm: ByTask
    relative_norm: ByTask
    ranks: Ranks | None


@dataclass(frozen=True)
class MatrixFacts:
    """One matrix, and the ranks of the vectors there."""

    tensor: str
    shape: tuple[int, ...]
    ranks: Ranks


@dataclass(frozen=True)
class Geometry:
    """The task vectors as a whole, and block by block.

    Attributes:
        tensors: Number of tensors that were compared.
        entries: Number of their entries.
        norm: Norm of each task's vector.
        relative_norm: The same over the norm of the base.
        density: Share of entries that are not zero, by task.
        unchanged: Number of tensors where a task's vector is zero, or where it has no tensor that fits.
        cosine: Cosine of every pair of tasks; None beside a zero vector.
        conflict: Conflicts of sign.
        ranks: Means over all matrices; None where none were measured.
        blocks: Block by block, in natural order of names.
        matrices: Matrix by matrix; empty where no ranks were measured.
    """

    tensors: int
    entries: int
    norm: ByTask
    relative_norm: ByTask
    density: ByTask
    unchanged: dict[str, int]
    cosine: Matrix
    conflict: Conflict
    ranks: Ranks | None
    blocks: tuple[BlockFacts, ...]
    matrices: tuple[MatrixFacts, ...]


def geometry(
    tasks: Sequence[str],
    shapes: Mapping[str, tuple[int, ...]],
    measured: Mapping[str, Measured],
    base_norms: Mapping[str, float],
) -> Geometry:
    """Put together what was measured parameter by parameter.

    Args:
        tasks: Task names.
        shapes: Shape of each parameter.
        measured: What each one's vectors gave; at least one.
        base_norms: Norm of each base tensor.
    """
    sums = _total(measured.values())
    entries = sum(math.prod(shapes[name]) for name in measured)
    share, weighted = _plain(sums.conflict())
    present = torch.stack([m.sums.overlaps.diagonal() for m in measured.values()])
    labels, index = group_of(list(measured), "block")
    groups = [[n for n, i in zip(measured, index, strict=True) if i == g] for g in range(len(labels))]
    blocks = [
        _block(label, tasks, shapes, {n: measured[n] for n in group}, base_norms)
        for label, group in zip(labels, groups, strict=True)
    ]
    return Geometry(
        tensors=len(measured),
        entries=entries,
        norm=_by_task(tasks, sums.norms()),
        relative_norm=_by_task(tasks, sums.norms() / _length(measured, base_norms)),
        density=_by_task(tasks, sums.overlaps.diagonal() / entries),
        unchanged=dict(zip(tasks, (present == 0).sum(0).tolist(), strict=True)),
        cosine=_plain(sums.cosines()),
        conflict=Conflict(share, weighted, _plain(sums.conflicts()), _plain(sums.weighted_conflicts())),
        ranks=_mean_ranks(tasks, measured.values()),
        blocks=tuple(sorted(blocks, key=lambda facts: _natural(facts.block))),
        matrices=tuple(
            MatrixFacts(name, shapes[name], _ranks(tasks, m.ranks))
            for name, m in measured.items()
            if m.ranks is not None
        ),
    )


def _block(
    label: str,
    tasks: Sequence[str],
    shapes: Mapping[str, tuple[int, ...]],
    measured: Mapping[str, Measured],
    base_norms: Mapping[str, float],
) -> BlockFacts:
    norms = _total(measured.values()).norms()
    return BlockFacts(
        block=label,
        tensors=len(measured),
        entries=sum(math.prod(shapes[name]) for name in measured),
        norm=_by_task(tasks, norms),
        relative_norm=_by_task(tasks, norms / _length(measured, base_norms)),
        ranks=_mean_ranks(tasks, measured.values()),
    )


def _total(measured: Iterable[Measured]) -> Sums:
    return reduce(Sums.plus, (m.sums for m in measured))


def _length(names: Iterable[str], norms: Mapping[str, float]) -> float:
    """Give the norm of several tensors together."""
    return math.hypot(*(norms[name] for name in names))


def _mean_ranks(tasks: Sequence[str], measured: Iterable[Measured]) -> Ranks | None:
    found = [m.ranks for m in measured if m.ranks is not None]
    if not found:
        return None
    ranks = torch.stack(found)
    return _ranks(tasks, ranks.where(ranks > 0, torch.nan).nanmean(0))


def _ranks(tasks: Sequence[str], ranks: Float[Tensor, "2 task"]) -> Ranks:
    return Ranks(*(_by_task(tasks, row) for row in ranks))


def _by_task(tasks: Sequence[str], values: Float[Tensor, " task"]) -> ByTask:
    return dict(zip(tasks, _plain(values), strict=True))


def _plain(values: Tensor) -> list[Any]:
    """Give nested lists in which None stands for what is not defined."""
    if values.dim() > 1:
        return [_plain(row) for row in values]
    return [value if math.isfinite(value) else None for value in values.tolist()]


def _natural(name: str) -> list[str | int]:
    """Give a key that sorts block 2 before block 10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]
