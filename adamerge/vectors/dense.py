"""Task vectors stored entry by entry, in fp32, bf16 or fp16."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from adamerge.vectors.block import PiecewiseBlock

CODEC_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Half-precision vectors are widened piece by piece, so many entries of all tasks together: on a CPU they
# should stay in its cache (eight times faster), on a GPU few kernels should do the work.
_CHUNK = 2**20
_GPU_CHUNKS = 16


@dataclass(frozen=True, slots=True)
class DenseBlock(PiecewiseBlock):
    """One parameter's base tensor and its T task vectors.

    Args:
        base: ``[*param]`` in its source dtype.
        vectors: ``[task, *param]`` in the codec's dtype.
    """

    base: Tensor
    vectors: Tensor

    @property
    def n_bytes(self) -> int:
        """Bytes of the base tensor and of all vectors."""
        return self.base.nbytes + self.vectors.nbytes

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the vectors, ``(task, *param)``."""
        return tuple(self.vectors.shape)

    def base_tensor(self) -> Float[Tensor, "*param"]:
        """Give the base tensor in its source dtype."""
        return self.base

    def dense(self) -> Float[Tensor, "task *param"]:
        """Give the vectors in fp32."""
        return self.vectors.float()

    def _stored(self) -> Float[Tensor, "task *param"]:
        return self.vectors

    def to(self, device: torch.device) -> "DenseBlock":
        """Give the block on a device."""
        return DenseBlock(self.base.to(device), self.vectors.to(device))

    def pieces(self) -> Iterator[tuple[slice, Float[Tensor, "task entry"]]]:
        """Walk the flattened parameter in fp32: whole where stored so, else widened in chunks.

        A chunk's memory is used again for the next one.
        """
        flat = self.vectors.flatten(1) if self.vectors.dim() > 1 else self.vectors[:, None]
        tasks, size = flat.shape
        if flat.dtype == torch.float32:
            yield slice(0, size), flat
            return
        entries = _CHUNK if flat.device.type == "cpu" else _GPU_CHUNKS * _CHUNK
        step = max(entries // tasks, 1)
        wide = flat.new_empty(tasks, min(step, size), dtype=torch.float32)
        for start in range(0, size, step):
            piece = flat[:, start : start + step]
            yield slice(start, start + step), wide[:, : piece.shape[1]].copy_(piece)


@dataclass(frozen=True)
class DenseCodec:
    """Stores task vectors entry by entry.

    Args:
        dtype: Stored dtype; subtraction and all products are in fp32 whatever it is.
    """

    dtype: torch.dtype = torch.float32

    @property
    def name(self) -> str:
        """The codec's name in configurations and reports."""
        return next(name for name, dtype in CODEC_DTYPES.items() if dtype == self.dtype)

    def encode(self, base: Float[Tensor, "*param"], vectors: Float[Tensor, "task *param"]) -> DenseBlock:
        """Round the vectors to the stored dtype.

        Raises:
            OverflowError: A vector has an entry that the dtype cannot hold.
        """
        stored = vectors.to(self.dtype)
        if self.dtype == torch.float16 and not torch.isfinite(stored).all():
            raise OverflowError(f"a task vector reaches {vectors.abs().max():.4g}")
        return DenseBlock(base, stored)
