"""Layers of a classifier that its base lacks (a pooler, a dense layer): they are part of an expert's head."""

import copy
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

_PROBES = 2  # rows of the probe; features of another number of rows show whether they are mixed
Inputs = Mapping[str, Tensor]


class UpTo(nn.Module):
    """A model whose output is what one of its layers reads; that layer and those after it hold nothing.

    Args:
        model: The model.
        layer: Name of the layer.
    """

    def __init__(self, model: nn.Module, layer: str) -> None:
        super().__init__()
        self.model, self.layer = model, layer

    def forward(self, *args: Any, **values: Any) -> Float[Tensor, "input dim"]:
        """Compute the model, and return the layer's input."""
        self.model(*args, **values)
        reader: Any = self.model.get_submodule(self.layer)
        features, reader.features = reader.features, None
        return features


class OwnModel(nn.Module):
    """The part of a library's classifier behind its encoder, computed by the library's own code.

    Modules before it give what they gave once, to a probe; the first layer reads features instead.

    Args:
        model: The classifier, whose last layer is an identity, with constants in the encoder's place.
        first: Name of the first layer of the part.
        names: Names of the part's tensors.
        inputs: The probe.
        dim: Size of what the first layer reads.
    """

    def __init__(
        self, model: nn.Module, first: str, names: tuple[str, ...], inputs: Inputs, dim: int
    ) -> None:
        super().__init__()
        self.model, self.first, self.names, self.inputs, self.dim = model, first, names, inputs, dim
        self._features: Tensor | None = None
        model.get_submodule(first).register_forward_pre_hook(lambda _, args: (self._features, *args[1:]))

    def forward(self, features: Float[Tensor, "input dim"]) -> Float[Tensor, "input hidden"]:
        """Return what the last layer reads."""
        self._features = features
        try:
            return self.model(**self.inputs).logits
        finally:
            self._features = None


@dataclass(frozen=True)
class OwnLayers:
    """One expert's layers between features and its last layer.

    Attributes:
        model: Computes them.
        tensors: Their values, by the library's names.
    """

    model: OwnModel
    tensors: Mapping[str, Tensor]

    @property
    def dim(self) -> int:
        """Size of the features."""
        return self.model.dim

    def __call__(self, features: Float[Tensor, "input dim"]) -> Float[Tensor, "input hidden"]:
        """Compute what the last layer reads."""
        values = {f"model.{name}": tensor for name, tensor in self.tensors.items()}
        return functional_call(self.model, values, (features,))

    def to(self, device: torch.device) -> "OwnLayers":
        """Return the layers on a device."""
        return replace(self, tensors={name: tensor.to(device) for name, tensor in self.tensors.items()})


def split_own_layers(
    model: nn.Module, missing: Collection[str], inputs: Inputs
) -> tuple[nn.Module, OwnModel] | None:
    """Part a classifier where the tensors begin that its base lacks.

    Args:
        model: The classifier with values, whose last layer is an identity.
        missing: Names of the tensors that the base lacks.
        inputs: Two rows of inputs of the model.

    Returns:
        The model up to there, which is changed, and what comes after; None where there is no such place:
        the first of these layers reads no pooled features ``[input, dim]``.
    """
    layers = {name.rpartition(".")[0] for name in missing}
    calls = _calls(model, inputs)
    if calls is None:
        return None
    order = [call.name for call in calls]
    first = next((i for i, name in enumerate(order) if name in layers), None)
    if first is None or len(calls[first].shape) != 2 or calls[first].shape[0] != _PROBES:
        return None
    own = set(order[first:])
    if own & set(order[:first]):
        return None
    own_model = _own_model(model, order[first], own, inputs, calls[first].shape[1])
    for name in own | layers:
        model.set_submodule(name, _Reader() if name == order[first] else nn.Identity())
    upto = UpTo(model, order[first])
    return (upto, own_model) if own_model is not None and _computes(upto, inputs) else None


class _Call(NamedTuple):
    name: str
    shape: tuple[int, ...]


class _Reader(nn.Identity):
    """Remembers what it reads."""

    features: Tensor | None = None

    def forward(self, input: Tensor) -> Tensor:
        self.features = input
        return input


class _Constant(nn.Module):
    """Returns what the module in whose place it stands returned once."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output

    def forward(self, *_args: Any, **_values: Any) -> Any:
        return self.output


def _calls(model: nn.Module, inputs: Inputs) -> list[_Call] | None:
    """List the modules with tensors of their own in the order in which they compute, and what they read."""
    calls: list[_Call] = []

    def note(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
            shape = tuple(args[0].shape) if args and isinstance(args[0], Tensor) else ()
            calls.append(_Call(name, shape))

        return hook

    holders = {n: m for n, m in model.named_modules() if any(True for _ in m.parameters(recurse=False))}
    with _hooks(m.register_forward_pre_hook(note(name)) for name, m in holders.items()):
        return calls if _computes(model, inputs) else None


def _own_model(
    model: nn.Module, first: str, own: Collection[str], inputs: Inputs, dim: int
) -> OwnModel | None:
    """Return the part behind the encoder; None where it is no function of features alone."""
    outputs: dict[str, Any] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda _module, _args, output: outputs.setdefault(name, output)

    others = {name: module for name, module in model.named_modules() if _is_before(name, module, own)}
    with _hooks(module.register_forward_hook(keep(name)) for name, module in others.items()):
        if not _computes(model, inputs):
            return None
    part = copy.deepcopy(model, {id(others[name]): _Constant(output) for name, output in outputs.items()})
    names = tuple(name for name, _ in part.named_parameters() if name.rpartition(".")[0] in own)
    found = OwnModel(part.eval().requires_grad_(False), first, names, inputs, dim)
    with suppress(Exception):  # whatever the library's code asks of its encoder, this is no place to cut
        rows = [len(found(torch.zeros(count, dim))) for count in (1, _PROBES + 1)]
        return found if rows == [1, _PROBES + 1] else None
    return None


def _is_before(name: str, module: nn.Module, own: Collection[str]) -> bool:
    """Check for a largest module before all own layers: it has tensors, and its parent has own layers."""
    if not name or any(own_name == name or own_name.startswith(f"{name}.") for own_name in own):
        return False
    parent = name.rpartition(".")[0]
    holds_own = not parent or any(own_name.startswith(f"{parent}.") for own_name in own)
    return holds_own and any(True for _ in module.parameters())


@torch.no_grad()
def _computes(model: nn.Module, inputs: Inputs) -> bool:
    with suppress(Exception):  # a library's error of any kind means the same
        model.eval()(**inputs)
        return True
    return False


@contextmanager
def _hooks(handles: Iterator[Any]) -> Iterator[None]:
    """Keep hooks for a while."""
    kept = list(handles)
    try:
        yield
    finally:
        for handle in kept:
            handle.remove()
