"""Task vectors as products of thin factors: never expanded, not to merge, to learn, or to run a model."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from jaxtyping import Float
from torch import Tensor

from adamerge.errors import InputError, nearest
from adamerge.vectors.activations import product
from adamerge.vectors.block import Block, PiecewiseBlock
from adamerge.vectors.dense import CODEC_DTYPES, DenseCodec
from adamerge.vectors.sparse import kept_count, require_share

_CHUNK = 2**20  # expanded entries of all tasks together
_GATHER = 32  # to gather a sample for one task, and to add what comes out, costs about as many factors


@dataclass(frozen=True, slots=True)
class LowRankBlock(PiecewiseBlock):
    """One parameter's base tensor and the factors of its T task vectors.

    The parameter is seen as a matrix ``[row, column]``, its first axis by all others. Task t's vector is
    ``left[factors of t].T @ right[factors of t]``.

    Args:
        base: ``[row, *rest]`` in its source dtype.
        left: ``[factor, row]``, task by task: left singular vectors times singular values.
        right: ``[factor, column]``: right singular vectors, in the dtype of ``left``.
        ranks: Number of factors of each task; may be 0.
    """

    base: Tensor
    left: Tensor
    right: Tensor
    ranks: tuple[int, ...]
    _owners: Tensor = field(init=False, repr=False, compare=False)  # the task of every factor

    def __post_init__(self) -> None:
        owners = [task for task, rank in enumerate(self.ranks) for _ in range(rank)]
        tensor = torch.tensor(owners, dtype=torch.int64, device=self.left.device)
        object.__setattr__(self, "_owners", tensor)

    @property
    def n_scalars(self) -> int:
        """Number of stored values of the vectors: rank x (rows + columns) for each task."""
        return self.left.numel() + self.right.numel()

    @property
    def n_bytes(self) -> int:
        """Bytes of the base tensor and of all factors."""
        return self.base.nbytes + self.left.nbytes + self.right.nbytes

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the expanded vectors, ``(task, *param)``."""
        return (len(self.ranks), *self.base.shape)

    def base_tensor(self) -> Float[Tensor, "row *rest"]:
        """Give the base tensor in its source dtype."""
        return self.base

    def to(self, device: torch.device) -> "LowRankBlock":
        """Give the block on a device."""
        return LowRankBlock(self.base.to(device), self.left.to(device), self.right.to(device), self.ranks)

    def combine(self, coefficients: Float[Tensor, " task"]) -> Float[Tensor, "row *rest"]:
        """Give base + sum over tasks of coefficient x vector, in fp32."""
        device = coefficients.device
        left, right, base = (
            tensor.to(device, torch.float32) for tensor in (self.left, self.right, self._matrix())
        )
        scaled = left * coefficients.float()[self._owners.to(device), None]
        return torch.addmm(base, scaled.T, right).reshape(self.base.shape)

    def project(self, gradient: Float[Tensor, "row *rest"]) -> Float[Tensor, " task"]:
        """Give the inner product of a gradient with each task's vector, in fp32."""
        matrix = gradient.reshape(len(self.base), self.right.shape[1]).float()
        left, right = (factors.to(matrix.device, torch.float32) for factors in (self.left, self.right))
        products = (left @ matrix).mul_(right).sum(1)
        return torch.stack([part.sum() for part in products.split(list(self.ranks))])

    def pieces(self) -> Iterator[tuple[slice, Float[Tensor, "task entry"]]]:
        """Walk the flattened parameter in fp32, some rows at a time; their memory is used again."""
        (tasks, rows), columns = self.shape[:2], self.right.shape[1]
        ranks = list(self.ranks)
        factors = list(zip(self.left.float().split(ranks), self.right.float().split(ranks), strict=True))
        step = max(_CHUNK // max(tasks * columns, 1), 1)
        wide = torch.empty(tasks, min(step, rows), columns, device=self.left.device)
        for top in range(0, rows, step):
            piece = wide[:, : rows - top]
            for vector, (left, right) in zip(piece, factors, strict=True):
                torch.mm(left[:, top : top + step].T, right, out=vector)
            yield slice(top * columns, (top + piece.shape[1]) * columns), piece.flatten(1)

    def apply(
        self,
        x: Float[Tensor, "sample row column"],
        weights: Float[Tensor, "sample task"] | Float[Tensor, "sample row task"],
        *,
        transposed: bool = False,
    ) -> Float[Tensor, "sample row out"]:
        """Apply every sample's own matrix, base + sum over tasks of weight x vector, to its rows.

        Nothing is expanded: y = base x + sum over tasks of weight x left' (right x), in the dtype of ``x``
        or autocast's; differentiable in ``x`` and ``weights``. Unless ``weights`` are learnt, factors whose
        weights are all zero are left out, and where few pairs of sample and task have a weight, the samples
        of each task are gathered.

        Args:
            x: Rows of activations.
            weights: A mixture per sample, or per row.
            transposed: Use the matrices' transposes.
        """
        if transposed:
            return LowRankBlock(self._matrix().mT, self.right, self.left, self.ranks).apply(x, weights)
        if weights.dim() == 3:
            y = self.apply(x.flatten(0, 1)[:, None], weights.flatten(0, 1))
            return y.reshape(*x.shape[:2], -1)
        y = product(x, self._matrix().to(x.dtype))
        if torch.compiler.is_compiling() or (torch.is_grad_enabled() and weights.requires_grad):
            return self._products(x, weights, range(len(self.ranks)), y)  # zeros have gradients too
        used = (weights != 0).T
        counts = used.sum(1).tolist()
        tasks = [task for task, (n, rank) in enumerate(zip(counts, self.ranks, strict=True)) if n and rank]
        gathered = sum(counts[task] * (self.ranks[task] + _GATHER) for task in tasks)
        if gathered > len(x) * sum(self.ranks[task] for task in tasks):
            return self._products(x, weights, tasks, y)
        samples = used.nonzero()[:, 1].split(counts)
        for task in tasks:
            chosen = samples[task]
            y = y.index_add_(0, chosen, self._products(x[chosen], weights[chosen], [task]))
        return y

    def _products(
        self,
        x: Float[Tensor, "sample row column"],
        weights: Float[Tensor, "sample task"],
        tasks: Sequence[int],
        onto: Tensor | None = None,
    ) -> Float[Tensor, "sample row out"]:
        """Give the weighted sum over some tasks of left' (right x), added to ``onto``."""
        left, right, owners = self._factors(tasks)
        hidden = product(x, right.to(x.dtype))
        hidden = hidden * weights.index_select(1, owners)[:, None].to(hidden.dtype)
        return product(hidden, left.to(hidden.dtype).T, onto)

    def _factors(self, tasks: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Give some tasks' factors, and the task of each."""
        stored = self.left, self.right, self._owners
        if len(tasks) == len(self.ranks):
            return stored
        ends = list(accumulate(self.ranks))
        spans = [slice(ends[task] - self.ranks[task], ends[task]) for task in tasks]
        left, right, owners = (torch.cat([tensor[span] for span in spans]) for tensor in stored)
        return left, right, owners

    def _matrix(self) -> Float[Tensor, "row column"]:
        return self.base.reshape(len(self.base), self.right.shape[1])


@dataclass(frozen=True)
class LowRankCodec:
    """Stores every matrix of task vectors by its leading singular triplets, as Twin-Merging does.

    Source: arXiv:2406.15479; TSV-C (arXiv:2412.00081) is a fraction of 1 / number of tasks. The rank is
    chosen in one of three ways. Of a matrix with as many rows or columns as `rank` (fraction 1, energy 1)
    nothing is lost. Triplets below the rounding of fp32 take no room, so a vector of zeros has rank 0.
    Tensors of fewer than two dimensions are kept whole.

    Args:
        fraction: Rank as a fraction of the shorter side, rounded down, but at least 1; in (0, 1]. 0.1 where
            neither `rank` nor `energy` is given.
        rank: Rank of every matrix, where it has so many.
        energy: Smallest rank whose squared singular values reach this share of their sum, in (0, 1].
        dtype: Stored dtype of factors and whole tensors: "fp32", "bf16" or "fp16".
        kernels: Treat tensors of three and more dimensions as matrices, first axis by all others; else
            they are kept whole.

    Raises:
        InputError: An option is out of its range, or several choose the rank.
    """

    fraction: float | None = None
    rank: int | None = None
    energy: float | None = None
    dtype: str = "fp32"
    kernels: bool = False

    def __post_init__(self) -> None:
        given = self._given()
        if len(given) > 1:
            found = " and ".join(f"{name}={value}" for name, value in given.items())
            raise InputError(f"{found} both choose the rank.", "Give one of fraction, rank, energy.")
        if not given:
            object.__setattr__(self, "fraction", 0.1)
        if self.rank is not None and self.rank < 1:
            raise InputError(f"rank={self.rank} is less than 1.", "Use e.g. 16.")
        for name in given.keys() - {"rank"}:
            require_share(name, given[name])
        if self.dtype not in CODEC_DTYPES:
            raise InputError(f"dtype {self.dtype!r} is unknown.", nearest(self.dtype, CODEC_DTYPES))

    @property
    def name(self) -> str:
        """The codec's name in configurations and reports."""
        defaults = {"dtype": "fp32", "kernels": False}
        others = {n: getattr(self, n) for n, default in defaults.items() if getattr(self, n) != default}
        return f"low_rank({', '.join(f'{n}={value}' for n, value in (self._given() | others).items())})"

    def encode(self, base: Float[Tensor, "*param"], vectors: Float[Tensor, "task *param"]) -> Block:
        """Decompose every task's matrix in fp64 and round the factors to the stored dtype.

        Raises:
            OverflowError: A factor or entry does not fit the dtype.
        """
        dtype = CODEC_DTYPES[self.dtype]
        if base.dim() < 2 or (base.dim() > 2 and not self.kernels):
            return DenseCodec(dtype).encode(base, vectors)
        pairs = [self._factors(vector) for vector in vectors.flatten(2)]
        left, right = (torch.cat(factors).to(dtype) for factors in zip(*pairs, strict=True))
        if not left.isfinite().all():
            raise OverflowError("a singular value is too large for its factors")
        return LowRankBlock(base, left, right, tuple(len(factors) for factors, _ in pairs))

    def _factors(
        self, matrix: Float[Tensor, "row column"]
    ) -> tuple[Float[Tensor, "factor row"], Float[Tensor, "factor column"]]:
        """Give left singular vectors times singular values, and right singular vectors.

        The vectors V of the shorter side come from its Gram matrix, and the longer side is A V; so their
        product A V V' lacks what lies outside V and nothing else, however small the singular values.
        """
        wide = matrix.double()
        long = wide if len(wide) >= wide.shape[1] else wide.T
        squares, basis = torch.linalg.eigh(long.T @ long)
        short = basis[:, squares.shape[0] - self._rank(squares.flip(0).clamp(min=0)) :].flip(1)
        scaled = (long @ short).T
        if long is wide:
            return scaled.float(), short.T.float()
        values = scaled.norm(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
        return (short.T * values).float(), (scaled / values).float()

    def _rank(self, squares: Float[Tensor, " value"]) -> int:
        """Choose a rank from the squared singular values, which fall."""
        total = squares.cumsum(0)
        present = int((squares > torch.finfo(torch.float32).eps ** 2 * squares[:1]).sum())
        if self.energy is not None:
            wanted = int((total < self.energy * total[-1:]).sum()) + 1
        elif self.fraction is not None:
            wanted = max(kept_count(self.fraction, len(squares)), 1)
        else:
            wanted = self.rank or 0
        return min(wanted, present)

    def _given(self) -> dict[str, float | int]:
        options = {"fraction": self.fraction, "rank": self.rank, "energy": self.energy}
        return {name: value for name, value in options.items() if value is not None}
