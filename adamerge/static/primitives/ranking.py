"""Ranks of magnitudes within rows: exact counts whatever is equal, since earlier entries then come first."""

from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

_BLOCK = 2**17  # entries worked on together: they should stay in a core's cache
_LOW = 2**32 - 1


def keep_ranked(vectors: Float[Tensor, "*any entry"], skip: int, keep: int) -> Float[Tensor, "*any entry"]:
    """Zero, in every row, all but the ``keep`` entries of largest magnitude after the ``skip`` largest."""
    kept, size = torch.zeros(vectors.shape), vectors.shape[-1]
    keep = min(keep, size - skip)
    if keep <= 0:
        return kept
    for rows, target in row_blocks(vectors, kept):
        keys = _keys(rows)
        keys.partition(size - skip - keep, axis=1)
        top = keys[:, size - skip - keep :]
        if skip:
            top.partition(keep, axis=1)
        index = _positions(top[:, :keep])
        target.scatter_(1, index, rows.gather(1, index))
    return kept


def by_magnitude(rows: Float[Tensor, "row entry"]) -> Int64[Tensor, "row entry"]:
    """Give the positions of each row's entries, from the smallest magnitude to the largest."""
    keys = _keys(rows)
    keys.sort(axis=1)
    return _positions(keys)


def row_blocks(*tensors: Float[Tensor, "*any entry"]) -> Iterator[tuple[Tensor, ...]]:
    """Walk tensors of one shape in blocks of whole rows, which are views of contiguous tensors."""
    size = max(tensors[0].shape[-1], 1)
    split = [tensor.reshape(-1, size).split(max(_BLOCK // size, 1)) for tensor in tensors]
    yield from zip(*split, strict=True)


def _keys(rows: Float[Tensor, "row entry"]) -> np.ndarray:
    """Give integers that no two entries of a row share: magnitude first, then how near the row's start."""
    keys = rows.abs().view(torch.int32).long()
    keys <<= 32
    keys |= torch.arange(_LOW, _LOW - rows.shape[1], -1)
    return keys.numpy()  # whose partition and sort are several times faster than torch's


def _positions(keys: np.ndarray) -> Int64[Tensor, "row entry"]:
    return _LOW - torch.from_numpy(keys & _LOW)
