"""What any objective offers to the trainer."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn

Logits = Float[Tensor, "image class"]
Loss = Float[Tensor, ""]


def entropy_of(logits: Float[Tensor, "image class"]) -> Float[Tensor, " image"]:
    """Give the entropy of each prediction in nats; invariant to a constant added to the logits."""
    log_p = logits.float().log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


class Objective(nn.Module, ABC):
    """A scalar to minimise, from the logits of one task's images.

    Attributes:
        reads: Whose logits `forward` reads: the merged model's "prediction" or the router's ("routing",
            one per expert).
        needs_teacher: Whether `forward` reads the expert's logits of the same images.
    """

    reads: Literal["prediction", "routing"] = "prediction"
    needs_teacher = False

    @property
    def needs_router(self) -> bool:
        """Whether there must be a router whose logits can be read."""
        return self.reads == "routing"

    def build(self, tasks: Sequence[str]) -> None:
        """Meet the tasks, in the order of the router's logits."""

    @abstractmethod
    def forward(self, logits: Logits, task: str, teacher: Logits | None = None) -> Loss | None:
        """Give the loss of one task's images, or None where they are not worth a step."""

    def begin_step(self) -> None:
        """Forget what belongs to the last step; called once before each optimizer step."""

    def recovery_due(self) -> bool:
        """Tell, once, whether the coefficients should go back to their initial values."""
        return False

    def forget(self) -> None:
        """Forget what was remembered of all tasks; called when the coefficients start again."""

    def per_task_state(self) -> dict[str, float]:
        """Give what the objective remembers of each task, for checkpoints and other processes."""
        return {}

    def load_per_task_state(self, state: dict[str, float]) -> None:
        """Take back what `per_task_state` gave."""
