"""Selection over a whole model: exact, on streams, without sorting it."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from adamerge.errors import InputError
from adamerge.vectors import Stacks

_HALF = 2**16


def require_fraction(name: str, value: float) -> None:
    """Refuse a fraction outside (0, 1].

    Raises:
        InputError: The option, its value, and what was probably meant.
    """
    if not 0 < value <= 1:
        hint = f"Did you mean {value / 100:g}?" if 1 < value <= 100 else "Use e.g. 0.2."
        raise InputError(f"{name}={value} is outside (0, 1].", hint)


def require_proper_fraction(name: str, value: float) -> None:
    """Refuse a fraction outside [0, 1).

    Raises:
        InputError: The option, its value, and what was probably meant.
    """
    if not 0 <= value < 1:
        hint = f"Did you mean {value / 100:g}?" if 1 < value < 100 else "Use e.g. 0.5."
        raise InputError(f"{name}={value} is outside [0, 1).", hint)


def require_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Refuse a word that is not among the choices.

    Raises:
        InputError: The option, its value, and what it may be.
    """
    if value not in choices:
        *others, last = map(repr, choices)
        raise InputError(f"{name}={value!r} is unknown.", f"Use {', '.join(others)} or {last}.")


def kept_count(density: float, size: int) -> int:
    """Give floor(density x size), safe from the rounding of products such as 0.29 x 100."""
    return int(density * size + 1e-12 * size)


def total_size(stacks: Stacks) -> int:
    """Count the entries of one task's vector over the whole model."""
    return sum(torch.Size(shape).numel() for shape in stacks.shapes.values())


def global_threshold(stacks: Stacks, density: float) -> Float[Tensor, " task"]:
    """Give each task's smallest kept magnitude: the (d - floor(density d))-th smallest of d entries.

    Entries at or above it are kept, so equal ones may make them more than the density asks for. It is
    infinite where not even one entry is kept, and 0 where all are.
    """
    size = total_size(stacks)
    kept = kept_count(density, size)
    if kept == 0:
        return torch.full((stacks.n_tasks,), torch.inf)
    if kept == size:
        return torch.zeros(stacks.n_tasks)
    return largest_magnitude(stacks, kept + 1)


def largest_magnitude(stacks: Stacks, rank: int) -> Float[Tensor, " task"]:
    """Find each task's ``rank``-th largest magnitude over the whole model, exactly; see `largest`."""
    return largest(magnitudes(stacks), rank)[0]


def magnitudes(stacks: Stacks) -> Stacks:
    """Give the stream of the vectors' magnitudes."""
    return stacks.map(lambda _, stack: stack.abs(), entrywise=True)


def largest(stacks: Stacks, *ranks: int) -> Float[Tensor, "rank task"]:
    """Find each task's ``rank``-th largest values over the whole model, exactly.

    The bits of a float, read as an integer, keep its order (reversed below zero); so two histograms, of
    the upper and then of the lower sixteen bits, find the values in two walks.

    Args:
        stacks: fp32 vectors of the whole model; walked twice.
        ranks: 1 for the largest value, up to the number of entries.

    Returns:
        One value per rank and task.
    """
    upper = torch.zeros(stacks.n_tasks, _HALF, dtype=torch.int64)
    for _, piece in stacks.pieces():
        _count(upper, (_keys(piece) >> 16).add_(_HALF // 2))
    found = [_locate(upper, rank, lowest=-_HALF // 2) for rank in ranks]
    lower = torch.zeros(len(ranks), *upper.shape, dtype=torch.int64)
    for _, piece in stacks.pieces():
        keys = _keys(piece)
        for counts, (bucket, _) in zip(lower, found, strict=True):
            _count_within(counts, keys, bucket)
    keys = [
        bucket * _HALF + _locate(counts, rank - above)[0]
        for counts, rank, (bucket, above) in zip(lower, ranks, found, strict=True)
    ]
    return _ordered(torch.stack(keys).int()).view(torch.float32)


def keep_at_least(
    stack: Float[Tensor, "task *any"], threshold: Float[Tensor, " task"]
) -> Float[Tensor, "task *any"]:
    """Zero every entry whose magnitude lies below its task's threshold."""
    return stack.abs().ge_(per_task(threshold, stack)).mul_(stack)


def per_task(values: Float[Tensor, " task"], stack: Float[Tensor, "task *any"]) -> Float[Tensor, "task *_"]:
    """Shape one value per task so that it meets every entry of its task's vector."""
    return values.reshape(-1, *[1] * (stack.dim() - 1))


def _keys(piece: Float[Tensor, "task entry"]) -> Tensor:
    """Give 32-bit integers in the order of the values."""
    return _ordered(piece.contiguous().view(torch.int32))


def _ordered(bits: Tensor) -> Tensor:
    """Turn the bits of floats into integers of their order; done twice, it gives the bits again."""
    return (bits >> 31).bitwise_and_(2**31 - 1).bitwise_xor_(bits)


def _count(counts: Int64[Tensor, "task bucket"], values: Tensor) -> None:
    for row, value in zip(counts, values, strict=True):
        row.add_(torch.bincount(value, minlength=_HALF))


def _count_within(counts: Int64[Tensor, "task bucket"], keys: Tensor, upper: Int64[Tensor, " task"]) -> None:
    for row, values, wanted in zip(counts, keys.numpy(), upper.tolist(), strict=True):
        inside = torch.from_numpy(values[values >> 16 == wanted]).bitwise_and_(_HALF - 1).long()
        row.scatter_add_(0, inside, torch.ones_like(inside))  # few: a histogram of 2^16 would cost more


def _locate(
    counts: Int64[Tensor, "task bucket"], rank: int | Int64[Tensor, " task"], lowest: int = 0
) -> tuple[Int64[Tensor, " task"], Int64[Tensor, " task"]]:
    """Find the bucket, numbered from ``lowest``, of the rank-th largest entry, and how many lie above it."""
    from_top = counts.flip(1).cumsum(1)
    wanted = torch.as_tensor(rank).expand(len(counts))[:, None].contiguous()
    position = torch.searchsorted(from_top, wanted)
    above = from_top.gather(1, position) - counts.flip(1).gather(1, position)
    return lowest + _HALF - 1 - position[:, 0], above[:, 0]
