"""Arithmetic that several methods share, on streams of stacks, exact and without sorting a model."""

from collections.abc import Iterable, Iterator

import torch
from jaxtyping import Float, Int64
from torch import Tensor

Stack = tuple[str, Tensor]
_HALF = 2**16


def kept_count(density: float, size: int) -> int:
    """Give floor(density x size), safe from the rounding of products such as 0.29 x 100."""
    return int(density * size + 1e-12 * size)


def total_size(stacks: Iterable[Stack]) -> int:
    """Count the entries of one task's vector over the whole model."""
    return sum(stack[0].numel() for _, stack in stacks)


def largest_magnitude(stacks: Iterable[Stack], rank: int) -> Float[Tensor, " task"]:
    """Find each task's ``rank``-th largest magnitude over the whole model, exactly.

    The bits of a non-negative float, read as an integer, keep its order; so two histograms, of the upper
    and then of the lower sixteen bits, find the value in two passes over the stream.

    Args:
        stacks: ``(name, [task, *param])`` in fp32; walked twice.
        rank: 1 for the largest magnitude, up to the number of entries.

    Returns:
        One magnitude per task.
    """
    upper = sum(_histogram(_bits(stack) // _HALF) for _, stack in stacks)
    bucket, above = _locate(torch.as_tensor(upper), rank)
    lower = sum(_lower_histogram(_bits(stack), bucket) for _, stack in stacks)
    within, _ = _locate(torch.as_tensor(lower), rank - above)
    return (bucket * _HALF + within).int().view(torch.float32)


def _bits(stack: Float[Tensor, "task *param"]) -> Int64[Tensor, "task entry"]:
    return stack.abs().reshape(len(stack), -1).contiguous().view(torch.int32).long()


def _histogram(values: Int64[Tensor, "task entry"]) -> Int64[Tensor, "task 65536"]:
    return torch.stack([torch.bincount(row, minlength=_HALF) for row in values])


def _lower_histogram(
    bits: Int64[Tensor, "task entry"], bucket: Int64[Tensor, " task"]
) -> Int64[Tensor, "task 65536"]:
    rows = [row[row // _HALF == b] % _HALF for row, b in zip(bits, bucket, strict=True)]
    return torch.stack([torch.bincount(row, minlength=_HALF) for row in rows])


def _locate(
    counts: Int64[Tensor, "task 65536"], rank: int | Int64[Tensor, " task"]
) -> tuple[Int64[Tensor, " task"], Int64[Tensor, " task"]]:
    """Find the bucket that holds the rank-th largest entry, and how many entries lie above it."""
    from_top = counts.flip(1).cumsum(1)
    wanted = torch.as_tensor(rank).expand(len(counts))[:, None].contiguous()
    position = torch.searchsorted(from_top, wanted)
    above = from_top.gather(1, position) - counts.flip(1).gather(1, position)
    return _HALF - 1 - position[:, 0], above[:, 0]


def keep_at_least(stacks: Iterable[Stack], threshold: Float[Tensor, " task"]) -> Iterator[Stack]:
    """Zero every entry whose magnitude lies below its task's threshold."""
    for name, stack in stacks:
        limit = threshold.reshape(-1, *[1] * (stack.dim() - 1))
        yield name, stack * (stack.abs() >= limit)
