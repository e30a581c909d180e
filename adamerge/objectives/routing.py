"""Objectives of a router's own logits: the merged model need not run for them."""

from collections.abc import Sequence

import torch
from torch.nn import functional

from adamerge.errors import InputError
from adamerge.objectives.base import Logits, Loss, Objective
from adamerge.objectives.entropy import Entropy


class TaskIdentity(Objective):
    """Cross-entropy of the router's logits with the task that an image came from (arXiv:2406.15479).

    Unlabelled images of each task suffice: the only label is the task.
    """

    reads = "routing"

    def __init__(self) -> None:
        super().__init__()
        self.tasks: tuple[str, ...] = ()

    def build(self, tasks: Sequence[str]) -> None:
        """Remember the order of the router's logits."""
        self.tasks = tuple(tasks)

    def forward(self, logits: Logits, task: str, teacher: Logits | None = None) -> Loss:
        """Give the mean cross-entropy in nats.

        Raises:
            InputError: The router has no expert for the task.
        """
        if task not in self.tasks:
            raise InputError(f"the router knows no task {task!r}.", f"It chooses among {list(self.tasks)}.")
        target = torch.full((len(logits),), self.tasks.index(task), device=logits.device)
        return functional.cross_entropy(logits.float(), target)


class RoutingEntropy(Entropy):
    """Mean entropy of the router's softmax, a part of a sum that must not end flat (arXiv:2403.07652).

    Args:
        normalize: "none": in nats; "log_c": divided by the logarithm of the number of experts.
    """

    reads = "routing"
