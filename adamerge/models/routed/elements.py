"""What norms, embeddings, sums and shapes do where a parameter differs per sample."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn import functional

from adamerge.errors import InputError
from adamerge.models.routed.parameter import PerSample, RoutedParameter
from adamerge.models.routed.placing import (
    Parameter,
    aligned,
    handles,
    label,
    placed,
    read_sizes,
    scale,
    shift,
)


@handles(functional.layer_norm)
def _layer_norm(
    input: Tensor,
    normalized_shape: Any,
    weight: Parameter = None,
    bias: Parameter = None,
    eps: float = 1e-5,
) -> Tensor:
    normed = functional.layer_norm(input, normalized_shape, None, None, eps)
    first = input.dim() - len(normalized_shape)
    return shift(scale(normed, weight, axis=first), bias, axis=first)


@handles(functional.group_norm)
def _group_norm(
    input: Tensor,
    num_groups: int,
    weight: Parameter = None,
    bias: Parameter = None,
    eps: float = 1e-5,
) -> Tensor:
    normed = functional.group_norm(input, num_groups, None, None, eps)
    return shift(scale(normed, weight, axis=1), bias, axis=1)


@handles(functional.batch_norm)
def _batch_norm(
    input: Tensor,
    running_mean: Parameter,
    running_var: Parameter,
    weight: Parameter = None,
    bias: Parameter = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if training or running_mean is None or running_var is None:
        raise InputError("batch norm of routed parameters has no batch statistics.", "Use model.eval().")
    wide = input.float()  # as torch does inside
    mean, variance = (placed(x, wide, axis=1) for x in (running_mean, running_var))
    normed = (wide - mean) * (variance + eps).rsqrt()
    return shift(scale(normed, weight, axis=1), bias, axis=1).to(input.dtype)


@handles(functional.embedding)
def _embedding(
    input: Int[Tensor, "..."],
    weight: RoutedParameter,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    *_: Any,
    **__: Any,
) -> Tensor:
    if max_norm is not None:
        raise InputError(f"per-input merging does not know max_norm of the embedding {weight.label}.")
    weights = weight.mixing.weights(weight.label, weight.block, None)
    base, vectors = weight.block.base_tensor().float(), weight.block.dense()
    if input.dim() > 1 and len(input) == weight.n_samples:
        rows = vectors[:, input].transpose(0, 1).flatten(2)
        mixed = torch.bmm(weights[:, None], rows)[:, 0]
        return base[input] + mixed.reshape(*input.shape, -1)
    own = base[input] + torch.tensordot(weights, vectors[:, input], 1)  # the same places for all samples
    return own[:, 0] if input.dim() > 1 and len(input) == 1 else PerSample.of(weight.label, own)


@handles(torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__)
def _add(input: Any, other: Any) -> Tensor:
    return _elementwise(torch.add, input, other)


@handles(torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__)
def _mul(input: Any, other: Any) -> Tensor:
    return _elementwise(torch.mul, input, other)


def _elementwise(function: Callable[[Tensor, Tensor], Tensor], a: Any, b: Any) -> Tensor:
    parameter = a if isinstance(a, RoutedParameter) else b
    other = b if parameter is a else a
    if not isinstance(other, Tensor) or other.dim() == 0:
        return PerSample.of(parameter.label, function(parameter.own(), torch.as_tensor(other)))
    if isinstance(other, RoutedParameter):
        raise InputError(f"per-input merging does not know sums and products of parameters ({label(a, b)}).")
    return function(other, aligned(parameter, other).to(other.dtype))


@handles(Tensor.to, Tensor.type, Tensor.float, Tensor.contiguous, Tensor.detach, Tensor.clone, Tensor.type_as)
def _same(input: Tensor, *_: Any, **__: Any) -> Tensor:
    return input


@handles(Tensor.view, Tensor.reshape, torch.reshape)
def _reshape(input: RoutedParameter, *shape: Any) -> Tensor:
    own, wanted = input.own(), read_sizes(shape)
    return PerSample.of(input.label, own.reshape(len(own), *wanted))


@handles(Tensor.unsqueeze, torch.unsqueeze)
def _unsqueeze(input: RoutedParameter, dim: int) -> Tensor:
    return PerSample.of(input.label, input.own().unsqueeze(dim if dim < 0 else dim + 1))


@handles(Tensor.expand)
def _expand(input: RoutedParameter, *sizes: Any) -> Tensor:
    """Give every sample its own copy; the first axis must be the batch."""
    own, wanted = input.own(), read_sizes(sizes)
    if len(wanted) == own.dim() - 1 and own.shape[1] == 1:
        own = own[:, 0]
    if len(wanted) < own.dim() or wanted[0] != len(own):
        raise InputError(
            f"per-input merging does not know how {input.label} is expanded to {[*wanted]}.",
            "The first axis must be the batch. Leave the tensor out of the routing.",
        )
    own = own.reshape(len(own), *[1] * (len(wanted) - own.dim()), *own.shape[1:])
    return own.expand(len(own), *wanted[1:])


@handles(Tensor.__getitem__)
def _getitem(input: RoutedParameter, index: Any) -> Tensor:
    index = index if isinstance(index, tuple) else (index,)
    return PerSample.of(input.label, input.own()[(slice(None), *index)])
