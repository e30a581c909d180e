"""A different mixture for every sample: dense vectors applied to activations in one batched pass.

For sample b the matrix is W_b = base + sum over tasks of weight[b, t] x vector[t]. Making it costs T products
an entry, using it one product an entry and row of the sample's activations; with dozens of rows (tokens)
making it is cheap, if it stays in the processor's cache: so it is made and used a few samples and output rows
at a time, and never kept, not even for the backward pass.
"""

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

_SAMPLES = 8  # whose matrices are made together
_ENTRIES = 2**17  # of each of them
_GPU_ENTRIES = 2**20
_FEW = 4  # samples for each distinct mixture, from which plain products by group are faster
_LARGE = 2**21  # multiplications from which oneDNN is worth its call
_ONEDNN: Any = getattr(
    torch.ops.mkldnn, "_linear_pointwise", None
)  # as torch.compile uses; not in all builds


def product(
    x: Float[Tensor, "*row in"], matrix: Float[Tensor, "out in"], onto: Tensor | None = None
) -> Float[Tensor, "*row out"]:
    """Give ``x @ matrix.T``, or the sum of ``onto`` and that, which may overwrite it; differentiable.

    For fp32 on a CPU torch takes MKL, which on AMD's processors reaches half of oneDNN's speed; so where
    nothing is differentiated, oneDNN multiplies.
    """
    if not _suits_onednn(x.numel() * len(matrix), x, matrix, x if onto is None else onto):
        y = functional.linear(x, matrix)
        return y if onto is None else onto.add_(y)
    if onto is None:
        return _ONEDNN(x, matrix, None, "none", [], "")
    return _ONEDNN.binary(x, onto, matrix, None, "add")


def _suits_onednn(count: int, *tensors: Tensor) -> bool:
    """Whether this many multiplications are many, and inference in fp32 on a CPU."""
    if _ONEDNN is None or count < _LARGE or torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
        return False
    learnt = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    return not learnt and all(x.dtype == torch.float32 and x.device.type == "cpu" for x in tensors)


def apply_dense(
    base: Float[Tensor, "out in"],
    vectors: Float[Tensor, "task out in"],
    x: Float[Tensor, "sample row in"],
    weights: Float[Tensor, "sample task"] | Float[Tensor, "sample row task"],
) -> Float[Tensor, "sample row out"]:
    """Apply every sample's own matrix to its rows; differentiable in ``x`` and ``weights``.

    Args:
        base: The shared matrix, in any floating dtype.
        vectors: One matrix per task.
        x: Rows of activations.
        weights: A mixture per sample, or per row.
    """
    dtype = compute_dtype(x)
    x, weights = x.to(dtype), weights.float()
    with torch.autocast(x.device.type, enabled=False):
        if weights.dim() == 3:
            return _by_row(base, vectors, x, weights)
        if not (weights.requires_grad or x.requires_grad or torch.compiler.is_compiling()):
            distinct, which = torch.unique(weights, dim=0, return_inverse=True)
            if _FEW * len(distinct) <= len(x):
                return _by_mixture(base, vectors, x, distinct, which)
        return _PerSample.apply(x, weights, base, vectors)


def compute_dtype(x: Tensor) -> torch.dtype:
    """Give the dtype of products: autocast's where it is on, else the activations' own."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def sample_values(
    base: Float[Tensor, "*param"],
    vectors: Float[Tensor, "task *param"],
    weights: Float[Tensor, "*batch task"],
) -> Float[Tensor, "..."]:
    """Give base + weighted sum of vectors for every sample in fp32, ``[*batch, *param]``."""
    with torch.autocast(base.device.type, enabled=False):
        stack, rows = vectors.reshape(len(vectors), -1).float(), weights.reshape(-1, len(vectors)).float()
        mixed = torch.addmm(base.reshape(1, -1).float(), rows, stack)
        return mixed.reshape((*weights.shape[:-1], *base.shape))


def _by_row(base: Tensor, vectors: Tensor, x: Tensor, weights: Tensor) -> Tensor:
    """Apply vectors only to the rows that want them."""
    y = product(x, base.to(x.dtype))
    for task, vector in enumerate(vectors):
        share = weights[..., task]
        wanted = share != 0
        if weights.requires_grad or torch.compiler.is_compiling() or bool(wanted.all()):
            y = y + product(share[..., None].to(x.dtype) * x, vector.to(x.dtype))
        elif bool(wanted.any()):
            rows = share[wanted][:, None].to(x.dtype) * x[wanted]
            y = y.index_put((wanted,), product(rows, vector.to(x.dtype)), accumulate=True)
    return y


def _by_mixture(base: Tensor, vectors: Tensor, x: Tensor, distinct: Tensor, which: Tensor) -> Tensor:
    """Make each distinct mixture once: one model for a uniform batch, T for hard routing."""
    y = x.new_empty(*x.shape[:2], len(base))
    for index, weight in enumerate(distinct):
        samples = (which == index).nonzero()[:, 0]
        matrix = sample_values(base, vectors, weight).to(x.dtype)
        y[samples] = product(x[samples], matrix)
    return y


class _PerSample(torch.autograd.Function):
    """Every sample's own matrix, made piece by piece in both directions."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, base: Tensor, vectors: Tensor) -> Tensor:
        ctx.save_for_backward(x, weights, base, vectors)
        y = x.new_empty(*x.shape[:2], len(base))
        for samples, outs, matrices in _matrices(x, weights, base, vectors):
            y[samples, :, outs] = _products(x[samples], matrices)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weights, base, vectors = ctx.saved_tensors
        gradient = gradients[0].to(x.dtype)
        wants_x, wants_weights = ctx.needs_input_grad[:2]
        of_x = torch.zeros_like(x) if wants_x else None
        of_weights = torch.zeros_like(weights) if wants_weights else None
        for samples, outs, matrices in _matrices(x, weights, base, vectors):
            part = gradient[samples, :, outs]
            if of_x is not None:
                of_x[samples] += torch.bmm(part, matrices)
            if of_weights is not None:
                outer = torch.bmm(part.mT, x[samples]).float().flatten(1)
                of_weights[samples] += outer @ vectors[:, outs].float().flatten(1).T
        return of_x, of_weights, None, None


def _products(
    x: Float[Tensor, "sample row in"], matrices: Float[Tensor, "sample out in"]
) -> Float[Tensor, "sample row out"]:
    """Apply each matrix to its sample's rows."""
    if _suits_onednn(x[0].numel() * matrices.shape[1], x, matrices):
        return torch.stack([product(rows, matrix) for rows, matrix in zip(x, matrices, strict=True)])
    return torch.bmm(x, matrices.mT)


def _matrices(
    x: Tensor, weights: Tensor, base: Tensor, vectors: Tensor
) -> Iterator[tuple[slice, slice, Float[Tensor, "sample out in"]]]:
    """Walk samples and output rows in pieces, with the matrices of each piece."""
    entries = _ENTRIES if x.device.type == "cpu" else _GPU_ENTRIES
    step = max(entries // base.shape[1], 1)
    for top in range(0, len(base), step):
        outs = slice(top, min(top + step, len(base)))
        start, stack = base[outs].float().reshape(1, -1), vectors[:, outs].float().flatten(1)
        for first in range(0, len(x), _SAMPLES):
            samples = slice(first, min(first + _SAMPLES, len(x)))
            made = torch.addmm(start, weights[samples], stack)
            yield samples, outs, made.reshape(-1, outs.stop - outs.start, base.shape[1]).to(x.dtype)
