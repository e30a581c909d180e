"""The closed form of RegMean (arXiv:2212.09849): the matrix nearest to all experts on their own inputs."""

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from adamerge.errors import InputError, NumericError

_RIDGES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2)  # the first lies just above the rounding of fp32 Gram matrices


def regression_mean(
    vectors: Float[Tensor, "task *param"], gram: Float[Tensor, "task in in"] | None, shrink: float
) -> Float[Tensor, "*param"]:
    """Minimise the sum over tasks of |X_t W_t' - X_t W'|^2 in fp64, given G_t = X_t' X_t / n.

    The mean plus a correction is solved for, so inputs that no expert saw keep the mean, and the ridge
    (relative to each input's own variance) pulls towards it.

    Args:
        vectors: fp32 task vectors: of a matrix ``[out, in]`` or, used as ``x @ W``, ``[in, out]``;
            others are averaged.
        gram: Gram matrices of the inputs; None: the vectors are averaged.
        shrink: Factor of the off-diagonal entries of the Gram matrices, in [0, 1].

    Raises:
        InputError: ``shrink`` is outside [0, 1].
        NumericError: The Gram matrices are not positive semi-definite.
    """
    if not 0 <= shrink <= 1:
        raise InputError(f"shrink={shrink} is outside [0, 1].", "Use e.g. 0.95.")
    mean = vectors.mean(0)
    if gram is None or mean.dim() != 2 or len(vectors) == 1:
        return mean
    is_transposed = mean.shape[1] != gram.shape[1]
    total, target = torch.zeros(gram.shape[1:], dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for one, vector in zip(gram, vectors, strict=True):
        shrunk = shrink * one.double()
        shrunk.diagonal().copy_(one.diagonal())
        deviation = (vector - mean).double()
        target = target + shrunk @ (deviation if is_transposed else deviation.T)
        total += shrunk
    correction = _solve(total, target).float()
    return mean + (correction if is_transposed else correction.T)


def _solve(system: Float64[Tensor, "in in"], target: Float64[Tensor, "in out"]) -> Float64[Tensor, "in out"]:
    """Solve a positive semi-definite system; of what is left open, the smallest solution."""
    diagonal = system.diagonal()
    scale = torch.where(diagonal > 0, diagonal, 1.0).rsqrt()
    unit = scale[:, None] * system * scale
    for ridge in _RIDGES:
        unit.diagonal().add_(ridge)
        factor, failed = torch.linalg.cholesky_ex(unit)
        if not failed:
            return scale[:, None] * torch.cholesky_solve(scale[:, None] * target, factor)
    raise NumericError("the Gram matrices are not positive semi-definite.", "Collect them anew.")
