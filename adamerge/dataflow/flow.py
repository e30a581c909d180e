"""A path through the blocks of several models, and the network that takes it."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from adamerge.errors import InputError
from adamerge.models import ModuleBackbone
from adamerge.state import State

FOREIGN = "dataflow/"  # before the names of tensors of other models than A


class Step(NamedTuple):
    """One block of the path.

    Attributes:
        model: Whose: 0 is model A.
        block: Which, counted from 0.
        scale: Multiplies the hidden state before it.
    """

    model: int
    block: int
    scale: float = 1.0


@dataclass(frozen=True)
class Flow:
    """Which blocks run, in order.

    Attributes:
        blocks: Name of the list of blocks in the module: see `find_blocks`.
        steps: The path.
    """

    blocks: str
    steps: tuple[Step, ...]

    def document(self) -> dict[str, Any]:
        """Give it as JSON has it."""
        return asdict(self)

    @classmethod
    def read(cls, document: Mapping[str, Any]) -> "Flow":
        """Take back what `document` gave."""
        return cls(document["blocks"], tuple(Step(*step) for step in document["steps"]))


class FlowBackbone:
    """Stem and last layers of model A around a path through the blocks of several models.

    Tensors of model A have the names of any checkpoint of its kind, also those of blocks that do not run;
    a block of model m has its names behind ``dataflow/m/``: see `flow_weights`.

    Args:
        backbone: Model A's; it stays as it is.
        flow: The path.

    Raises:
        InputError: The path is empty, or leads through blocks that there are not.
    """

    def __init__(self, backbone: ModuleBackbone, flow: Flow) -> None:
        if not flow.steps:
            raise InputError("no block is included: nothing would run.", "Include one block or more.")
        module, origins = _rearranged(backbone.module, flow)
        files = {
            name: (f"{FOREIGN}{model}/" if model else "") + backbone.files[own]
            for name, (model, own) in origins.items()
            if own in backbone.files
        }
        self.flow, self._inner = flow, backbone.around(module, files)
        self.names = tuple(dict.fromkeys([*backbone.names, *self._inner.names]))
        self.modality, self.transform_key = backbone.modality, backbone.transform_key

    def features(self, weights: State, inputs: Tensor) -> Float[Tensor, "image dim"]:
        """Give the features at the end of the path; see `ModuleBackbone.features`."""
        return self._inner.features(weights, inputs)

    def normalised(self, images: Tensor) -> Tensor:
        """Give images of values in [0, 255] as `features` takes floats."""
        return self._inner.normalised(images)

    def preprocess(self, value: Any) -> Tensor:
        """Turn one PIL image, or one text, into an input of `features`."""
        return self._inner.preprocess(value)

    def to(self, device: torch.device) -> "FlowBackbone":
        """Move what the backbone itself holds to a device."""
        self._inner.to(device)
        return self


def flow_weights(backbone: ModuleBackbone, blocks: str, models: Sequence[State]) -> dict[str, Tensor]:
    """Give what any path through the models' blocks reads, by the names of `FlowBackbone`.

    Args:
        backbone: Model A's.
        blocks: Name of the list of blocks.
        models: All tensors that the backbone reads, of model A first. No tensor is copied.
    """
    prefix = f"{blocks}." if blocks else ""
    named, read = backbone.files.items(), set(backbone.names)
    inside = [file for name, file in named if name.startswith(prefix) and file in read]
    weights = {name: models[0][name] for name in backbone.names}
    others = enumerate(models[1:], 1)
    return weights | {f"{FOREIGN}{m}/{file}": model[file] for m, model in others for file in inside}


def _rearranged(module: nn.Module, flow: Flow) -> tuple[nn.Module, dict[str, tuple[int, str]]]:
    """Give a module with other blocks, which shares all else, and where each of its tensors comes from."""
    root, place = _copied_path(module, flow.blocks)
    old, prefix = [*place._modules], f"{flow.blocks}." if flow.blocks else ""
    strange = [step for step in flow.steps if not (0 <= step.block < len(old) and step.model >= 0)]
    if strange:
        raise InputError(f"there is no block {strange[0].block}: {flow.blocks} has {len(old)} blocks.")
    blocks = [_scaled(place._modules[old[step.block]], step.scale) for step in flow.steps]
    place._modules = {str(k): block for k, block in enumerate(blocks)}
    origins: dict[str, tuple[int, str]] = {}
    for name in (n for n, _ in (*root.named_parameters(remove_duplicate=False), *root.named_buffers())):
        origins[name] = 0, name
        if name.startswith(prefix):
            k, _, rest = name.removeprefix(prefix).partition(".")
            step = flow.steps[int(k)]
            origins[name] = step.model, f"{prefix}{old[step.block]}.{rest}"
    return root, origins


def _copied_path(module: nn.Module, path: str) -> tuple[nn.Module, nn.Module]:
    """Copy a module, and those within it on a path, but no other; give the first and the last of them."""
    root = place = _shallow(module)
    for part in filter(None, path.split(".")):
        inner = place._modules.get(part)
        if inner is None:
            raise InputError(
                f"{type(module).__name__} has no blocks {path!r}.", "Was it another architecture?"
            )
        place._modules[part] = place = _shallow(inner)
    return root, place


def _shallow(module: nn.Module) -> nn.Module:
    copied = copy.copy(module)
    copied._modules = dict(module._modules)
    return copied


def _scaled(block: Any, scale: float) -> nn.Module:
    """Copy a block without its values, which come with every call; it scales its input."""
    memo: dict[int, Any] = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False)
        for p in block.parameters()
    }
    copied: nn.Module = copy.deepcopy(block, memo)
    if scale != 1:
        copied.register_forward_pre_hook(lambda _, given: (scale * given[0], *given[1:]))
    return copied
