"""The models of a benchmark, opened once, and static methods, bounds and oracles evaluated."""

from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adamerge.benchmarks.measuring import expert_statistics
from adamerge.checkpoints import locate, open_checkpoint
from adamerge.data.module import MultiTaskData
from adamerge.evaluation import Evaluation, evaluate
from adamerge.fitting import model_settings, open_vectors, weight_digests
from adamerge.models import Backbone, Head, ModuleBackbone, Statistics, open_heads, walk
from adamerge.models.opening import require_fitting_heads
from adamerge.state import State
from adamerge.static import EDITS, METHODS, edit, expert_tensors, merge
from adamerge.vectors import STREAM, Codec, TaskVectors

INDIVIDUAL = "individual"
BOUNDS = ("zero_shot", INDIVIDUAL)


class Models:
    """A benchmark's base, experts and heads; nothing is opened before it is needed.

    Args:
        base: The base.
        experts: The experts by task.
        codec: Stored form of the task vectors.
        data: The images; they are prepared for the backbone once that is open.
        cache: Folder of the experts' statistics.
        force: Accept experts that look as if they came from another base, or whose settings differ.
    """

    def __init__(
        self,
        base: str,
        experts: Mapping[str, str],
        codec: str,
        data: MultiTaskData,
        cache: Path,
        *,
        force: bool = False,
    ) -> None:
        self.base, self.experts, self.codec = base, experts, codec
        self.data, self.cache, self._force = data, cache, force

    def _open(self, codec: str | Codec) -> tuple[TaskVectors, ModuleBackbone]:
        return open_vectors(self.base, self.experts, codec=codec, tasks=self.data.tasks, force=self._force)

    def inputs(self, method: str) -> dict[str, str]:
        """Hash the images, labels and head files that a row depends on, as the backbone reads them."""
        data = copy(self.data)  # which shares what is loaded
        data.use(self.backbone)
        data.use_heads(self.heads)
        if is_static(method) and not measures(method):
            data.tasks = {task: replace(spec, adapt=None) for task, spec in data.tasks.items()}
        return data.fingerprint()

    @cached_property
    def digests(self) -> dict[str, str]:
        """SHA-256 of base and experts."""
        return weight_digests(self.base, self.experts)

    @cached_property
    def settings(self) -> dict[str, dict[str, Any]]:
        """What lies beside the weights of base and experts and decides results."""
        return model_settings(self.base, self.experts)

    @torch.no_grad()
    def evaluate(self, method: str) -> Evaluation:
        """Evaluate one merged model, or one model per task where the method knows the task."""
        if method in METHODS or method == "zero_shot":
            weights = self.read(self.merged(method))
            heads = self.base_heads if method == "zero_shot" else self.heads
            return self.accuracy(lambda _: weights, heads=heads)
        if method == INDIVIDUAL:
            hot = self.vectors.one_hot
            return self.accuracy(lambda task: self.read(self.vectors.state(hot(task))), told=True)
        edited = edit(self.vectors, method)
        return self.accuracy(lambda task: self.read(dict(expert_tensors(edited, task))), told=True)

    def accuracy(
        self,
        weights_of: Callable[[str], State],
        *,
        told: bool = False,
        backbone: Backbone | None = None,
        heads: Mapping[str, Head] | None = None,
    ) -> Evaluation:
        """Evaluate a model, or one per task, on the test images.

        Args:
            weights_of: Gives, by task, all tensors that the backbone reads.
            told: Whether the weights tell the task; then only tasks that have an expert are evaluated.
            backbone: Another one, which reads the same images.
            heads: Other heads than the tasks' own.
        """
        weights_of = lru_cache(maxsize=1)(weights_of)
        device = _device()
        backbone = (backbone or self.backbone).to(device)

        def walk_test(function: Callable[[Tensor], Tensor], task: str) -> Tensor:
            return walk(function, self.data.loader(self.data.test(task)))

        def features(batch: Tensor, task: str) -> tuple[Tensor, None]:
            return backbone.features(weights_of(task), batch.to(device)), None

        with_expert = [task for task in self.data.tested_tasks if task in self.experts]
        tasks = with_expert if told else None
        return evaluate(features, heads or self.heads, self.data, walk_test, told=told, tasks=tasks)

    def read(self, state: State) -> State:
        """Give what the backbone reads, in fp32, where it computes."""
        return {name: state[name].float().to(_device()) for name in self.backbone.names}

    @cached_property
    def vectors(self) -> TaskVectors:
        """The experts, in memory."""
        _ = self.backbone  # which prepares the images
        return self._open(self.codec)[0]

    @cached_property
    def backbone(self) -> ModuleBackbone:
        """The model of any weights; opening it audits the experts' files, and stores nothing of them."""
        _, backbone = self._open(STREAM)
        self.data.use(backbone)
        return backbone

    @cached_property
    def heads(self) -> dict[str, Head]:
        """Every task's head."""
        heads = open_heads(self.base, self.data.tasks, self.experts)
        require_fitting_heads(self.backbone, open_checkpoint(locate(self.base, "base")), heads)
        return heads

    @cached_property
    def base_heads(self) -> dict[str, Head]:
        """Every task's head for the base by itself: of its own text tower, whatever experts have."""
        own = {task: self.data.tasks[task] for task, head in self.heads.items() if head.own_tower}
        return self.heads | (open_heads(self.base, own) if own else {})

    def merged(self, method: str) -> State:
        """Merge by a static method, or give the base ("zero_shot")."""
        if method == "zero_shot":
            return self.vectors.base_state()
        more = {"statistics": self._statistics} if measures(method) else {}
        return merge(self.vectors, method, **more)

    @cached_property
    def _statistics(self) -> Statistics:
        """Statistics of the experts on the unlabelled adaptation images."""
        opened = self.vectors, self.backbone, self.heads, self.data
        return expert_statistics(*opened, self.digests, cache=self.cache, device=_device())


def _device() -> torch.device:
    """Where static rows are evaluated; rows that learn have the trainer's device."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def is_static(method: str) -> bool:
    """Tell whether a row is evaluated here; all others are runs of `adamerge fit`."""
    return method in (*BOUNDS, *METHODS, *oracles())


def measures(method: str) -> bool:
    """Tell whether a method reads statistics of the adaptation images."""
    return method in METHODS and bool(METHODS[method].statistics)


def oracles() -> list[str]:
    """Name the edits that give one model per task."""
    return [name for name, row in EDITS.items() if row.oracle]
