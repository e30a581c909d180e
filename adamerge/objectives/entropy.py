"""Entropy minimisation, the objective of AdaMerging."""

import math
from typing import Literal

from adamerge.errors import InputError
from adamerge.objectives.base import Logits, Loss, Objective, entropy_of
from adamerge.ranges import checked


class Entropy(Objective):
    """Mean prediction entropy of a task's images (AdaMerging, arXiv:2310.02575).

    Args:
        normalize: "none" as published: tasks with more classes weigh more; "log_c": divided by the
            logarithm of the number of classes.
    """

    @checked
    def __init__(self, normalize: Literal["none", "log_c"] = "none") -> None:
        super().__init__()
        if normalize not in ("none", "log_c"):
            raise InputError(f"normalize={normalize!r} is unknown.", "Use 'none' or 'log_c'.")
        self.normalize = normalize

    def forward(self, logits: Logits, task: str, teacher: Logits | None = None) -> Loss:
        """Give the mean entropy in nats (or in units of log C)."""
        mean = entropy_of(logits).mean()
        return mean / math.log(logits.shape[-1]) if self.normalize == "log_c" else mean
