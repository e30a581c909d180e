"""WUDI-Merging: the merged vector that interferes least with the tasks' own row spaces."""

from typing import Literal, get_args

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from adamerge.errors import InputError
from adamerge.static.primitives.selection import require_choice
from adamerge.static.primitives.spectral import (
    Matrix,
    Square,
    gram,
    is_matrix,
    product,
    spectrum,
    square_norm,
)
from adamerge.static.registry import static_method, task_vector_edit

_TITLE, _SOURCE = "WUDI-Merging", "arXiv:2503.08099"
Solver = Literal["adam", "closed_form"]
Stack = Float[Tensor, "task row column"]
Weights = Float64[Tensor, " task"]  # one over the squared norm of each task's vector
Below = Float64[Tensor, "below below"]  # rows of all tasks one below the other
_WELL_CONDITIONED = 1e-5  # least entry on a Cholesky factor's diagonal, relative to the largest


@static_method(title=_TITLE, source=_SOURCE, scope="tensor")
def wudi(
    vectors: Float[Tensor, "task *param"],
    *,
    solver: Solver = "adam",
    steps: int = 300,
    lr: float = 1e-5,
) -> Float[Tensor, "*param"]:
    """Minimise, over the merged matrix m, the sum over tasks of |(m - v_t) v_t'|^2 / |v_t|^2.

    The gradient at m is 2 sum_t (m - v_t) G_t with G_t = v_t' v_t / |v_t|^2, in x in: what RegMean has of
    data, this has of the vectors themselves. "adam" starts at the sum of the vectors and stops early, as
    published; "closed_form" gives the minimum nearest to the sum (a minimum is not unique where the G_t
    together have null directions). A vector of zeros takes no part. Other tensors are the mean.

    A step of Adam costs one product with an in x in matrix: on a CPU, hours for a model of 1 B parameters,
    where the closed form takes minutes.

    Args:
        vectors: fp32 task vectors.
        solver: "adam" or "closed_form".
        steps: Steps of Adam.
        lr: Adam's learning rate.

    Returns:
        The merged task vector.

    Raises:
        InputError: An option is out of its range.
    """
    require_choice("solver", solver, get_args(Solver))
    if steps < 0 or not lr > 0:
        raise InputError(f"steps={steps} with lr={lr} leads nowhere.", "Use e.g. steps=300 and lr=1e-5.")
    if not is_matrix(vectors):
        return vectors.mean(0)
    weights = _weights(vectors)
    move = _newton(vectors, weights) if solver == "closed_form" else _descend(vectors, weights, steps, lr)
    return move.add_(vectors.sum(0))


@task_vector_edit(name="wudi", title=_TITLE, source=_SOURCE, scope="tensor")
def wudi_terms(vectors: Float[Tensor, "task *param"]) -> Float[Tensor, "task *param"]:
    """Give what each task adds to the closed form: with coefficients of 1 the sum is the merged vector.

    The minimum is m = (sum_t v_t G_t) C^+ with the curvature C = sum_t G_t; a task's term is v_t G_t C^+. Of
    other tensors remains 1/T. (Ours: the start of an adaptation, which learns one coefficient for each.)

    Args:
        vectors: fp32 task vectors.

    Returns:
        The edited vectors.
    """
    if not is_matrix(vectors):
        return vectors / len(vectors)
    weights = _weights(vectors)
    if _is_wide(vectors):
        return _wide_terms(vectors, weights)
    grams = [weight * gram(vector) for vector, weight in zip(vectors, weights, strict=True)]
    inverse = _pseudo_inverse(torch.stack(grams).sum(0))
    return torch.stack([product(v, own @ inverse) for v, own in zip(vectors, grams, strict=True)])


def _wide_terms(vectors: Stack, weights: Weights) -> Stack:
    """Give the terms by the smaller of two square matrices, as `_newton` does."""
    below, scales, inverse = _outer(vectors, weights)
    grams = [gram(vector.T) for vector in vectors]
    rows = (scales[:, None] * inverse * scales).split(vectors.shape[1])
    return torch.stack([product(below.T, (own @ r).T).T for own, r in zip(grams, rows, strict=True)])


def _weights(vectors: Stack) -> Weights:
    squares = torch.stack([square_norm(vector) for vector in vectors])
    return torch.where(squares > torch.finfo(torch.float32).tiny, 1 / squares, 0.0)


def _is_wide(vectors: Stack) -> bool:
    tasks, rows, columns = vectors.shape
    return columns > tasks * rows


def _descend(vectors: Stack, weights: Weights, steps: int, lr: float) -> Matrix:
    """Give how far Adam moves from the sum: fp32 holds that more finely than where it gets."""
    half_slope, half_curvature = _system(vectors, weights)
    slope = 2 * half_slope.float()
    curvature = None if half_curvature is None else 2 * half_curvature.float()
    del half_slope, half_curvature  # in fp64, they are larger than all that follows
    move = torch.zeros_like(slope)
    move.grad = torch.empty_like(slope)
    optimizer = torch.optim.Adam([move], lr=lr, fused=True)
    for _ in range(steps):
        move.grad.copy_(slope)
        if curvature is not None:
            move.grad.addmm_(move, curvature)
        else:
            for vector, weight in zip(vectors, weights.tolist(), strict=True):
                move.grad.addmm_(move @ vector.T, vector, alpha=2 * weight)
        optimizer.step()
    return move


def _newton(vectors: Stack, weights: Weights) -> Matrix:
    """Give the way from the sum to the minimum: minus the slope times the curvature's pseudo-inverse.

    Of wide matrices, with B the scaled vectors one below the other, the curvature is B'B and the slope has
    a form D B; and D B (B'B)^+ = D (B B')^+ B, by the smaller of two square matrices.
    """
    slope, curvature = _system(vectors, weights)
    if curvature is not None:
        return product(slope, -_pseudo_inverse(curvature))
    below, scales, inverse = _outer(vectors, weights)
    others = [gram((vectors.sum(0) - vector).T, vector.T) for vector in vectors]
    solved = torch.cat(others, dim=1) * scales @ inverse * scales
    return product(below.T, -solved.T).T


def _outer(
    vectors: Stack, weights: Weights
) -> tuple[Float[Tensor, "below column"], Float64[Tensor, " below"], Below]:
    """Give the vectors one below the other, the scales of their rows, and (B B')^+ of the scaled ones."""
    below = vectors.flatten(0, 1)
    scales = weights.sqrt().repeat_interleave(vectors.shape[1])
    return below, scales, _pseudo_inverse(gram(below.T) * scales * scales[:, None])


def _system(vectors: Stack, weights: Weights) -> tuple[Float64[Tensor, "row column"], Square | None]:
    """Give half the gradient at the sum, and the sum of the G_t (None where it is not to be formed).

    The former is exactly 0 where one task alone is at work.
    """
    rows, columns = vectors.shape[1:]
    start = vectors.sum(0)
    slope = torch.zeros_like(start, dtype=torch.float64)
    curvature = None if _is_wide(vectors) else torch.zeros(columns, columns, dtype=torch.float64)
    for vector, weight in zip(vectors, weights, strict=True):
        others = start - vector
        if rows < columns:
            slope += product(vector.T, weight * gram(vector.T, others.T), torch.float64).T
        if curvature is not None:
            own = gram(vector).mul_(weight)
            curvature += own
            if rows >= columns:
                slope += product(others, own, torch.float64)
    return slope, curvature


def _pseudo_inverse(curvature: Square) -> Square:
    factor, failed = torch.linalg.cholesky_ex(curvature)
    diagonal = factor.diagonal()
    if not failed and diagonal.min() > _WELL_CONDITIONED * diagonal.max():
        return torch.cholesky_inverse(factor)
    values, basis = spectrum(curvature)
    return basis / values.square() @ basis.T
