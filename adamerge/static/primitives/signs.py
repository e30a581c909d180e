"""Sign election and disjoint aggregation, as TIES-Merging (arXiv:2306.01708) has them."""

from collections.abc import Callable
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from adamerge.static.primitives.selection import (
    global_threshold,
    keep_at_least,
    require_choice,
    require_fraction,
)
from adamerge.vectors import Stacks

Aggregate = Literal["sum", "mean", "max"]


def trim_and_elect(stacks: Stacks, density: float) -> Callable[[Tensor], Tensor]:
    """Give the edit that trims ``[task, *any]`` vectors and drops what disagrees with the elected sign.

    Raises:
        InputError: ``density`` is outside (0, 1].
    """
    require_fraction("density", density)
    threshold = global_threshold(stacks, density)
    majority = majority_sign(stacks.map(lambda _, piece: keep_at_least(piece, threshold), entrywise=True))
    return lambda stack: agreeing(keep_at_least(stack, threshold), majority)


def majority_sign(stacks: Stacks) -> Float[Tensor, ""]:
    """Give the sign of the sum, over the whole model, of the signs of the summed vectors."""
    total = torch.zeros((), dtype=torch.float64)  # fp32 cannot count beyond 2^24
    for _, piece in stacks.pieces():
        total += piece.sum(0).sign().sum(dtype=torch.float64)
    return total.sign().float()


def agreeing(stack: Float[Tensor, "task *any"], majority: Float[Tensor, ""]) -> Float[Tensor, "task *any"]:
    """Zero the entries that disagree with the sign of the sum; where that is 0, with the majority's."""
    elected = stack.sum(0).sign()
    elected = torch.where(elected == 0, majority, elected)
    return stack.sign().eq_(elected).mul_(stack)


def aggregate_by(kind: str) -> Callable[[Tensor], Tensor]:
    """Give the function that joins vectors ``[task, *any]``: their sum, mean or largest.

    Raises:
        InputError: There is no such aggregate.
    """
    require_choice("aggregate", kind, get_args(Aggregate))
    return _AGGREGATES[kind]


def largest_of(stack: Float[Tensor, "task *any"]) -> Float[Tensor, "*any"]:
    """Give each entry's value of largest magnitude over the tasks; of x and -x the positive one."""
    high, low = stack.amax(0), stack.amin(0)
    return torch.where(high >= -low, high, low)


def _sum(stack: Float[Tensor, "task *any"]) -> Float[Tensor, "*any"]:
    return stack.sum(0)


def _mean(stack: Float[Tensor, "task *any"]) -> Float[Tensor, "*any"]:
    return stack.sum(0) / (stack != 0).sum(0).clamp(min=1)


_AGGREGATES: dict[str, Callable[[Tensor], Tensor]] = {"sum": _sum, "mean": _mean, "max": largest_of}
