"""The statistics that can be asked for: what is measured together, and what is kept in files."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor

from adamerge.checkpoints.kept import keep, read_kept
from adamerge.coefficients.grouping import GROUPINGS
from adamerge.models.experts import Experts, short_hash
from adamerge.models.fisher import FisherMode, fisher_diagonal
from adamerge.models.grams import gram_matrices
from adamerge.progress import track
from adamerge.state import State


class ExpertStatistic(ABC):
    """One statistic of all experts; see `Statistics`."""

    def __init__(self, experts: Experts) -> None:
        self.experts = experts

    @property
    @abstractmethod
    def order(self) -> tuple[str, ...]:
        """The parameters in the order of the forward pass."""

    @abstractmethod
    def __call__(self, name: str, merged: State) -> Tensor | None:
        """Give a parameter's statistic ``[task, ...]``, or None where it has none."""


class _Kept(ExpertStatistic):
    """A statistic that does not depend on what is merged: measured once and kept in files."""

    kind: str
    facts: tuple[str, ...] = ()

    def __init__(self, experts: Experts) -> None:
        super().__init__(experts)
        self._found: dict[str, dict[str, State]] = {}

    @abstractmethod
    def n_bytes(self, name: str) -> int:
        """Give the memory that one task's tensor takes while it is measured."""

    @abstractmethod
    def measure(self, task: str, names: Sequence[str]) -> dict[str, Tensor]:
        """Compute one task's tensors."""

    def __call__(self, name: str, merged: State) -> Tensor | None:
        """Read a parameter's statistic, which is measured first if need be."""
        if name not in self.order:
            return None
        return torch.stack([self._one(task, name) for task in self.experts.images])

    def _one(self, task: str, name: str) -> Tensor:
        stem = self.experts.file(self.kind, task, *self.facts)
        if task not in self._found:
            self._found[task] = _parts(sorted(stem.parent.glob(f"{stem.name}-*.safetensors")))
        found = self._found[task]
        if name not in found:
            missing = [other for other in self.order if other not in found]
            names = _fitting(name, missing, self.n_bytes, self.experts.budget)
            file = stem.with_name(f"{stem.name}-{short_hash(names)}.safetensors")
            part = keep(self.measure(task, names), file)
            found |= dict.fromkeys(part, part)
        return found[name][name]


def _parts(files: Iterable[Path]) -> dict[str, State]:
    """Return the file of every tensor, mapped; damaged files are left out."""
    return {name: part for part in map(read_kept, files) if part is not None for name in part}


def _fitting(first: str, names: Iterable[str], n_bytes: Callable[[str], int], budget: int) -> list[str]:
    """Choose the first name, and as many others as fit into the budget with it."""
    chosen, room = [first], budget - n_bytes(first)
    for name in names:
        if name != first and n_bytes(name) <= room:
            chosen.append(name)
            room -= n_bytes(name)
    return chosen


class Gram(_Kept):
    """Gram matrices in the experts themselves."""

    kind = "gram"

    @property
    def order(self) -> tuple[str, ...]:
        """The linear weights."""
        return tuple(self.experts.trace.inputs)

    def n_bytes(self, name: str) -> int:
        """Give the size of one matrix."""
        return 4 * self.experts.trace.inputs[name] ** 2

    def measure(self, task: str, names: Sequence[str]) -> dict[str, Tensor]:
        """Collect one expert's matrices."""
        weights, uses = self.experts.weights(task), self.experts.trace.uses
        batches = self.experts.batches(task, f"Gram matrices of {task}")
        return gram_matrices(self.experts.backbone, weights, batches, {name: uses[name] for name in names})


class Fisher(_Kept):
    """Diagonals of the experts' Fisher matrices."""

    kind = "fisher"

    def __init__(self, experts: Experts, mode: FisherMode) -> None:
        super().__init__(experts)
        self.mode: FisherMode = mode
        self.facts = (mode,)

    @property
    def order(self) -> tuple[str, ...]:
        """All weights that a forward pass uses."""
        return tuple(self.experts.trace.sizes)

    def n_bytes(self, name: str) -> int:
        """Give the size of a diagonal, and of one sample's gradient beside it."""
        return 8 * self.experts.trace.sizes[name]

    def measure(self, task: str, names: Sequence[str]) -> dict[str, Tensor]:
        """Estimate one expert's diagonals."""
        experts = self.experts
        size = sum(self.n_bytes(name) for name in names) // 2
        return fisher_diagonal(
            experts.backbone,
            experts.head(task),
            experts.weights(task),
            experts.batches(task, f"Fisher diagonals of {task}"),
            names,
            mode=self.mode,
            generator=torch.Generator().manual_seed(experts.seed),
            chunk=max((experts.budget - size) // max(size, 1), 1),
        )


class PrefixGram(ExpertStatistic):
    """Gram matrices in each expert's block, behind the merged blocks before it."""

    def __init__(self, experts: Experts) -> None:
        super().__init__(experts)
        self._merged: State | None = None
        self._found: dict[str, Tensor] = {}

    @property
    def order(self) -> tuple[str, ...]:
        """All weights, so that a block is merged completely before the next one is measured."""
        return tuple(self.experts.trace.sizes)

    def __call__(self, name: str, merged: State) -> Tensor | None:
        """Give a weight's matrices; those of its block that fit into memory are collected with it."""
        if name not in self.experts.trace.inputs:
            return None
        if name not in self._found or merged is not self._merged:
            self._merged, self._found = merged, self._collect(name, merged)
        return self._found[name]

    def _collect(self, name: str, merged: State) -> dict[str, Tensor]:
        before, block = self._split(name)
        widths, uses = self.experts.trace.inputs, self.experts.trace.uses
        linear = [n for n in block[block.index(name) :] if n in widths]
        n_tasks = len(self.experts.images)
        names = _fitting(name, linear, lambda n: 4 * n_tasks * widths[n] ** 2, self.experts.budget)
        prefix = {n: merged[n].to(self.experts.device, torch.float32) for n in before if n in merged}
        rows = [
            gram_matrices(
                self.experts.backbone,
                self.experts.weights(task) | prefix,
                self.experts.batches(task),
                {n: uses[n] for n in names},
            )
            for task in track(list(self.experts.images), "Gram matrices behind the merged blocks")
        ]
        return {n: torch.stack([row.pop(n) for row in rows]) for n in names}

    def _split(self, name: str) -> tuple[list[str], list[str]]:
        """Give the weights of the blocks before the one of a weight, and that block's own."""
        before: list[str] = []
        for _, names in groupby(self.order, GROUPINGS["block"]):
            block = list(names)
            if name in block:
                return before, block
            before += block
        raise KeyError(name)
