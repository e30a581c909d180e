"""A backbone turns weights and inputs into features, without ever changing a module."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from adamerge.state import State


@runtime_checkable
class Backbone(Protocol):
    """What the trainer may ask of a model."""

    @property
    def names(self) -> tuple[str, ...]:
        """Checkpoint names of the tensors that `features` reads."""
        ...

    def features(self, weights: State, inputs: Tensor) -> Float[Tensor, "image dim"]:
        """Give pooled features under these weights; differentiable in the weights."""
        ...

    def preprocess(self, image: Any) -> Tensor:
        """Turn one PIL image into an input of `features`, without batch axis."""
        ...

    def to(self, device: torch.device) -> "Backbone":
        """Move what the backbone itself holds to a device."""
        ...


class ModuleBackbone:
    """Any `nn.Module` that maps a batch of inputs to features.

    Args:
        module: The architecture; its own values are used only for tensors that `features` is not
            given. It may live on the meta device. It is put in evaluation mode and stays there.
        prefix: What stands before the module's parameter names in the checkpoint ("visual.").
        mean: Channel means of the normalisation of uint8 images, in units of the full range.
        std: Channel standard deviations, likewise.
        preprocess: From a PIL image to a uint8 tensor ``[channel, height, width]``.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        prefix: str = "",
        mean: Sequence[float] = (0.0,),
        std: Sequence[float] = (1.0,),
        preprocess: Callable[[Any], Tensor] | None = None,
    ) -> None:
        self.module = module.eval().requires_grad_(False)
        self.prefix = prefix
        # looking for tied weights takes as long as a small layer: once is enough
        self._is_tied = len([*module.named_parameters(remove_duplicate=False)]) > len([*module.parameters()])
        self.mean = torch.tensor(mean).reshape(-1, 1, 1)
        self.std = torch.tensor(std).reshape(-1, 1, 1)
        self._preprocess = preprocess

    @property
    def names(self) -> tuple[str, ...]:
        """Checkpoint names of the module's parameters and floating buffers."""
        named = [*self.module.named_parameters(), *self.module.named_buffers()]
        return tuple(self.prefix + name for name, tensor in named if tensor.is_floating_point())

    def features(self, weights: State, inputs: Tensor) -> Float[Tensor, "image dim"]:
        """Give the module's output under these weights.

        Args:
            weights: By checkpoint name; names outside the prefix are ignored.
            inputs: uint8 images ``[image, channel, height, width]``, normalised here, on the device;
                or inputs of another dtype, passed on as they are.
        """
        cut = len(self.prefix)
        own = {name[cut:]: w for name, w in weights.items() if name.startswith(self.prefix)}
        if inputs.dtype == torch.uint8:
            inputs = (inputs.float() / 255 - self.mean) / self.std
        return functional_call(self.module, own, (inputs,), tie_weights=self._is_tied)

    def preprocess(self, image: Any) -> Tensor:
        """Turn one PIL image into a uint8 tensor; a backbone without transform passes it on."""
        return self._preprocess(image) if self._preprocess else image

    def to(self, device: torch.device) -> "ModuleBackbone":
        """Move normalisation constants, and the module unless it has no values, to a device."""
        if not any(p.is_meta for p in self.module.parameters()):
            self.module.to(device)
        self.mean, self.std = self.mean.to(device), self.std.to(device)
        return self
