"""What is measured of task vectors piece by piece: products, signs and spectra, in fp64."""

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from adamerge.vectors import Block

_PART = 2**16  # entries of all tasks together: what is made of them in fp64 should stay in a core's cache
_CHUNK = 2**21  # entries of a matrix that are widened to fp64 at once


class Sums(NamedTuple):
    """Sums over entries, from which norms, cosines, density and conflicts of sign follow.

    Attributes:
        products: Sum of v_a v_b, by pair of tasks; the diagonal holds squared norms.
        sizes: Sum of |v_a v_b|.
        agreements: Number of entries of equal sign less those of opposite sign.
        overlaps: Number of entries where neither is zero.
        shared: Entries where at least two vectors are not zero: their number, and their magnitude
            (the sum over tasks of |v|).
        conflicting: The same of those entries where signs disagree.
    """

    products: Float[Tensor, "task task"]
    sizes: Float[Tensor, "task task"]
    agreements: Float[Tensor, "task task"]
    overlaps: Float[Tensor, "task task"]
    shared: Float[Tensor, "2"]
    conflicting: Float[Tensor, "2"]

    @classmethod
    def zero(cls, n_tasks: int) -> "Sums":
        """Give the sums over no entries."""
        pairs, counts = torch.zeros(n_tasks, n_tasks).double(), torch.zeros(2).double()
        return cls(pairs, pairs, pairs, pairs, counts, counts)

    @classmethod
    def of(cls, piece: Float[Tensor, "task entry"]) -> "Sums":
        """Give the sums over one piece."""
        values = piece.double()
        sizes, signs = values.abs(), values.sign()
        present = signs.abs()
        number, magnitude = present.sum(0), sizes.sum(0)
        weights = torch.stack([torch.ones_like(magnitude), magnitude])
        return cls(
            values @ values.T,
            sizes @ sizes.T,
            signs @ signs.T,
            present @ present.T,
            weights @ (number > 1).double(),
            weights @ (number > signs.sum(0).abs()).double(),
        )

    def plus(self, other: "Sums") -> "Sums":
        """Give the sums over the entries of both."""
        return Sums(*(a + b for a, b in zip(self, other, strict=True)))

    def norms(self) -> Float[Tensor, " task"]:
        """Give each vector's Euclidean norm."""
        return self.products.diagonal().sqrt()

    def cosines(self) -> Float[Tensor, "task task"]:
        """Give the cosine of each pair; NaN beside a zero vector."""
        norms = self.norms()
        return (self.products / norms[:, None] / norms).clamp(-1, 1)

    def conflicts(self) -> Float[Tensor, "task task"]:
        """Give the share of opposite signs among the entries where both of a pair are not zero."""
        return (self.overlaps - self.agreements) / (2 * self.overlaps)

    def weighted_conflicts(self) -> Float[Tensor, "task task"]:
        """Give the same share with every entry counted as |v_a v_b|."""
        return ((self.sizes - self.products) / (2 * self.sizes)).clamp(0, 1)

    def conflict(self) -> Float[Tensor, "2"]:
        """Give the share of shared entries where signs disagree: by number, and by magnitude."""
        return self.conflicting / self.shared


class Spectra:
    """Gathers a matrix's Gram over the smaller side, for all tasks, from pieces of its flattened rows.

    Of a tall matrix only some rows are in memory; a wide one is assembled. A tensor of more axes counts
    as the matrix of its first axis against the others.

    Args:
        shape: ``(task, row, *column)``.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        tasks, rows, *columns = shape
        self.columns = math.prod(columns)
        self.wide = rows <= self.columns
        height = rows if self.wide else min(rows, max(_CHUNK // self.columns, 1))
        self._rows = torch.empty(tasks, height * self.columns)
        self._filled = 0
        side = min(rows, self.columns)
        self._grams = torch.zeros(tasks, side, side, dtype=torch.float64)

    @staticmethod
    def apply_to(shape: tuple[int, ...]) -> bool:
        """Tell whether ``(task, *param)`` are matrices of more than one row and column."""
        return len(shape) > 2 and min(shape[1], math.prod(shape[2:])) > 1

    def add(self, piece: Float[Tensor, "task entry"]) -> None:
        """Take the next entries of the flattened parameter."""
        while piece.shape[1]:
            part = piece[:, : self._rows.shape[1] - self._filled]
            self._rows[:, self._filled : self._filled + part.shape[1]] = part
            self._filled, piece = self._filled + part.shape[1], piece[:, part.shape[1] :]
            if self._filled == self._rows.shape[1]:
                self._flush()

    def ranks(self) -> Float[Tensor, "2 task"]:
        """Give effective and stable ranks (`ranks_of`) of what was added."""
        self._flush()
        return torch.stack([ranks_of(gram) for gram in self._grams], dim=1)

    def _flush(self) -> None:
        if not self._filled:
            return
        rows = self._rows[:, : self._filled].reshape(len(self._grams), -1, self.columns)
        for gram, matrix in zip(self._grams, rows, strict=True):
            long = matrix if self.wide else matrix.T
            for part in long.split(max(_CHUNK // len(long), 1), dim=1):
                wide = part.double()
                gram.addmm_(wide, wide.T)
        self._filled = 0


def ranks_of(gram: Float[Tensor, "side side"]) -> Float[Tensor, "2"]:
    """Give a matrix's effective rank and stable rank from its Gram matrix; 0 where it is zero.

    The effective rank (Roy & Vetterli, EUSIPCO 2007) is exp(entropy) of the singular values over their
    sum; the stable rank is ||M||_F^2 / ||M||_2^2.

    Args:
        gram: M M^T or M^T M in fp64; singular values below 1e-7 of the largest may be lost in it.
    """
    squares = torch.linalg.eigvalsh(gram).clamp(min=0)
    top = squares[-1]
    if top == 0:
        return squares.new_zeros(2)
    squares = squares.where(squares > len(gram) * torch.finfo(gram.dtype).eps * top, 0.0)
    shares = squares.sqrt() / squares.sqrt().sum()
    return torch.stack([torch.special.entr(shares).sum().exp(), squares.sum() / top])


class Measured(NamedTuple):
    """What one parameter's vectors gave.

    Attributes:
        sums: Sums over its entries.
        ranks: Effective and stable rank of each task's matrix; None of what is no matrix.
        equal: The pairs of tasks whose vectors are equal here.
    """

    sums: Sums
    ranks: Float[Tensor, "2 task"] | None
    equal: frozenset[tuple[int, int]]


def measure(block: Block, *, rank: bool, pairs: Iterable[tuple[int, int]]) -> Measured:
    """Measure one parameter, piece by piece.

    Args:
        block: Its vectors.
        rank: Whether to measure ranks, which cost far more than everything else.
        pairs: The pairs of tasks that may be equal.

    Raises:
        InputError: A value is not finite.
    """
    sums, equal = Sums.zero(block.shape[0]), frozenset(pairs)
    spectra = Spectra(block.shape) if rank and Spectra.apply_to(block.shape) else None
    for _, piece in block.pieces():
        equal = frozenset((a, b) for a, b in equal if torch.equal(piece[a], piece[b]))
        for part in piece.split(max(_PART // len(piece), 1), dim=1):
            sums = sums.plus(Sums.of(part))
        if spectra:
            spectra.add(piece)
    return Measured(sums, spectra.ranks() if spectra else None, equal)
