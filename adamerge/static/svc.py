"""Singular value calibration: directions that several tasks share are not counted several times."""

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from adamerge.errors import InputError
from adamerge.static.primitives.spectral import RANK_TOLERANCE, gram, is_matrix, product, square_norm, svd
from adamerge.static.registry import static_method


@static_method(
    title="Singular value calibration (SVC)", source="arXiv:2602.05536", scope="tensor", needs=("merged",)
)
def svc(
    vectors: Float[Tensor, "task *param"], *, merged: Float[Tensor, "*param"], floor: float = 0.1
) -> Float[Tensor, "*param"]:
    """Rescale the singular values of another method's merged matrices.

    Along each left singular vector of the merged matrix, the merged row is compared with every task's: its
    projection coefficient tells how much of the task's row it has. The singular value is divided by the
    mean of the coefficients, of which none counts less than the floor. A task that has nothing in a
    direction is not asked. Directions with equal singular values (after ``iso_c``: all of them), among
    which an SVD chooses arbitrarily, share their factor. Other tensors stay as they were merged.

    Args:
        vectors: fp32 task vectors.
        merged: The vector that the corrected method made of them.
        floor: Least coefficient that counts; positive.

    Returns:
        The corrected vector.

    Raises:
        InputError: ``floor`` is not positive.
    """
    if not floor > 0:
        raise InputError(f"floor={floor} is not positive.", "Use e.g. 0.1.")
    if not is_matrix(vectors):
        return merged
    left, values, right = svd(merged)
    rows, groups = (right * values).T, _groups(values)
    count, summed = torch.zeros_like(values), torch.zeros_like(values)
    for vector in vectors:
        own = gram(left, vector)
        square = _per_group(own.square(), groups)
        present = square > RANK_TOLERANCE**2 * square_norm(vector)
        coefficient = _per_group(own * rows, groups) / square.where(present, 1.0)
        count += present
        summed += present * coefficient.clamp(min=floor)
    change = torch.where(count > 0, count / summed, 1.0) - 1
    return product(left, change[:, None] * rows).add_(merged)


def _groups(values: Float[Tensor, " rank"]) -> Int64[Tensor, " rank"]:
    """Number the singular values, equal ones alike."""
    new = values[1:] < (1 - RANK_TOLERANCE) * values[:-1]
    return torch.cat([new.new_zeros(min(len(values), 1)), new]).cumsum(0)


def _per_group(terms: Float[Tensor, "rank any"], groups: Int64[Tensor, " rank"]) -> Float[Tensor, " rank"]:
    """Add up each row, and the rows of a group."""
    sums = terms.sum(1)
    return torch.zeros_like(sums).index_add_(0, groups, sums)[groups]
