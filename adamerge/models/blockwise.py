"""The blocks of a backbone, one at a time: what they are given by a model, and what they make of it."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves, tree_map_only

from adamerge.coefficients.grouping import GROUPINGS
from adamerge.errors import InputError
from adamerge.models.base import ModuleBackbone
from adamerge.models.grams import plain_attention
from adamerge.models.hooks import attached
from adamerge.models.measured import ExpertStatistic
from adamerge.state import State

Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Unit:
    """A module that a forward pass calls once.

    Attributes:
        path: Its path in the backbone's module.
        names: Checkpoint names of its parameters.
        files: From its own names of its parameters and buffers to the checkpoint's.
        repeats: Whether it is one of a row of blocks, by its number.
    """

    path: str
    names: tuple[str, ...]
    files: dict[str, str]
    repeats: bool


class Blocks(ExpertStatistic):
    """Blocks in the order of the forward pass, each with what it is given and what it makes of it.

    Modules beside the blocks (a stem, the last norm) are units too where a forward pass calls them once;
    a parameter that no such module holds (a class token, CLIP's projection) is in no unit.
    """

    @property
    def order(self) -> tuple[str, ...]:
        """The parameters of all units."""
        return tuple(name for unit in self.units() for name in unit.names)

    def __call__(self, name: str, merged: State) -> None:
        """Give nothing: there is no tensor to every parameter."""

    def units(self) -> tuple[Unit, ...]:
        """Give the units, in the order in which a forward pass calls them.

        Raises:
            InputError: The backbone is no module, or none of its blocks is numbered.
        """
        return self._units

    @cached_property
    def _units(self) -> tuple[Unit, ...]:
        backbone = self._backbone
        groups: dict[str, list[str]] = {}
        for name, _ in backbone.module.named_parameters():
            groups.setdefault(_path_of(name), []).append(name)
        modules = dict(backbone.module.named_modules())
        inner = [path for path in groups if not any(other.startswith(f"{path}.") for other in groups)]
        called = self._called([path for path in inner if path and path in modules])
        units = tuple(_unit(path, groups[path], backbone.files) for path in called)
        if not any(unit.repeats for unit in units):
            raise InputError(
                f"{type(backbone.module).__name__} has no numbered blocks to work through one by one.",
                "Merge it by a method that needs none, such as regmean.",
            )
        return units

    def _called(self, paths: list[str]) -> list[str]:
        counts: Counter[str] = Counter()
        task = self.tasks[0]
        with self._hooked({path: lambda *_, path=path: counts.update([path]) for path in paths}):
            image = next(self.experts.batches(task))[:1]
            self.experts.backbone.features(self.experts.weights(task), image)
        return [path for path, count in counts.items() if count == 1]

    def calls(self, unit: Unit, task: str, merged: State, shots: int) -> Iterator[Call]:
        """Walk what a unit is given on some of a task's images, on the CPU, batch by batch.

        Args:
            unit: The unit.
            task: Whose images, and whose expert.
            merged: What replaces the expert's tensors; nothing: the expert itself.
            shots: Number of images.
        """
        seen: list[Call] = []

        def see(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen.append(tree_map_only(Tensor, lambda x: x.detach().to("cpu", copy=True), (args, kwargs)))
            raise _Reached

        device, weights = self.experts.device, self.experts.weights(task)
        weights |= {n: x.to(device, torch.float32) for n, x in merged.items() if n in weights}
        for batch in self.experts.batches(task):
            if shots <= 0:
                return
            with suppress(_Reached), self._hooked({unit.path: see}):
                self.experts.backbone.features(weights, batch[:shots])
            shots -= len(batch)
            yield seen.pop()

    def run(self, unit: Unit, weights: State, call: Call) -> list[Float[Tensor, "..."]]:
        """Give all floating tensors that a unit returns under given weights, by their checkpoint names."""
        device = self.experts.device
        args, kwargs = tree_map_only(Tensor, lambda x: x.to(device, copy=True), call)  # it may write on them
        own = {name: weights[file] for name, file in unit.files.items() if file in weights}
        with plain_attention():
            output = functional_call(self._backbone.module.get_submodule(unit.path), own, args, kwargs)
        return [x for x in tree_leaves(output) if isinstance(x, Tensor) and x.is_floating_point()]

    def expert(self, unit: Unit, task: str) -> dict[str, Tensor]:
        """Give a unit's floating tensors as a task's own expert has them."""
        weights = self.experts.weights(task)
        return {name: weights[name] for name in unit.files.values() if name in weights}

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks, in the order of the vectors."""
        return tuple(self.experts.images)

    @property
    def device(self) -> torch.device:
        """Where to compute."""
        return self.experts.device

    @property
    def _backbone(self) -> ModuleBackbone:
        backbone = self.experts.backbone
        if not isinstance(backbone, ModuleBackbone):
            raise InputError(f"{type(backbone).__name__} is no module with blocks.", "Use ModuleBackbone.")
        return backbone

    @contextmanager
    def _hooked(self, hooks: Mapping[str, Callable[..., None]]) -> Iterator[None]:
        module = self._backbone.module
        handles = [
            module.get_submodule(path).register_forward_pre_hook(hook, with_kwargs=True)
            for path, hook in hooks.items()
        ]
        with attached(handles), torch.no_grad(), plain_attention():
            yield


class _Reached(Exception):  # it leaves a forward pass early and is no error
    """The unit was called."""


def _path_of(name: str) -> str:
    """Give the path of a parameter's block, or of its module where it is in none."""
    return GROUPINGS["block"](f"model.{name}").removeprefix("model.")


def _unit(path: str, names: list[str], files: Mapping[str, str]) -> Unit:
    inside = {name.removeprefix(f"{path}."): f for name, f in files.items() if name.startswith(f"{path}.")}
    return Unit(path, tuple(files[name] for name in names), inside, path.rpartition(".")[2].isdigit())
