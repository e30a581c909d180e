"""TIES-Merging: trim, elect sign, disjoint merge."""

from collections.abc import Callable, Iterator
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from adamerge.errors import InputError
from adamerge.static.primitives import (
    Stack,
    keep_at_least,
    kept_count,
    largest_magnitude,
    total_size,
)
from adamerge.static.registry import static_method, task_vector_edit
from adamerge.vectors.store import Stacks

Aggregate = Literal["sum", "mean", "max"]
_TITLE, _SOURCE = "TIES-Merging", "arXiv:2306.01708"


@task_vector_edit(title=f"{_TITLE}: trim and elect", source=_SOURCE, scope="model")
def ties_trim(stacks: Stacks, *, density: float = 0.2) -> Iterator[Stack]:
    """Trim every task vector and drop the entries that disagree with the elected sign.

    The vectors stay separate: this is the pre-processing of AdaMerging++ (arXiv:2310.02575).

    Args:
        stacks: fp32 task vectors of the whole model.
        density: Fraction of entries kept per task, by magnitude over the whole model; entries equal to
            the threshold are all kept.

    Yields:
        Parameter name and edited ``[task, *param]`` stack.

    Raises:
        InputError: ``density`` is outside (0, 1].
    """
    threshold = _threshold(stacks, density)
    majority = sum(_sign_sum(stack) for _, stack in keep_at_least(stacks, threshold))
    majority = torch.as_tensor(majority).sign().float()
    for name, stack in keep_at_least(stacks, threshold):
        elected = stack.sum(0).sign()
        elected = torch.where(elected == 0, majority, elected)
        yield name, stack * (stack.sign() == elected)


@static_method(title=_TITLE, source=_SOURCE, scope="model")
def ties(
    stacks: Stacks, *, density: float = 0.2, aggregate: Aggregate = "sum", scale: float = 0.3
) -> Iterator[Stack]:
    """Merge the trimmed entries that agree with the elected sign.

    Args:
        stacks: fp32 task vectors of the whole model.
        density: Fraction of entries kept per task, by magnitude over the whole model.
        aggregate: How agreeing entries are joined: "sum" (with scale 0.3: the CLIP tables), "mean" of
            the non-zero ones (with scale 1: the paper's default), or "max" (the largest magnitude).
        scale: Coefficient of the merged task vector.

    Yields:
        Parameter name and merged ``[*param]`` task vector.

    Raises:
        InputError: An option is out of its range.
    """
    if aggregate not in _AGGREGATES:
        raise InputError(f"aggregate={aggregate!r} is unknown.", "Use 'sum', 'mean' or 'max'.")
    for name, stack in ties_trim(stacks, density=density):
        yield name, scale * _AGGREGATES[aggregate](stack)


def _threshold(stacks: Stacks, density: float) -> Float[Tensor, " task"]:
    """Give each task's smallest kept magnitude; infinity where not even one entry is kept."""
    if not 0 < density <= 1:
        hint = f"Did you mean {density / 100:g}?" if 1 < density <= 100 else "Use e.g. 0.2."
        raise InputError(f"density={density} is outside (0, 1].", hint)
    size = total_size(stacks)
    kept = kept_count(density, size)
    n_tasks = len(next(iter(stacks))[1])
    if kept == 0:
        return torch.full((n_tasks,), torch.inf)
    if kept == size:
        return torch.zeros(n_tasks)
    return largest_magnitude(stacks, kept + 1)  # the paper keeps all entries >= this one


def _sign_sum(stack: Float[Tensor, "task *param"]) -> Float[Tensor, ""]:
    return stack.sum(0).sign().sum(dtype=torch.float64)  # fp32 cannot count beyond 2^24


def _mean(stack: Float[Tensor, "task *param"]) -> Float[Tensor, "*param"]:
    return stack.sum(0) / (stack != 0).sum(0).clamp(min=1)


def _max(stack: Float[Tensor, "task *param"]) -> Float[Tensor, "*param"]:
    return stack.gather(0, stack.abs().argmax(0, keepdim=True))[0]


def _sum(stack: Float[Tensor, "task *param"]) -> Float[Tensor, "*param"]:
    return stack.sum(0)


_AGGREGATES: dict[str, Callable[[Tensor], Tensor]] = {"sum": _sum, "mean": _mean, "max": _max}
