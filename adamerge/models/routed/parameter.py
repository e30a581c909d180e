"""Per-input merging in one batched pass: parameters that stand for a different tensor for every sample.

A backbone runs as it is, with a `RoutedParameter` in place of each routed weight. Torch functions that meet
one compute what every sample's own weights would give, without ever making these: matrices through the
block's `apply`, small tensors (biases, norms, class tokens, position tables) sample by sample. The batch must
be the activations' first axis. What is not known here is refused by name, never guessed.
"""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils._pytree import tree_leaves

from adamerge.errors import InputError

HANDLERS: dict[Any, Callable[..., Any]] = {}  # filled by `handles`
_ATTRIBUTES = (
    *("shape", "dtype", "device", "ndim", "layout", "requires_grad", "grad", "is_leaf", "_base"),
    *("is_cuda", "is_meta", "is_nested", "is_sparse", "is_quantized", "is_mkldnn"),
)
_METHODS = (
    *("size", "dim", "numel", "__len__", "stride", "storage_offset", "untyped_storage"),
    *("is_floating_point", "is_complex", "is_conj", "is_neg", "_is_view"),
)
# What describes a tensor and not its values: model code, and torch.compile, may ask for it.
_FACTS = {getattr(Tensor, n).__get__ for n in _ATTRIBUTES} | {getattr(Tensor, n) for n in _METHODS}


@runtime_checkable
class Mixable(Protocol):
    """What is asked of a stored parameter; `adamerge.vectors.Block` offers it."""

    def base_tensor(self) -> Float[Tensor, "*param"]:
        """Give the shared tensor."""
        ...

    def dense(self) -> Float[Tensor, "task *param"]:
        """Give every task's vector in fp32."""
        ...

    def apply(
        self,
        x: Float[Tensor, "sample row in"],
        weights: Float[Tensor, "sample task"] | Float[Tensor, "sample row task"],
        *,
        transposed: bool = False,
    ) -> Float[Tensor, "sample row out"]:
        """Apply every sample's own matrix to its rows."""
        ...

    def values(self, weights: Float[Tensor, "*batch task"]) -> Float[Tensor, "..."]:
        """Give every sample's own tensor, ``[*batch, *param]``."""
        ...


@runtime_checkable
class Mixing(Protocol):
    """Gives the mixture of a parameter at the moment when it is used."""

    @property
    def n_samples(self) -> int:
        """Samples of the batch."""
        ...

    def weights(
        self, name: str, block: Mixable, rows: Float[Tensor, "sample row dim"] | None
    ) -> Float[Tensor, "sample task"] | Float[Tensor, "sample row task"]:
        """Give the weights of a parameter; ``rows`` is what it is applied to, where it is a matrix."""
        ...


class RoutedParameter(Tensor):
    """A parameter that differs from sample to sample.

    Its own entries are NaN: only the functions that know it can use it.
    """

    label: str
    mixing: Mixing
    block: Mixable

    @staticmethod
    def make(label: str, block: Mixable, mixing: Mixing) -> "RoutedParameter":
        """Stand for one parameter.

        Args:
            label: Its checkpoint name.
            block: Its stored form.
            mixing: Gives its mixture.
        """
        made = _blank(RoutedParameter, block.base_tensor())
        made.label, made.block, made.mixing = label, block, mixing
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compute what every sample's own parameter gives.

        Raises:
            InputError: The function is not known for parameters that differ per sample.
        """
        kwargs = kwargs or {}
        if func in HANDLERS:
            with torch._C.DisableTorchFunctionSubclass():
                return HANDLERS[func](*args, **kwargs)
        if func in _FACTS:
            return super().__torch_function__(func, types, args, kwargs)
        found = next(x for x in tree_leaves((args, kwargs)) if isinstance(x, RoutedParameter))
        name = torch.overrides.resolve_name(func) or func
        raise InputError(
            f"per-input merging does not know {name} on {found.label}.",
            "Leave this tensor out of the routing: exclude=['PATTERN'] keeps it the shared model's.",
        )

    @property
    def n_samples(self) -> int:
        """Samples of the batch."""
        return self.mixing.n_samples

    def own(self, rows: Tensor | None = None) -> Tensor:
        """Give every sample's values, ``[sample, *param]``."""
        return self.block.values(self.mixing.weights(self.label, self.block, rows))


class PerSample(RoutedParameter):
    """Values ``[sample, *shape]`` that model code sees as one tensor of that shape."""

    content: Tensor

    @staticmethod
    def of(label: str, content: Float[Tensor, "sample *shape"]) -> "PerSample":
        """Stand for values that model code has begun to reshape."""
        made = _blank(PerSample, content[0])
        made.label, made.content = label, content
        return made

    @property
    def n_samples(self) -> int:
        """Samples of the batch."""
        return len(self.content)

    def own(self, rows: Tensor | None = None) -> Tensor:
        """Give the values."""
        return self.content


def _blank(kind: Any, like: Tensor) -> Any:
    blank = torch.full((), torch.nan, device=like.device).expand(like.shape)
    return torch.Tensor._make_subclass(kind, blank)  # pyright: ignore[reportPrivateUsage]  # as torch's guide to subclasses does
