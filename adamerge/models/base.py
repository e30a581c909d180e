"""A backbone turns weights and inputs into features, without ever changing a module."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from adamerge.errors import InputError, shortlist
from adamerge.models.batch_norm import MergedNorms
from adamerge.state import State

Opener = Callable[[Path, str, State], State]


@runtime_checkable
class Backbone(Protocol):
    """What the trainer may ask of a model.

    Attributes:
        modality: "image" or "text": what `preprocess` takes.
        transform_key: A JSON text that names the preprocessing completely; empty where there is none.
    """

    modality: str
    transform_key: str

    @property
    def names(self) -> tuple[str, ...]:
        """Checkpoint names of the tensors that `features` reads."""
        ...

    def features(self, weights: State, inputs: Tensor) -> Float[Tensor, "image dim"]:
        """Give pooled features under these weights; differentiable in the weights."""
        ...

    def normalised(self, images: Tensor) -> Tensor:
        """Give images of values in [0, 255], uint8 or floats, as `features` takes floats."""
        ...

    def preprocess(self, value: Any) -> Tensor:
        """Turn one PIL image, or one text, into an input of `features`, without batch axis."""
        ...

    def to(self, device: torch.device) -> "Backbone":
        """Move what the backbone itself holds to a device."""
        ...


class ImageTransform(NamedTuple):
    """From a PIL image to what a module reads: geometry in uint8 first, arithmetic on the device later.

    Attributes:
        preprocess: From a PIL image to a uint8 tensor ``[channel, height, width]``.
        mean: Channel means of the normalisation of uint8 images, in units of the full range.
        std: Channel standard deviations, likewise.
        transform_key: A JSON text that names all of it: library, version, sizes, interpolation.
    """

    preprocess: Callable[[Any], Tensor]
    mean: Sequence[float]
    std: Sequence[float]
    transform_key: str


def geometry_of(transforms: Sequence[Callable[[Any], Any]], mode: str = "RGB") -> Callable[[Any], Tensor]:
    """Return a PIL pipeline without its last two steps, ToTensor and Normalize, which `features` does.

    Args:
        transforms: The steps.
        mode: Pillow's mode of the images that the first step reads.
    """
    from torchvision.transforms.v2.functional import pil_to_tensor

    def preprocess(image: Any) -> Tensor:
        image = image.convert(mode)
        for step in transforms[:-2]:
            image = step(image)
        return pil_to_tensor(image)

    return preprocess


def image_mode(channels: int, source: Path) -> str:
    """Return Pillow's mode of images of so many channels: grey ones ("L") for one, as timm reads them.

    Raises:
        InputError: There are neither one nor three.
    """
    if channels not in (1, 3):
        raise InputError(
            f"{source}: the model reads images of {channels} channels, images have 1 (grey) or 3 (RGB).",
            "Write a backbone of your own (adamerge.ModuleBackbone) for other data.",
        )
    return "L" if channels == 1 else "RGB"


class ModuleBackbone:
    """Any `nn.Module` that maps a batch of inputs to features.

    Args:
        module: The architecture; its own values are used only for tensors that `features` is not
            given. It may live on the meta device. It is put in evaluation mode and stays there.
        prefix: What stands before the module's parameter names in the checkpoint ("visual.").
        mean: See `ImageTransform`.
        std: See `ImageTransform`.
        preprocess: See `ImageTransform`.
        transform_key: See `ImageTransform`.
        pool: From the module's output to the features.
        activation: Name of the activation function, which weights do not tell: "gelu", "quick_gelu".

    Attributes:
        files: From the module's names of its tensors to the checkpoint's.
        unmerged: Names of tensors that no merge touches, whatever their shapes: classifiers.
    """

    modality = "image"
    unmerged: tuple[str, ...] = ()

    def __init__(
        self,
        module: nn.Module,
        *,
        prefix: str = "",
        mean: Sequence[float] = (0.0,),
        std: Sequence[float] = (1.0,),
        preprocess: Callable[[Any], Tensor] | None = None,
        transform_key: str = "",
        pool: Callable[[Any], Tensor] = lambda output: output,
        activation: str | None = None,
    ) -> None:
        self._hold(module, {name: prefix + name for name in module.state_dict()})
        self.transform_key, self.activation, self._pool = transform_key, activation, pool
        self.mean = torch.tensor(mean).reshape(-1, 1, 1)
        self.std = torch.tensor(std).reshape(-1, 1, 1)
        self._preprocess = preprocess

    def _hold(self, module: nn.Module, files: Mapping[str, str]) -> None:
        self.module, self.files = module.eval().requires_grad_(False), dict(files)
        # looking for tied weights takes as long as a small layer: once is enough
        parameters = [*module.named_parameters(remove_duplicate=False)]
        self._is_tied = len(parameters) > len([*module.parameters()])
        self._norms = MergedNorms(module)
        named = [*module.named_parameters(), *module.named_buffers()]
        self._names = tuple(files[n] for n, tensor in named if n in files and tensor.is_floating_point())
        hollow = {name for name, tensor in named if tensor.is_meta and tensor.is_floating_point()}
        self._hollow = hollow & files.keys()

    def around(self, module: nn.Module, files: Mapping[str, str]) -> "ModuleBackbone":
        """Give this backbone with another module: the same preprocessing and pooling, other tensors.

        Args:
            module: What stands in the place of the module.
            files: From its tensors to the names that they have in weights.
        """
        other = copy.copy(self)
        other._hold(module, files)
        return other

    @property
    def names(self) -> tuple[str, ...]:
        """Checkpoint names of the module's parameters and of the floating buffers that files hold."""
        return self._names

    def features(self, weights: State, inputs: Tensor) -> Float[Tensor, "image dim"]:
        """Give the module's output under these weights.

        Args:
            weights: By checkpoint name; names that are not the module's are ignored.
            inputs: uint8 images ``[image, channel, height, width]``, normalised here, on the device;
                or inputs of another dtype, passed on as they are.

        Raises:
            InputError: A weight is missing that the module has no value of.
            NumericError: A merged variance of a BatchNorm layer is negative.
        """
        own = {name: weights[file] for name, file in self.files.items() if file in weights}
        missing = self._hollow.difference(own)
        if missing and not self._is_tied:  # torch computes with memory that nobody has written
            raise InputError(f"the weights lack {shortlist(sorted(self.files[name] for name in missing))}.")
        if inputs.dtype == torch.uint8:
            inputs = self.normalised(inputs)
        own = self._norms.prepared(own)
        return self._pool(functional_call(self.module, own, (inputs,), tie_weights=self._is_tied))

    def normalised(self, images: Tensor) -> Float[Tensor, "image channel height width"]:
        """Give images of values in [0, 255], uint8 or floats, as the module reads them."""
        return (images.float() / 255 - self.mean) / self.std

    def preprocess(self, value: Any) -> Tensor:
        """Turn one PIL image into a uint8 tensor; a backbone without transform passes it on."""
        return self._preprocess(value) if self._preprocess else value

    def preprocessing(self, max_length: int | None = None) -> tuple[Callable[[Any], Tensor], str]:
        """Return `preprocess` for data of many inputs, and its key.

        Args:
            max_length: Tokens at which texts are cut; default: the model's own length.

        Raises:
            InputError: The model reads images, or fewer tokens.
        """
        if self.modality == "text" and self._preprocess is not None:
            texts: Any = self._preprocess
            texts = texts if max_length is None else texts.limited(max_length)
            return texts, texts.key
        if max_length is not None:
            raise InputError(f"max_length={max_length}: this model reads images.", "Leave it out.")
        return self.preprocess, self.transform_key

    def expert(self, path: Path, role: str, base: State, opener: Opener) -> State:
        """Open an expert by the base's tensor names.

        Args:
            path: What the expert is stored in.
            role: Who this is ("expert 'cars'"), for error messages.
            base: The base's state.
            opener: Opens a path as an expert of a state.
        """
        return opener(path, role, base)

    def to(self, device: torch.device) -> "ModuleBackbone":
        """Move normalisation constants, and what the module has of values, to a device."""
        if any(p.is_meta for p in self.module.parameters()):
            for part in self.module.modules():
                for name, buffer in part.named_buffers(recurse=False):
                    setattr(part, name, buffer if buffer.is_meta else buffer.to(device))
        else:
            self.module.to(device)
        self.mean, self.std = self.mean.to(device), self.std.to(device)
        return self


def without_values(make: Callable[[], nn.Module]) -> nn.Module:
    """Make a module whose parameters are on the meta device; buffers hold what its code computes.

    Where the code computes with parameters while it makes the module, they have values at first. The state of
    torch's random generator stays as it was.
    """
    with torch.random.fork_rng(devices=[]):
        try:
            with _hollow_parameters():
                return make()
        except (RuntimeError, NotImplementedError):  # of operations on two devices
            module = make()
    for layer in module.modules():
        for name, parameter in [*layer.named_parameters(recurse=False)]:
            setattr(layer, name, nn.Parameter(parameter.detach().to("meta")))
    return module


@contextmanager
def _hollow_parameters() -> Iterator[None]:
    """Move every parameter to the meta device as a module registers it, before its initialisation."""
    module: Any = nn.Module
    register = module.register_parameter

    def hollow(layer: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
        register(layer, name, parameter)

    module.register_parameter = hollow
    try:
        yield
    finally:
        module.register_parameter = register
