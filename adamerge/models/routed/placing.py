"""Placing values that differ per sample beside activations; the register of torch functions."""

from collections.abc import Callable
from typing import Any, TypeVar

from jaxtyping import Float
from torch import Tensor

from adamerge.errors import InputError
from adamerge.models.routed.parameter import HANDLERS, RoutedParameter

Function = TypeVar("Function", bound=Callable[..., Any])
Parameter = Tensor | None


def handles(*functions: Any) -> Callable[[Function], Function]:
    """Register the decorated function for torch functions."""

    def add(handler: Function) -> Function:
        HANDLERS.update(dict.fromkeys(functions, handler))
        return handler

    return add


def scale(x: Tensor, by: Parameter, axis: int) -> Tensor:
    """Multiply by a parameter whose first axis belongs at ``axis``; None is 1."""
    return x if by is None else x * placed(by, x, axis)


def shift(x: Tensor, by: Parameter, axis: int, rows: Tensor | None = None) -> Tensor:
    """Add a parameter whose first axis belongs at ``axis``; None is 0."""
    return x if by is None else x + placed(by, x, axis, rows)


def placed(parameter: Tensor, x: Tensor, axis: int, rows: Tensor | None = None) -> Tensor:
    """Give a parameter's values with its first axis at ``axis`` of ``x``."""
    if not isinstance(parameter, RoutedParameter):
        return parameter.reshape(*parameter.shape, *[1] * (x.dim() - axis - parameter.dim())).to(x.dtype)
    own = parameter.own(rows)
    if own.dim() == 3 and parameter.dim() == 1:
        return own.to(x.dtype)  # routed row by row
    own = _repeated(own, parameter, x)
    before, after = axis - 1, x.dim() - axis - parameter.dim()
    return own.reshape(len(own), *[1] * before, *own.shape[1:], *[1] * after).to(x.dtype)


def aligned(parameter: RoutedParameter, x: Tensor) -> Tensor:
    """Line every sample's values up with activations, whose first axis is the batch.

    Raises:
        InputError: It is not, or the parameter has as many axes without it.
    """
    own = parameter.own()
    if own.dim() == x.dim() + 1 and own.shape[1] == 1:
        own = own[:, 0]
    if own.dim() > x.dim():
        raise InputError(
            f"{parameter.label}: values {[*parameter.shape]} meet activations {[*x.shape]}.",
            "Per-input merging needs the batch as the activations' first axis.",
        )
    own = _repeated(own, parameter, x)
    return own.reshape(len(own), *[1] * (x.dim() - own.dim()), *own.shape[1:])


def own_values(parameter: Tensor, x: Tensor) -> Tensor:
    """Give the values of a parameter that may be shared for each entry of the activations' first axis."""
    if isinstance(parameter, RoutedParameter):
        return _repeated(parameter.own(), parameter, x)
    return parameter.expand(len(x), *parameter.shape)


def _repeated(own: Tensor, parameter: RoutedParameter, x: Tensor) -> Tensor:
    """Repeat a sample's values for every entry that it has on the activations' first axis (windows)."""
    return own.repeat_interleave(len(x) // n_samples(x, parameter), 0)


def rows_of(x: Tensor, *parameters: Parameter) -> Float[Tensor, "sample row in"]:
    """See activations as rows of each sample."""
    return x.reshape(n_samples(x, *parameters), -1, x.shape[-1])


def n_samples(x: Tensor, *parameters: Parameter) -> int:
    """Give the samples of a batch.

    Raises:
        InputError: The activations' first axis is no multiple of it.
    """
    routed = next(p for p in parameters if isinstance(p, RoutedParameter))
    if len(x) % routed.n_samples:
        raise InputError(
            f"{routed.label}: activations of {len(x)} rows for {routed.n_samples} samples.",
            "Per-input merging needs the batch as the activations' first axis.",
        )
    return routed.n_samples


def read_sizes(given: tuple[Any, ...]) -> tuple[int, ...]:
    """Read sizes that are given one by one or as one sequence."""
    return tuple(given[0]) if len(given) == 1 and not isinstance(given[0], int) else tuple(given)


def label(*found: Any) -> str:
    """Name the routed parameters among arguments."""
    return ", ".join(x.label for x in found if isinstance(x, RoutedParameter)) or "a shared parameter"
