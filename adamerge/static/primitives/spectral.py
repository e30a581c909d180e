"""Singular values and vectors of task vectors, through the fp64 Gram matrix of their shorter side.

Products and a symmetric eigenproblem are faster than an SVD and, with fp32 entries squared in fp64, exact for
singular values down to a millionth of the largest. What is smaller counts as null. Null directions, of which
an SVD makes an arbitrary choice, are left out everywhere: only what is in the numerical range takes part.
"""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from adamerge.errors import InputError

OTHERS = ["*text_projection*"]  # what the authors of TSV-Merge and Iso-C do not merge as matrices
RANK_TOLERANCE = 1e-6  # of the largest singular value: above the rounding of fp32 and of a Gram matrix
_CHUNK = 2**22  # entries that are widened to fp64 at a time

Matrix = Float[Tensor, "row column"]
Square = Float[Tensor, "column column"]


class Spectrum(NamedTuple):
    """The singular values in the numerical range, falling, and their right singular vectors."""

    values: Float[Tensor, " rank"]
    basis: Float[Tensor, "column rank"]


class Triplets(NamedTuple):
    """Leading singular triplets in fp64: ``matrix ~ left @ diag(values) @ right.T``."""

    left: Float[Tensor, "row rank"]
    values: Float[Tensor, " rank"]
    right: Float[Tensor, "column rank"]


def is_matrix(vectors: Float[Tensor, "task *param"], name: str = "", others: Sequence[str] = ()) -> bool:
    """Say whether a parameter is merged as a matrix: two dimensions, and not only zeros.

    Of zeros nothing is to be decomposed: a LoRA expert has most of the base's matrices.

    Args:
        vectors: fp32 task vectors.
        name: The parameter's name.
        others: Patterns (``fnmatch``) of names that are not merged as matrices.
    """
    is_other = any(fnmatchcase(name, pattern) for pattern in others)
    return vectors.dim() == 3 and not is_other and bool(vectors.any())


def require_share(name: str, value: float) -> None:
    """Refuse a share outside [0, 1].

    Raises:
        InputError: The option and its value.
    """
    if not 0 <= value <= 1:
        raise InputError(f"{name}={value} is outside [0, 1].", "Use e.g. 0.5.")


def total(vectors: Float[Tensor, "task row column"]) -> Matrix:
    """Add up in fp64, in which the order of the tasks hardly ever shows."""
    result = torch.zeros(vectors.shape[1:], dtype=torch.float64)
    for vector in vectors:
        result += vector
    return result


def square_norm(vector: Float[Tensor, "*any"]) -> Float64[Tensor, ""]:
    """Add up the squares in fp64."""
    return torch.stack([piece.double().square().sum() for piece in vector.reshape(-1).split(_CHUNK)]).sum()


def tall(matrix: Matrix) -> Float[Tensor, "longer shorter"]:
    """Give the matrix, or its transpose, such that it has at least as many rows as columns."""
    return matrix if len(matrix) >= matrix.shape[1] else matrix.T


def gram(
    matrix: Float[Tensor, "row column"], other: Float[Tensor, "row any"] | None = None
) -> Float[Tensor, "column any"]:
    """Give ``matrix.T @ other`` (default: the matrix itself) in fp64."""
    other = matrix if other is None else other
    result = torch.zeros(matrix.shape[1], other.shape[1], dtype=torch.float64)
    for rows in _chunks(matrix, other.shape[1]):
        wide = matrix[rows].double()
        result.addmm_(wide.T, wide if other is matrix else other[rows].double())
    return result


def product(
    matrix: Float[Tensor, "row column"],
    right: Float[Tensor, "column any"],
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "row any"]:
    """Give ``matrix @ right``, computed in fp64 and rounded to ``dtype`` at the end."""
    right = right.double()
    result = torch.empty(len(matrix), right.shape[1], dtype=dtype)
    for rows in _chunks(matrix, right.shape[1]):
        result[rows] = matrix[rows].double() @ right
    return result


def spectrum(gram: Square, floor: float = 0.0) -> Spectrum:
    """Decompose a matrix that is given by its Gram matrix.

    Args:
        gram: fp64 ``matrix.T @ matrix``.
        floor: Singular values up to here count as zero, as do those of no more than `RANK_TOLERANCE` times
            the largest.
    """
    squares, basis = torch.linalg.eigh(gram)
    values = squares.clamp(min=0).sqrt().flip(0)
    limit = max(floor, RANK_TOLERANCE * values[0].item()) if len(values) else floor
    rank = int((values > limit).sum())
    return Spectrum(values[:rank], basis.flip(1)[:, :rank])


def svd(matrix: Matrix, most: int | None = None, floor: float = 0.0) -> Triplets:
    """Give the leading ``most`` singular triplets (default: all) of the numerical range, in fp64."""
    long = tall(matrix)
    values, short_side = spectrum(gram(long), floor)
    values, short_side = values[:most], short_side[:, :most]
    long_side = product(long, short_side / values, torch.float64)
    if long is matrix:
        return Triplets(long_side, values, short_side)
    return Triplets(short_side, values, long_side)


def orthogonal_product(parts: Triplets) -> Matrix:
    """Give ``P(left) @ diag(values) @ P(right).T`` in fp32.

    P gives the nearest matrix with orthonormal columns (the polar factor: U V' of an SVD U S V'), on the
    columns' numerical range.
    """
    left, values, right = parts
    middle = _inverse_root(gram(left)) * values @ _inverse_root(gram(right))
    return product(left, middle @ right.T)


def orthogonal_terms(parts: Sequence[Triplets]) -> Float[Tensor, "part row column"]:
    """Give what each part adds to the `orthogonal_product` of all of them side by side, in fp32."""
    joined, sizes = side_by_side(parts), [len(part.values) for part in parts]
    left, right = (
        product(columns, _inverse_root(gram(columns)), torch.float64).split(sizes, dim=1)
        for columns in (joined.left, joined.right)
    )
    return torch.stack([product(u * part.values, v.T) for u, part, v in zip(left, parts, right, strict=True)])


def side_by_side(parts: Sequence[Triplets]) -> Triplets:
    """Join triplets of several matrices."""
    return Triplets(*(torch.cat(part, dim=-1) for part in zip(*parts, strict=True)))


def _inverse_root(gram: Square) -> Square:
    values, basis = spectrum(gram)
    return basis / values @ basis.T


def _chunks(matrix: Matrix, columns: int) -> list[slice]:
    step = max(_CHUNK // max(matrix.shape[1], columns, 1), 1)
    return [slice(start, start + step) for start in range(0, len(matrix), step)]
