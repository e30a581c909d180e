"""Labelled scores of the merged model: for few-shot search, and for bounds that are reported as such."""

from typing import Literal

from torch.nn import functional

from adamerge.errors import InputError
from adamerge.objectives.base import Logits, Loss, Objective, Views
from adamerge.ranges import checked


class Supervised(Objective):
    """Cross-entropy or error rate on labelled adaptation images: the one objective that reads labels.

    Evolutionary merging (arXiv:2403.13187) searches by a score of this kind; minimised by gradients,
    cross-entropy shows the best that a coefficient space can do.

    Args:
        score: "cross_entropy" in nats, or "error_rate" in [0, 1], which only a search can minimise.

    Raises:
        InputError: The score is unknown.
    """

    needs_labels = True

    @checked
    def __init__(self, score: Literal["cross_entropy", "error_rate"] = "cross_entropy") -> None:
        super().__init__()
        if score not in ("cross_entropy", "error_rate"):
            raise InputError(f"score={score!r} is unknown.", "Use 'cross_entropy' or 'error_rate'.")
        self.score, self.differentiable = score, score == "cross_entropy"

    def loss(self, seen: Views, task: str, teacher: Views) -> Loss:
        """Give the score of the predictions by the labels among what is known of the images."""
        return self(seen["prediction"], task, teacher.get("labels"))

    def forward(self, logits: Logits, task: str, teacher: Logits | None = None) -> Loss:
        """Give the mean score; ``teacher`` are one-hot labels.

        Raises:
            InputError: There are no labels.
        """
        if teacher is None:
            raise InputError(f"Supervised needs the labels of task {task!r}, found none.")
        if self.score == "error_rate":
            return (logits.argmax(-1) != teacher.argmax(-1)).float().mean()
        return functional.cross_entropy(logits.float(), teacher.float())
