"""Task vectors whose entries are -s, 0 or +s: two bits an entry, and one scale per task and parameter."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int8
from torch import Tensor

from adamerge.errors import InputError
from adamerge.vectors.block import PiecewiseBlock

_PLANES = 4  # two-bit entries in a byte
_CHUNK = 2**20  # entries of all tasks together: an unpacked run should stay in a CPU's cache
_GPU_CHUNKS = 16


@dataclass(frozen=True, slots=True)
class TernaryBlock(PiecewiseBlock):
    """One parameter's base tensor and its T ternary task vectors.

    A flattened vector is cut into runs of four planes; byte i of a run holds entry i of each plane, two
    bits of two's complement from the lowest up. So a run is unpacked by shifts of whole rows.

    Args:
        base: ``[*param]`` in its source dtype.
        scales: fp32 ``[task]``, the magnitude of every entry that is not 0.
        codes: int8 ``[task, run, byte]``.
    """

    base: Tensor
    scales: Tensor
    codes: Tensor

    @property
    def n_bytes(self) -> int:
        """Bytes of the base tensor, of all scales and of all codes."""
        return self.base.nbytes + self.scales.nbytes + self.codes.nbytes

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the vectors, ``(task, *param)``."""
        return (len(self.scales), *self.base.shape)

    def base_tensor(self) -> Float[Tensor, "*param"]:
        """Give the base tensor in its source dtype."""
        return self.base

    def to(self, device: torch.device) -> "TernaryBlock":
        """Give the block on a device."""
        return TernaryBlock(self.base.to(device), self.scales.to(device), self.codes.to(device))

    def pieces(self) -> Iterator[tuple[slice, Float[Tensor, "task entry"]]]:
        """Walk the flattened parameter in fp32, one run (on a GPU several) at a time.

        A piece's memory is used again for the next one.
        """
        tasks, runs, width = self.codes.shape
        together = 1 if self.codes.device.type == "cpu" else _GPU_CHUNKS
        shifts = torch.arange(6, -1, -2, dtype=torch.int8, device=self.codes.device)[:, None]
        wide = self.scales.new_empty(tasks, min(together, runs), _PLANES, width)
        for run in range(0, runs, together):
            codes = self.codes[:, run : run + together, None]
            piece = wide[:, : codes.shape[1]]
            piece.copy_((codes << shifts) >> 6).mul_(self.scales[:, None, None, None])
            start, length = run * _PLANES * width, codes.shape[1] * _PLANES * width
            span = slice(start, min(start + length, self.base.numel()))
            yield span, piece.view(tasks, length)[:, : span.stop - start]


@dataclass(frozen=True)
class TernaryCodec:
    """Stores task vectors as ComPEFT does (arXiv:2311.13171), tensor by tensor.

    A vector that is ternary already, as the `compeft` edit leaves it, is stored without loss. Of any other,
    the largest magnitudes are kept (all that equal the smallest kept one), as ``alpha`` x standard
    deviation of the tensor's vector, with their signs.

    Args:
        density: Fraction of a tensor's entries that is kept, in (0, 1].
        alpha: Factor of the standard deviation.

    Raises:
        InputError: An option is out of its range.
    """

    density: float = 0.2
    alpha: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise InputError(f"density={self.density} is outside (0, 1].", "Use e.g. 0.2.")
        if not 0 < self.alpha < math.inf:
            raise InputError(f"alpha={self.alpha} is no positive number.", "Use e.g. 1.0.")

    @property
    def name(self) -> str:
        """The codec's name in configurations and reports."""
        return "ternary"

    def encode(self, base: Float[Tensor, "*param"], vectors: Float[Tensor, "task *param"]) -> TernaryBlock:
        """Make every task's vector ternary, where it is not, and pack it.

        Raises:
            OverflowError: A scale is more than fp32 can hold.
        """
        rows = [self._ternary(row) for row in vectors.reshape(len(vectors), base.numel())]
        scales, signs = (torch.stack(column) for column in zip(*rows, strict=True))
        return TernaryBlock(base, scales, _pack(signs))

    def _ternary(self, row: Float[Tensor, " entry"]) -> tuple[Float[Tensor, ""], Int8[Tensor, " entry"]]:
        """Give a vector's scale and signs."""
        magnitude = row.abs()
        largest = magnitude.max() if len(row) else row.new_zeros(())
        if ((magnitude == largest) | (magnitude == 0)).all():
            return largest, row.sign().to(torch.int8)
        kept = int(self.density * len(row) + 1e-12 * len(row))  # 0.29 x 100 is 29
        if kept == 0:
            return row.new_zeros(()), torch.zeros_like(row, dtype=torch.int8)
        scale = self.alpha * row.std(correction=0)
        if not scale.isfinite():
            raise OverflowError(f"alpha={self.alpha} x the standard deviation is beyond fp32")
        smallest = magnitude.kthvalue(len(row) - kept + 1).values
        return scale, (row.sign() * (magnitude >= smallest)).to(torch.int8)


def _pack(signs: Int8[Tensor, "task entry"]) -> Int8[Tensor, "task run byte"]:
    """Cut every row into equal runs, and put the four planes of a run into one byte each."""
    tasks, size = signs.shape
    width = math.ceil(size / (_PLANES * max(math.ceil(size * tasks / _CHUNK), 1)))
    runs = math.ceil(size / (_PLANES * max(width, 1)))
    padded = torch.nn.functional.pad(signs, (0, runs * _PLANES * width - size))
    codes = signs.new_zeros(tasks, runs, width)
    for plane, entries in enumerate(padded.view(tasks, runs, _PLANES, width).unbind(2)):
        codes |= (entries & 3) << 2 * plane
    return codes
