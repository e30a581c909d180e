"""Gram matrices of the inputs of linear weights, seen in the matrix products of any forward pass."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from adamerge.errors import NumericError
from adamerge.models.base import Backbone
from adamerge.state import State

_ATEN = torch.ops.aten
_LEFT = {_ATEN.mm.default: 0, _ATEN.bmm.default: 0, _ATEN.addmm.default: 1, _ATEN.baddbmm.default: 1}


@dataclass(frozen=True)
class Trace:
    """What one forward pass tells of the weights.

    Attributes:
        sizes: Entries of every weight that is used, in the order of first use.
        inputs: Number of inputs of every linear weight, in the same order.
        uses: How often a forward pass multiplies by each of these.
    """

    sizes: dict[str, int]
    inputs: dict[str, int]
    uses: dict[str, int]


def trace(backbone: Backbone, weights: State, inputs: Tensor) -> Trace:
    """Run one forward pass and note which weights it uses, and how."""
    tracer = _Tracer(weights)
    with torch.no_grad(), plain_attention(), tracer:
        backbone.features(weights, inputs)
    return tracer.found


def gram_matrices(
    backbone: Backbone, weights: State, batches: Iterable[Tensor], uses: Mapping[str, int]
) -> dict[str, Float[Tensor, "in in"]]:
    """Collect X'X / n of the inputs X, one row per token, of linear weights.

    Args:
        backbone: The model.
        weights: All tensors that it reads.
        batches: Inputs of the model.
        uses: The weights that are wanted, and how often a forward pass uses each (see `trace`): it is
            left when all have been seen.

    Returns:
        fp32, on the CPU.

    Raises:
        NumericError: An input of a weight is not finite.
    """
    collector = _Collector(weights, uses)
    for batch in batches:
        collector.awaited = sum(uses.values())
        with torch.no_grad(), suppress(_AllSeen), plain_attention(), collector:
            backbone.features(weights, batch)
    return {name: collector.mean(name) for name in uses}


class _Products(TorchDispatchMode):
    """Sees every product with a linear weight, also where no module's forward is called.

    A weight is known by its address, which views such as the transposed one share.
    """

    def __init__(self, weights: State) -> None:
        super().__init__()
        self.weights = weights
        self.names = {weight.data_ptr(): name for name, weight in weights.items() if weight.numel()}

    def see(self, name: str, rows: Float[Tensor, "row in"]) -> None:
        """Look at the inputs of one product."""
        raise NotImplementedError

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _LEFT:
            left, right = args[_LEFT[func] : _LEFT[func] + 2]
            name = self.names.get(right.data_ptr())
            if name is not None and _is_whole(right, self.weights[name]):
                self.see(name, left.reshape(-1, left.shape[-1]))
        return func(*args, **(kwargs or {}))


class _Tracer(_Products):
    def __init__(self, weights: State) -> None:
        super().__init__(weights)
        self.found = Trace({}, {}, {})

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for value in tree_leaves((args, kwargs)):
            name = self.names.get(value.data_ptr()) if isinstance(value, Tensor) else None
            if name is not None:
                self.found.sizes[name] = self.weights[name].numel()
        return super().__torch_dispatch__(func, types, args, kwargs)

    def see(self, name: str, rows: Float[Tensor, "row in"]) -> None:
        self.found.inputs[name] = rows.shape[1]
        self.found.uses[name] = self.found.uses.get(name, 0) + 1


class _Collector(_Products):
    def __init__(self, weights: State, wanted: Iterable[str]) -> None:
        super().__init__(weights)
        self.sums: dict[str, Tensor | float] = dict.fromkeys(wanted, 0.0)
        self.counts: Counter[str] = Counter()
        self.awaited = 0

    def see(self, name: str, rows: Float[Tensor, "row in"]) -> None:
        if name not in self.sums:
            return
        self.sums[name] = self.sums[name] + rows.T @ rows
        self.counts[name] += len(rows)
        self.awaited -= 1
        if self.awaited == 0:
            raise _AllSeen

    def mean(self, name: str) -> Float[Tensor, "in in"]:
        gram = torch.as_tensor(self.sums[name]) / self.counts[name]
        if not torch.isfinite(gram).all():
            raise NumericError(
                f"inputs of {name} are not finite.", "Does this expert give finite features for its images?"
            )
        return gram.cpu()


class _AllSeen(Exception):  # it leaves a forward pass early and is no error
    """What was wanted of a forward pass has been seen."""


def _is_whole(right: Tensor, weight: Tensor) -> bool:
    """Tell whether the right factor of a product is all of a weight ``[out, in]``, transposed.

    A weight that is stored as ``[in, out]`` and used as it is (CLIP's last projection) counts too, unless
    it is square: whoever uses the Gram matrix could not tell the two apart.
    """
    if right.dim() == 3:  # one and the same matrix for every item of a batch
        right = right[0]
    if weight.dim() != 2 or right.numel() != weight.numel():
        return False
    if weight.shape[0] == weight.shape[1]:
        return right.stride() == weight.T.stride()
    return right.shape in (weight.shape, weight.T.shape)


@contextmanager
def plain_attention() -> Iterator[None]:
    """Keep torch from computing a whole attention module in one operation, which would hide its products."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
