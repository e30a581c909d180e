"""Task vectors of which few entries are kept: their values, and their places in the flattened parameter."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from adamerge.errors import InputError
from adamerge.state import as_bytes
from adamerge.vectors.block import Block, PiecewiseBlock
from adamerge.vectors.dense import DenseCodec

_CHUNK = 2**20  # expanded entries of all tasks together


@dataclass(frozen=True, slots=True)
class SparseBlock(PiecewiseBlock):
    """One parameter's base tensor and the kept entries of its T task vectors.

    Args:
        base: ``[*param]`` in its source dtype.
        entries: fp32 ``[entry]``, the kept entries of all tasks, task by task.
        indices: int32 ``[entry]``, rising within a task: places in the flattened parameter. (int64 where
            a parameter has more than 2^30 entries.)
        counts: Number of kept entries of each task.
    """

    base: Tensor
    entries: Tensor
    indices: Tensor
    counts: tuple[int, ...]

    @property
    def n_scalars(self) -> int:
        """Number of kept entries; their places count in bytes only."""
        return self.entries.numel()

    @property
    def n_bytes(self) -> int:
        """Bytes of the base tensor, of all kept entries and of their places."""
        return self.base.nbytes + self.entries.nbytes + self.indices.nbytes

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the expanded vectors, ``(task, *param)``."""
        return (len(self.counts), *self.base.shape)

    def base_tensor(self) -> Float[Tensor, "*param"]:
        """Give the base tensor in its source dtype."""
        return self.base

    def to(self, device: torch.device) -> "SparseBlock":
        """Give the block on a device."""
        base, entries, indices = (t.to(device) for t in (self.base, self.entries, self.indices))
        return SparseBlock(base, entries, indices, self.counts)

    def combine(self, coefficients: Float[Tensor, " task"]) -> Float[Tensor, "*param"]:
        """Give base + sum over tasks of coefficient x vector, in fp32."""
        device = coefficients.device
        merged = self.base.to(device, torch.float32, copy=True).reshape(-1)
        for coefficient, (indices, entries) in zip(coefficients.float(), self._tasks(), strict=True):
            merged.index_add_(0, indices.to(device), coefficient * entries.to(device))
        return merged.reshape(self.base.shape)

    def project(self, gradient: Float[Tensor, "*param"]) -> Float[Tensor, " task"]:
        """Give the inner product of a gradient with each task's vector, in fp32."""
        flat = gradient.reshape(-1).float()
        products = [
            flat.index_select(0, indices.to(flat.device)) @ entries.to(flat.device)
            for indices, entries in self._tasks()
        ]
        return torch.stack(products)

    def pieces(self) -> Iterator[tuple[slice, Float[Tensor, "task entry"]]]:
        """Walk the flattened parameter in fp32, chunk by chunk; a chunk's memory is used again."""
        size, tasks = self.base.numel(), list(self._tasks())
        step = max(_CHUNK // len(tasks), 1)
        starts = torch.arange(0, size + step, step).to(self.indices)
        bounds = [torch.searchsorted(indices, starts).tolist() for indices, _ in tasks]
        wide = self.entries.new_empty(len(tasks), min(step, size))
        for chunk, start in enumerate(range(0, size, step)):
            piece = wide[:, : size - start].zero_()
            for row, (indices, entries), bound in zip(piece, tasks, bounds, strict=True):
                kept = slice(bound[chunk], bound[chunk + 1])
                row[indices[kept] - start] = entries[kept]
            yield slice(start, start + piece.shape[1]), piece

    def _tasks(self) -> Iterable[tuple[Tensor, Tensor]]:
        """Give every task's places and kept entries."""
        counts = list(self.counts)
        return zip(self.indices.split(counts), self.entries.split(counts), strict=True)


@dataclass(frozen=True)
class SparseCodec(ABC):
    """Keeps some entries of every task's vector, tensor by tensor; zeros take no room.

    Tensors of fewer than two dimensions are kept whole, in fp32, as Twin-Merging does (arXiv:2406.15479).

    Args:
        density: Fraction of a tensor's entries that is kept, in (0, 1].

    Raises:
        InputError: An option is out of its range.
    """

    density: float = 0.1

    def __post_init__(self) -> None:
        require_share("density", self.density)

    def encode(self, base: Float[Tensor, "*param"], vectors: Float[Tensor, "task *param"]) -> Block:
        """Store the kept entries of every task's vector."""
        if base.dim() < 2:
            return DenseCodec().encode(base, vectors)
        rows = vectors.flatten(1)
        places = [
            (kept & (row != 0)).nonzero()[:, 0]
            for row, kept in zip(rows, self.masks(base, rows), strict=True)
        ]
        values = torch.cat([row[kept] for row, kept in zip(rows, places, strict=True)])
        narrow = torch.int32 if base.numel() <= 2**30 else torch.int64
        counts = tuple(len(kept) for kept in places)
        return SparseBlock(base, values * self.factor, torch.cat(places).to(narrow), counts)

    @property
    def factor(self) -> float:
        """What kept entries are multiplied by."""
        return 1.0

    @abstractmethod
    def masks(
        self, base: Float[Tensor, "*param"], rows: Float[Tensor, "task entry"]
    ) -> Iterator[Bool[Tensor, " entry"]]:
        """Say for every task in turn which entries of its flattened vector are kept."""


@dataclass(frozen=True)
class MagnitudeCodec(SparseCodec):
    """Keeps the largest magnitudes of every tensor: floor(density x entries), of equal ones the first.

    Args:
        density: Fraction of a tensor's entries that is kept, in (0, 1].

    Raises:
        InputError: An option is out of its range.
    """

    @property
    def name(self) -> str:
        """The codec's name in configurations and reports."""
        return f"magnitude(density={self.density})"

    def masks(
        self, base: Float[Tensor, "*param"], rows: Float[Tensor, "task entry"]
    ) -> Iterator[Bool[Tensor, " entry"]]:
        """Choose by magnitude."""
        count = kept_count(self.density, base.numel())
        for row in rows:
            magnitude = row.abs()
            if count == 0:
                yield torch.zeros_like(row, dtype=torch.bool)
                continue
            smallest = magnitude.kthvalue(len(row) - count + 1).values
            above, equal = magnitude > smallest, magnitude == smallest
            yield above | (equal & (equal.cumsum(0) <= count - above.sum()))


@dataclass(frozen=True)
class BernoulliCodec(SparseCodec):
    """Keeps every entry with one probability, independently, as DARE does (arXiv:2311.03099).

    The masks follow from the seed, the parameter's base tensor (a hash of its values) and the task's place;
    so neither the order in which parameters are encoded nor the vectors' values matter.

    Args:
        density: Probability to keep an entry, in (0, 1].
        rescale: Divide what is kept by the density, such that vectors keep their expectation.
        seed: Seed of the masks.

    Raises:
        InputError: An option is out of its range.
    """

    rescale: bool = True
    seed: int = 0

    @property
    def name(self) -> str:
        """The codec's name in configurations and reports."""
        return f"bernoulli(density={self.density}, rescale={self.rescale}, seed={self.seed})"

    @property
    def factor(self) -> float:
        """What kept entries are multiplied by."""
        return 1 / self.density if self.rescale else 1.0

    def masks(
        self, base: Float[Tensor, "*param"], rows: Float[Tensor, "task entry"]
    ) -> Iterator[Bool[Tensor, " entry"]]:
        """Choose at random, on the CPU wherever the vectors are."""
        digest = hashlib.sha256(f"{self.seed} {tuple(base.shape)}".encode())
        digest.update(as_bytes(base).numpy().data)
        generator = torch.Generator().manual_seed(int.from_bytes(digest.digest()[:8], "little") >> 1)
        for row in rows:
            yield (torch.rand(len(row), generator=generator) < self.density).to(row.device)


def require_share(name: str, value: float) -> None:
    """Refuse a share that is not in (0, 1].

    Raises:
        InputError: The option and its value.
    """
    if not 0 < value <= 1:
        raise InputError(f"{name}={value} is outside (0, 1].", "Use e.g. 0.1.")


def kept_count(share: float, size: int) -> int:
    """Give floor(share x size), safe from the rounding of products such as 0.29 x 100."""
    return int(share * size + 1e-12 * size)
