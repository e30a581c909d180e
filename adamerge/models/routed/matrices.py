"""What matrix products, convolutions and attention do where weights differ per sample."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from adamerge.errors import InputError
from adamerge.models.routed.parameter import PerSample, RoutedParameter
from adamerge.models.routed.placing import Parameter, handles, label, n_samples, own_values, rows_of, shift


@handles(functional.linear)
def _linear(input: Tensor, weight: Tensor, bias: Parameter = None) -> Tensor:
    rows = rows_of(input, weight, bias)
    return _affine(rows, weight, bias).reshape(*input.shape[:-1], -1)


@handles(torch.matmul, Tensor.matmul, Tensor.__matmul__)
def _matmul(input: Tensor, other: Tensor) -> Tensor:
    if isinstance(input, RoutedParameter) or not isinstance(other, RoutedParameter) or other.dim() != 2:
        raise InputError(
            f"per-input merging does not know this matrix product with {label(input, other)}.",
            "It must be activations @ matrix. Leave the tensor out of the routing.",
        )
    rows = rows_of(input, other)
    return _affine(rows, other, None, transposed=True).reshape(*input.shape[:-1], -1)


@handles(torch.conv2d)
def _conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Parameter = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    n = n_samples(input, weight, bias)
    if groups != 1 or isinstance(padding, str):
        return _grouped_conv2d(input, weight, bias, stride, padding, dilation, groups)
    kernel = tuple(weight.shape[2:])
    patches = functional.unfold(input, kernel, dilation=dilation, padding=padding, stride=stride)
    rows = patches.mT.reshape(n, -1, patches.shape[1])
    y = _affine(rows, weight, bias).reshape(len(input), -1, len(weight)).mT
    height = _extent(input.shape[2], kernel[0], stride, padding, dilation, 0)
    return y.unflatten(2, (height, -1))


def _extent(size: int, kernel: int, stride: Any, padding: Any, dilation: Any, axis: int) -> int:
    stride, padding, dilation = ((v if isinstance(v, int) else v[axis]) for v in (stride, padding, dilation))
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def _grouped_conv2d(
    x: Tensor, weight: Tensor, bias: Parameter, stride: Any, padding: Any, dilation: Any, groups: int
) -> Tensor:
    """Give every sample its own groups: depthwise kernels are small enough to be made."""
    n = len(x)
    kernels = own_values(weight, x).flatten(0, 1).to(x.dtype)
    y = functional.conv2d(
        x.reshape(1, -1, *x.shape[2:]), kernels, None, stride, padding, dilation, n * groups
    )
    return shift(y.reshape(n, len(weight), *y.shape[2:]), bias, axis=1)


def _affine(
    rows: Float[Tensor, "sample row in"], weight: Tensor, bias: Parameter, *, transposed: bool = False
) -> Float[Tensor, "sample row out"]:
    """Apply matrix and bias; the bias goes the way of its matrix where both are routed."""
    if isinstance(weight, PerSample):
        own = weight.own().flatten(2)
        y = torch.bmm(rows, own if transposed else own.mT)
    elif isinstance(weight, RoutedParameter):
        weights = weight.mixing.weights(weight.label, weight.block, rows)
        y = weight.block.apply(rows, weights, transposed=transposed)
        if isinstance(bias, RoutedParameter) and not isinstance(bias, PerSample):
            own = bias.block.values(weights)
            return y + (own if own.dim() == 3 else own[:, None]).to(y.dtype)
    else:
        y = functional.linear(rows, weight.flatten(1))
    return shift(y, bias, axis=2, rows=rows)


@handles(functional.multi_head_attention_forward)
def _attention(
    query: Float[Tensor, "token sample dim"],
    key: Float[Tensor, "source sample dim"],
    value: Float[Tensor, "source sample value"],
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Parameter,
    in_proj_bias: Parameter,
    bias_k: Parameter,
    bias_v: Parameter,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Parameter,
    training: bool = True,
    key_padding_mask: Parameter = None,
    need_weights: bool = True,
    attn_mask: Parameter = None,
    use_separate_proj_weight: bool = False,
    **more: Any,
) -> tuple[Tensor, None]:
    unknown = (bias_k, bias_v, key_padding_mask, more.get("static_k"), more.get("static_v"))
    if any(x is not None for x in unknown) or add_zero_attn or use_separate_proj_weight or need_weights:
        raise InputError(
            f"per-input merging does not know this form of attention ({label(in_proj_weight)}).",
            "Packed projections without key padding, extra biases and returned weights are known.",
        )
    assert in_proj_weight is not None  # only separate projections lack it
    inputs = [x.transpose(0, 1) for x in (query, key, value)]  # the batch first
    if query is key and key is value:
        packed = _affine(inputs[0], in_proj_weight, in_proj_bias).chunk(3, -1)
    else:
        packed = [_affine(x, in_proj_weight, in_proj_bias).chunk(3, -1)[i] for i, x in enumerate(inputs)]
    heads = [x.unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in packed]
    if attn_mask is not None and attn_mask.dim() == 3:
        attn_mask = attn_mask.unflatten(0, (-1, num_heads))
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = ~attn_mask  # True forbids here, and allows there
    mixed = functional.scaled_dot_product_attention(
        *heads, attn_mask=attn_mask, dropout_p=dropout_p if training else 0.0, is_causal=False
    )
    joined = mixed.transpose(1, 2).flatten(2)
    return _affine(joined, out_proj_weight, out_proj_bias).transpose(0, 1), None
