"""PCB-Merging: parameters compete within each task vector and between them."""

from collections.abc import Callable
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from adamerge.static.primitives.selection import (
    kept_count,
    largest,
    magnitudes,
    per_task,
    require_choice,
    require_fraction,
    total_size,
)
from adamerge.static.registry import static_method
from adamerge.vectors import Stacks

Variant = Literal["A", "B", "C"]
_TAILS = {"A": 1e-4, "B": 0.01, "C": 0.01}  # share of magnitudes that is clipped at either end


@static_method(title="PCB-Merging", source="arXiv:2410.02396", scope="model")
def pcb(
    stacks: Stacks, *, variant: Variant = "B", ratio: float = 0.05, scale: float = 1.2
) -> Callable[[Tensor], Tensor]:
    """Average the task vectors by weights from the balance of each entry within and between them.

    The official repository has three variants. "A" (its language models) balances tasks by the raw
    vectors, "C" by the sum of the normalised ones, and "B" (its vision models) by every pair of them.

    Of d entries in ascending order, counted from 1, the q-quantile is the (floor(q d) + 1)-th, but at the
    upper end of the clipping the floor((1 - q) d)-th, as in the official code.

    Args:
        stacks: fp32 task vectors of the whole model.
        variant: "A", "B" or "C".
        ratio: Share of each task's entries, those of the highest score, that take part, in (0, 1].
        scale: Coefficient of the merged vector; the official code searches one in [0.8, 1.3] for each
            task on validation labels, or has 1.2.

    Returns:
        The merge of ``[task, *any]`` vectors.

    Raises:
        InputError: An option is out of its range.
    """
    require_choice("variant", variant, get_args(Variant))
    require_fraction("ratio", ratio)
    size, tail = total_size(stacks), _TAILS[variant]
    highest = min(size - kept_count(1 - tail, size) + 1, size)
    low, high = largest(magnitudes(stacks), size - kept_count(tail, size), highest)

    def score(stack: Float[Tensor, "task *any"]) -> Float[Tensor, "task *any"]:
        unit = _normalized(stack.abs(), low, high)
        within = (unit.square() - 1).mul_(len(stack)).exp_()  # at most 1: a factor per task cancels later
        return within.mul_(_BETWEEN[variant](stack, stack.sign() * unit))

    scores = stacks.map(lambda _, piece: score(piece), entrywise=True)
    floor, top = largest(scores, max(size - kept_count(1 - ratio, size), 1), 1)

    def merge(stack: Float[Tensor, "task *any"]) -> Float[Tensor, "*any"]:
        share = _normalized(score(stack), floor, top)
        clipped = stack.sign() * _clamped(stack.abs(), low, high)
        return scale * (share * clipped).sum(0) / share.sum(0).clamp(min=1e-12)

    return merge


def _clamped(
    stack: Float[Tensor, "task *any"], low: Float[Tensor, " task"], high: Float[Tensor, " task"]
) -> Float[Tensor, "task *any"]:
    return stack.clamp(per_task(low, stack), per_task(high, stack))


def _normalized(
    stack: Float[Tensor, "task *any"], low: Float[Tensor, " task"], high: Float[Tensor, " task"]
) -> Float[Tensor, "task *any"]:
    """Clamp to each task's bounds and map these to 0 and 1; to 0 where the bounds are equal."""
    width = torch.where(high > low, high - low, torch.inf)
    return _clamped(stack, low, high).sub_(per_task(low, stack)).div_(per_task(width, stack))


def _with_raw_sum(raw: Float[Tensor, "task *any"], _: Tensor) -> Float[Tensor, "task *any"]:
    return (raw * raw.sum(0)).tanh_()


def _with_every_other(_: Tensor, unit: Float[Tensor, "task *any"]) -> Float[Tensor, "task *any"]:
    total = torch.zeros_like(unit)
    for task, own in enumerate(unit):
        pairs = (own * unit[task:]).tanh_()
        total[task:] += pairs
        total[task] += pairs[1:].sum(0)
    return total


def _with_unit_sum(
    raw: Float[Tensor, "task *any"], unit: Float[Tensor, "task *any"]
) -> Float[Tensor, "task *any"]:
    return (raw * unit.sum(0)).tanh_()


_BETWEEN = {"A": _with_raw_sum, "B": _with_every_other, "C": _with_unit_sum}
