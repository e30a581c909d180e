"""Experts of small modules, with images and statistics of their own."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from adamerge.models import Head, ModuleBackbone
from adamerge.models.statistics import Statistics
from adamerge.state import State
from adamerge.vectors import TaskVectors


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4, bias=False), nn.Tanh(), nn.Linear(4, 3))


def tokens() -> nn.Sequential:
    return nn.Sequential(mlp(), nn.Flatten())


class Counting(ModuleBackbone):
    """Counts forward passes."""

    calls = 0

    def features(self, weights: State, inputs: Tensor) -> Tensor:
        self.calls += 1
        return super().features(weights, inputs)


class Setup:
    """Experts of one module: its parameters, moved by each task's number."""

    def __init__(self, module: nn.Module, images: Mapping[str, Tensor]) -> None:
        self.module, self.images = module, images
        self.backbone = Counting(module)
        self.base = {name: p.detach().clone() for name, p in module.named_parameters()}
        self.experts = {
            task: {n: p + 0.3 * random(*p.shape, seed=i + 1) for n, p in self.base.items()}
            for i, task in enumerate(images)
        }

    def statistics(self, heads: Mapping[str, Head] | None = None, **options: Any) -> Statistics:
        return Statistics(self.backbone, heads or {}, self.images, self.experts.__getitem__, **options)

    def vectors(self) -> TaskVectors:
        return TaskVectors.open(self.base, self.experts, force=True)


def two_tasks(*shape: int, count: int = 9) -> dict[str, Tensor]:
    return {"a": random(count, *shape, seed=10), "b": random(count + 4, *shape, seed=11)}
