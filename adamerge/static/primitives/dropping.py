"""Random dropping: what is dropped follows from a seed, a parameter's name, a task and a place alone."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int32
from torch import Tensor

from adamerge.static.primitives.selection import per_task
from adamerge.vectors import Stacks
from adamerge.vectors.block import PiecewiseBlock
from adamerge.vectors.streamed import EditedBlock

Rescale = Literal["inverse_prob", "l1", "none"]
_PIECE = 2**19  # entries of all tasks together: a piece should stay in a core's cache


def random_bits(seed: int, name: str, task: int, start: int, count: int) -> Int32[Tensor, " count"]:
    """Give 32 random bits for each of ``count`` places of one vector, from ``start`` on.

    Every vector has a stream of its own, which is entered at any place; NumPy keeps its bits for good.
    """
    key = hashlib.blake2b(f"{seed} {task} {name}".encode(), digest_size=16).digest()
    source = np.random.PCG64(int.from_bytes(key)).advance(start // 2)  # two places a draw
    words = source.random_raw((start % 2 + count + 1) // 2).view(np.int32)
    return torch.from_numpy(words)[start % 2 :][:count]


def highest_kept(probability: Float[Tensor, "*places"]) -> Int32[Tensor, "*places"]:
    """Give the integer which random bits do not exceed with the given probability, in (0, 1]."""
    return (probability.double() * 2**32).round().clamp(1, 2**32).sub(2**31 + 1).int()


def match_l1_(
    kept: Float[Tensor, "task *param"], vectors: Float[Tensor, "task *param"]
) -> Float[Tensor, "task *param"]:
    """Scale each task's kept entries, in place, to the sum of magnitudes that its vector had."""
    had, have = (torch.stack([vector.abs().sum() for vector in stack]) for stack in (vectors, kept))
    return kept.mul_(per_task(torch.where(have > 0, had / have, 1), kept))


def spans(vectors: Float[Tensor, "task entry"]) -> Iterator[slice]:
    """Cut a parameter's entries in pieces that fit a cache."""
    n_tasks, size = vectors.shape
    step = max(_PIECE // n_tasks, 1)
    for start in range(0, size, step):
        yield slice(start, min(start + step, size))


def in_pieces(
    merge: Callable[[Tensor], Tensor], vectors: Float[Tensor, "task *param"]
) -> Float[Tensor, "*param"]:
    """Merge a whole parameter by a function that treats every entry on its own."""
    entries = vectors.reshape(len(vectors), -1)
    merged = torch.empty(entries.shape[1])
    for span in spans(entries):
        merged[span] = merge(entries[:, span])
    return merged.reshape(vectors.shape[1:])


@dataclass(frozen=True)
class _PlacedBlock(EditedBlock):
    """A block under an edit of pieces that also asks where in the flattened parameter a piece begins."""

    edit: Callable[..., Tensor]

    def pieces(self) -> Iterator[tuple[slice, Float[Tensor, "task entry"]]]:
        for span, piece in self.inner.pieces():
            yield span, self.edit(piece, start=span.start)

    def dense(self) -> Float[Tensor, "task *param"]:
        return PiecewiseBlock.dense(self)


def placed(stacks: Stacks, edit: Callable[..., Tensor]) -> Stacks:
    """Give the stream under ``edit(piece, name=..., start=...)``."""
    blocks = {n: _PlacedBlock(block, partial(edit, name=n), True) for n, block in stacks.blocks.items()}
    return Stacks(blocks, stacks.description)
