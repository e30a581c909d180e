"""ComPEFT: task vectors of three values, as an edit, and the merges of such vectors."""

import math
from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from adamerge.errors import InputError
from adamerge.static.primitives.selection import (
    kept_count,
    largest_magnitude,
    require_fraction,
    total_size,
)
from adamerge.static.primitives.signs import Aggregate, aggregate_by, agreeing, majority_sign
from adamerge.static.registry import static_method, task_vector_edit
from adamerge.vectors import Stacks

Value = Literal["std", "mean"]
Merger = Literal["linear", "ties"]
_TITLE = "ComPEFT: compression by sparsification and ternary quantisation"
_SOURCE = "arXiv:2311.13171"
_PART = 2**16  # entries that are widened to fp64 at a time


@task_vector_edit(name="compeft", title=_TITLE, source=_SOURCE, scope="model")
def ternarise(
    stacks: Stacks, *, density: float = 0.2, alpha: float = 1.0, value: Value = "std"
) -> Callable[[Tensor], Tensor]:
    """Keep every task's largest entries, all with one magnitude: -v, 0 or +v.

    Args:
        stacks: fp32 task vectors of the whole model.
        density: Fraction of entries kept per task, by magnitude over the whole model; entries that equal
            the smallest kept one are all kept. 1 leaves the vectors as they are.
        alpha: Factor of v, to be chosen on validation data (the paper's grid is about 0.5 to 10).
        value: What v is alpha times of: "std", the standard deviation of all of the task's entries (the
            population's; the paper), or "mean", the mean magnitude of those kept (the smallest error).

    Returns:
        The edit of ``[task, *any]`` vectors.

    Raises:
        InputError: An option is out of its range.
    """
    require_fraction("density", density)
    if not 0 < alpha < math.inf:
        raise InputError(f"alpha={alpha} is no positive number.", "Use e.g. 1.0.")
    if value not in ("std", "mean"):
        raise InputError(f"value={value!r} is unknown.", "Use 'std' or 'mean'.")
    if density == 1:
        return lambda stack: stack
    kept = kept_count(density, total_size(stacks))
    threshold = largest_magnitude(stacks, kept) if kept else torch.full((stacks.n_tasks,), torch.inf)
    size = alpha * (_deviation(stacks) if value == "std" else _mean_kept(stacks, threshold))
    if not size.float().isfinite().all():
        raise InputError(f"alpha={alpha} makes values that fp32 cannot hold.", "Use e.g. 1.0.")
    return lambda stack: _ternary(stack, threshold, size.float())


@static_method(title=_TITLE, source=_SOURCE, scope="model")
def compeft(
    stacks: Stacks,
    *,
    density: float = 0.2,
    alpha: float = 1.0,
    value: Value = "std",
    merger: Merger = "linear",
    aggregate: Aggregate = "sum",
    scale: float = 0.3,
) -> Callable[[Tensor], Tensor]:
    """Merge ternary task vectors, by task arithmetic or by the election and disjoint merge of TIES.

    TIES would trim nothing more: entries that are not 0 are as large as one another.

    Args:
        stacks: fp32 task vectors of the whole model.
        density: Fraction of entries kept per task, by magnitude over the whole model; 1 leaves the
            vectors as they are.
        alpha: Factor of the kept entries' value.
        value: What alpha is a factor of: "std" of all of a task's entries, or "mean" magnitude of the kept.
        merger: "linear" (task arithmetic) or "ties" (arXiv:2306.01708).
        aggregate: How "ties" joins agreeing entries: "sum", "mean" or "max".
        scale: Coefficient of the merged task vector.

    Returns:
        The merge of ``[task, *any]`` vectors.

    Raises:
        InputError: An option is out of its range.
    """
    if merger not in ("linear", "ties"):
        raise InputError(f"merger={merger!r} is unknown.", "Use 'linear' or 'ties'.")
    join = aggregate_by(aggregate)
    edit = ternarise(stacks, density=density, alpha=alpha, value=value)
    if merger == "linear":
        return lambda stack: scale * edit(stack).sum(0)
    majority = majority_sign(stacks.map(lambda _, piece: edit(piece), entrywise=True))
    return lambda stack: scale * join(agreeing(edit(stack), majority))


def _ternary(
    stack: Float[Tensor, "task *any"], threshold: Float[Tensor, " task"], size: Float[Tensor, " task"]
) -> Float[Tensor, "task *any"]:
    limit, value = (row.reshape(-1, *[1] * (stack.dim() - 1)) for row in (threshold, size))
    return torch.where(stack.abs() >= limit, stack.sign() * value, 0)


def _deviation(stacks: Stacks) -> Float[Tensor, " task"]:
    """Give every task's standard deviation over the whole model, in fp64."""
    total, squares = torch.zeros(2, stacks.n_tasks, dtype=torch.float64)
    for _, piece in stacks.pieces():
        for part in piece.split(_PART, dim=1):
            wide = part.double()
            total += wide.sum(1)
            squares += wide.square().sum(1)
    count = max(total_size(stacks), 1)
    return (squares / count - (total / count).square()).clamp(min=0).sqrt()


def _mean_kept(stacks: Stacks, threshold: Float[Tensor, " task"]) -> Float[Tensor, " task"]:
    """Give the mean magnitude of every task's entries that are kept and not 0, in fp64."""
    total, count = torch.zeros(2, stacks.n_tasks, dtype=torch.float64)
    for _, piece in stacks.pieces():
        for part in piece.split(_PART, dim=1):
            magnitude = part.abs()
            kept = (magnitude >= threshold[:, None]) & (magnitude > 0)
            total += (magnitude * kept).sum(1)
            count += kept.sum(1)
    return total / count.clamp(min=1)
