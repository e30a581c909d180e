"""Iso-C: the summed task matrices with all singular values equal."""

import torch
from jaxtyping import Float
from torch import Tensor

from adamerge.static.primitives.spectral import (
    OTHERS,
    Matrix,
    gram,
    is_matrix,
    product,
    spectrum,
    tall,
    total,
)
from adamerge.static.registry import static_method, task_vector_edit

_TITLE, _SOURCE = "Isotropic merging in the common subspace (Iso-C)", "arXiv:2502.04959"
Short = Float[Tensor, "shorter shorter"]


@static_method(title=_TITLE, source=_SOURCE, scope="tensor", needs=("name",))
def iso_c(
    vectors: Float[Tensor, "task *param"], *, name: str, scale: float = 1.0, others: list[str] = OTHERS
) -> Float[Tensor, "*param"]:
    """Replace all singular values of the summed task matrices by their mean.

    Of a matrix without full rank only the numerical range takes part: its singular values become equal,
    null directions (of which an SVD chooses arbitrary ones) stay null, and the trace norm is kept. Every
    other tensor is the mean of the vectors, without the scale.

    The authors choose the scale on validation data. For 8 / 14 / 20 tasks they have 1.30 / 1.00 / 0.90 with
    ViT-B/32, 1.40 / 1.00 / 0.80 with ViT-B/16 and 1.50 / 1.30 / 1.00 with ViT-L/14.

    Args:
        vectors: fp32 task vectors.
        name: The parameter's name.
        scale: Coefficient of merged matrices.
        others: Patterns (``fnmatch``) of names whose matrices are treated as other tensors.

    Returns:
        The merged task vector.
    """
    if not is_matrix(vectors, name, others):
        return vectors.mean(0)
    summed = total(vectors)
    return _times(summed, _equalising(summed).mul_(scale))


@task_vector_edit(name="iso_c", title=_TITLE, source=_SOURCE, scope="tensor", needs=("name",))
def iso_c_terms(
    vectors: Float[Tensor, "task *param"], *, name: str, scale: float = 1.0, others: list[str] = OTHERS
) -> Float[Tensor, "task *param"]:
    """Give what each task adds to the method's merged vector: with coefficients of 1 the sum is that vector.

    What makes the singular values of the sum U S V' equal is linear in the tasks' matrices, U (s / S) U' with
    their mean s, and is applied to each; of every other tensor remains 1/T. Where tasks cancel one another,
    their terms are longer than their vectors. (Ours: the start of an adaptation, which learns one coefficient
    for each.)

    Args:
        vectors: fp32 task vectors.
        name: The parameter's name.
        scale: Coefficient of matrices.
        others: Patterns (``fnmatch``) of names whose matrices are treated as other tensors.

    Returns:
        The edited vectors.
    """
    if not is_matrix(vectors, name, others):
        return vectors / len(vectors)
    factor = _equalising(total(vectors)).mul_(scale)
    return torch.stack([_times(vector, factor) for vector in vectors])


def _equalising(matrix: Matrix) -> Short:
    """Give the square matrix, on the shorter side, that makes the singular values equal to their mean."""
    values, basis = spectrum(gram(tall(matrix)))
    return basis * (values.mean() / values) @ basis.T


def _times(matrix: Matrix, factor: Short) -> Matrix:
    """Multiply by a symmetric matrix from the shorter side."""
    long = tall(matrix)
    found = product(long, factor)
    return found if long is matrix else found.T
