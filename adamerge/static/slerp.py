"""SLERP: spherical interpolation, between two experts or among many."""

import math
from typing import Literal, get_args

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from adamerge.errors import InputError
from adamerge.static.primitives.angles import row_products
from adamerge.static.primitives.selection import require_choice
from adamerge.static.registry import static_method

On = Literal["weights", "task_vector"]
Many = Literal["karcher", "chain"]
_PARALLEL, _ZERO = 0.9995, 1e-8  # beyond these, the line replaces the arc
_CANCELLED = 1e-7  # of its parts' lengths: a sum that is shorter is rounding
_STEPS, _STILL = 100, 1e-12  # the Karcher mean converges in a few steps unless the experts are far apart
_ROUNDING = 1e-9  # of a sum of coefficients; far below what fp32 can hold of a weight


@static_method(
    title="Spherical linear interpolation, as Arcee's MergeKit has it",
    source="arXiv:2403.13257",
    scope="tensor",
    needs=("base",),
    ordered=True,
)
def slerp(
    vectors: Float[Tensor, "task *param"],
    *,
    base: Float[Tensor, "*param"],
    t: float = 0.5,
    on: On = "weights",
    many: Many = "karcher",
) -> Float[Tensor, "*param"]:
    """Walk from the first expert to the second along the arc between them, tensor by tensor.

    The tensors' own lengths are interpolated with their directions. Nearly parallel or opposite tensors
    (|cos| > 0.9995), and zeros, are interpolated along the line.

    Args:
        vectors: fp32 task vectors.
        base: The base's tensor, fp32.
        t: Where to stop: 0 is the first expert, 1 the second.
        on: What is interpolated: the experts' weights, or their task vectors.
        many: How more than two experts are merged: "karcher" (the Karcher mean of their directions, with
            the mean of their lengths; all weigh the same), or "chain" (the k-th expert is joined to the
            merge of those before it at t = 1/k; the order matters).

    Returns:
        The merged task vector.

    Raises:
        InputError: An option is out of its range, or t was chosen for more than two experts.
    """
    _require_options(t, on, many, len(vectors))
    if len(vectors) == 1:
        return vectors[0].clone()
    origin = torch.zeros_like(base) if on == "task_vector" else base
    products = row_products(vectors, origin).sum(0)  # arcs are computed on coefficients alone
    if len(vectors) == 2:
        weights = _arc(torch.eye(2, dtype=torch.float64), products, t)
    else:
        weights = _karcher(products) if many == "karcher" else _chain(products)
    surplus = weights.sum().item() - 1
    # Differences from the first: equal experts merge to exactly themselves.
    merged = torch.lerp(vectors[0], vectors[1], weights[1].item())
    for weight, vector in zip(weights[2:].tolist(), vectors[2:], strict=True):
        merged.add_(vector - vectors[0], alpha=weight)
    if abs(surplus) >= _ROUNDING:
        merged.add_(vectors[0], alpha=surplus).add_(origin, alpha=surplus)
    return merged


def _require_options(t: float, on: str, many: str, n_tasks: int) -> None:
    if not 0 <= t <= 1:
        raise InputError(f"t={t} is outside [0, 1].", "0 is the first expert, 1 the second.")
    if n_tasks > 2 and t != 0.5:
        raise InputError(
            f"t={t} was chosen for {n_tasks} experts.", "More than two all weigh the same: leave t out."
        )
    require_choice("on", on, get_args(On))
    require_choice("many", many, get_args(Many))


def _arc(
    ends: Float64[Tensor, "end task"], products: Float64[Tensor, "task task"], t: float
) -> Float64[Tensor, " task"]:
    """Interpolate between two points that are given as coefficients of the experts."""
    inner = ends @ products @ ends.T
    lengths = inner.diagonal().clamp(min=0).sqrt()
    start, stop = 1 - t, t
    shortest = _CANCELLED * (ends.abs() @ products.diagonal().sqrt())
    if (lengths > shortest.clamp(min=_ZERO)).all():
        cosine = (inner[0, 1] / lengths.prod()).item()
        if abs(cosine) <= _PARALLEL:
            angle = math.acos(cosine)
            start, stop = (math.sin(share * angle) / math.sin(angle) for share in (1 - t, t))
    return start * ends[0] + stop * ends[1]


def _chain(products: Float64[Tensor, "task task"]) -> Float64[Tensor, " task"]:
    experts = torch.eye(len(products), dtype=torch.float64)
    merged = experts[0]
    for k, expert in enumerate(experts[1:], 2):
        merged = _arc(torch.stack([merged, expert]), products, 1 / k)
    return merged


def _karcher(products: Float64[Tensor, "task task"]) -> Float64[Tensor, " task"]:
    """Give the point of the sphere from which the directions' mean in the tangent plane is zero."""
    average = torch.full((len(products),), 1 / len(products), dtype=torch.float64)
    lengths = products.diagonal().sqrt()
    if lengths.min() <= _ZERO:
        return average
    cosines = products / lengths.outer(lengths)
    if average @ cosines @ average <= _ZERO**2:
        return average  # the directions cancel: no point of the sphere is nearest
    mean = average
    for _ in range(_STEPS):
        mean = mean / (mean @ cosines @ mean).sqrt()
        angles = (cosines @ mean).clamp(-1, 1).acos()
        shrunk = torch.sinc(angles / math.pi)  # sin(angle) / angle
        pull = torch.where(shrunk > _ZERO, average / shrunk, 0.0)  # an opposite direction pulls nowhere
        tangent = pull - (pull @ angles.cos()) * mean
        size = (tangent @ cosines @ tangent).clamp(min=0).sqrt().item()
        if size < _STILL:
            break
        mean = math.cos(size) * mean + math.sin(size) / size * tangent
    return mean * lengths.mean() / lengths
