"""Finds the repeated blocks of a network, by their tensors and by what passes through them."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from adamerge.dataflow.flow import Flow, FlowBackbone, Step, flow_weights
from adamerge.errors import InputError
from adamerge.models import ModuleBackbone
from adamerge.models.hooks import attached
from adamerge.state import State

Shapes = tuple[list[int] | None, list[int] | None]


@torch.no_grad()
def find_blocks(backbone: ModuleBackbone, weights: State, inputs: Tensor) -> str:
    """Give the name of the list of blocks any of which can follow any other: alike, and of one shape.

    open_clip's ``transformer.resblocks``, the ``layers`` or ``layer`` of transformers' encoders, timm's
    ``blocks``; found in one forward pass, not by these names.

    Args:
        backbone: The network; its module is as before when this returns.
        weights: Any weights of it.
        inputs: A batch of one or more inputs.

    Raises:
        InputError: There is no such list, or there are several: stages between which the shape changes; or
            the network runs no more blocks than it has itself.
    """
    lists = {
        name: [*part._modules.values()]
        for name, part in backbone.module.named_modules()
        if isinstance(part, (nn.ModuleList, nn.Sequential))
    }
    with _watching({id(m): m for m in chain.from_iterable(lists.values()) if m}.values()) as seen:
        own = backbone.features(weights, inputs)
    found = [name for name, blocks in lists.items() if _is_chain(blocks, seen)]
    classes = Counter(type(part) for part in backbone.module.modules())
    whole = [name for name in found if classes[type(lists[name][0])] == len(lists[name])]
    found = whole or found  # a part of a stage has its like elsewhere
    found = [name for name in found if not any(f"{name}.".startswith(f"{o}.") for o in found if o != name)]
    if len(whole) == len(found) == 1:
        _require_longer_paths(backbone, found[0], weights, inputs, own)
        return found[0]
    family = f"{type(backbone.module).__name__} has"
    if len(found) > 1:
        told = f"{family} blocks in several places, of different shapes: {', '.join(found)}"
    else:
        told = f"{family} no single list of all its blocks, each of which keeps the shape of what it is given"
        told += _first_change(backbone.module, seen)
    raise InputError(
        f"{told}.", "Data-flow search needs blocks that can follow each other: use a transformer."
    )


def _require_longer_paths(
    backbone: ModuleBackbone, name: str, weights: State, inputs: Tensor, own: Tensor
) -> None:
    """Refuse a network that cuts longer paths, and gives ``own``, its features, under them as well."""
    count = len(backbone.module.get_submodule(name)._modules)
    steps = [Step(0, block) for block in range(count)]
    longer = FlowBackbone(backbone, Flow(name, (*steps, steps[-1])))
    if torch.equal(longer.features(flow_weights(backbone, name, [weights]), inputs), own):
        raise InputError(
            f"{type(backbone.module).__name__} runs {count} blocks, however many its {name} has.",
            "Data-flow search needs a network that runs the list as it is: most encoders do.",
        )


@contextmanager
def _watching(modules: Any) -> Iterator[dict[int, list[Shapes]]]:
    """Note the shapes of what goes into modules and what comes out, by identity, at every call."""
    seen: dict[int, list[Shapes]] = {}

    def note(module: nn.Module, given: tuple[Any, ...], output: Any) -> None:
        result = output[0] if isinstance(output, tuple) else output
        shapes = [
            [*x.shape] if isinstance(x, Tensor) else None for x in (given[0] if given else None, result)
        ]
        seen.setdefault(id(module), []).append((shapes[0], shapes[1]))

    with attached(module.register_forward_hook(note) for module in modules):
        yield seen


def _is_chain(blocks: list[Any], seen: dict[int, list[Shapes]]) -> bool:
    if len(blocks) < 2 or None in blocks or len({_kind(block) for block in blocks}) > 1:
        return False
    calls = [seen.get(id(block), []) for block in blocks]
    first = calls[0][0][0] if calls[0] else None
    return (
        first is not None and all(found == [(first, first)] for found in calls) and bool(_kind(blocks[0])[1])
    )


def _kind(block: nn.Module) -> tuple[type, tuple[Any, ...]]:
    named = chain(block.named_parameters(), block.named_buffers())
    return type(block), tuple((name, tensor.shape) for name, tensor in named)


def _first_change(module: nn.Module, seen: dict[int, list[Shapes]]) -> str:
    for name, part in module.named_modules():
        for before, after in seen.get(id(part), []):
            if before and after and before != after and [*part.children()]:
                return f" ({name} makes {after} of {before})"
    return ""
