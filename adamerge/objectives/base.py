"""What any objective offers to the trainer."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor, nn

from adamerge.errors import InputError

Logits = Float[Tensor, "image class"]
Loss = Float[Tensor, ""]
Views = Mapping[str, Float[Tensor, "image _"]]  # what there is to read of a model, by its name
Reads = Literal["prediction", "features", "augmented", "routing", "coefficients"]
Memory = dict[str, Any]  # by task: a float, or a list of floats, lists and CPU tensors


def entropy_of(logits: Float[Tensor, "image class"]) -> Float[Tensor, " image"]:
    """Give the entropy of each prediction in nats; invariant to a constant added to the logits."""
    log_p = logits.float().log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


class Objective(nn.Module, ABC):
    """A scalar to minimise, from what the model says of one task's images.

    Attributes:
        reads: What `forward` reads: the merged model's logits ("prediction") or "features"; its logits of
            the `second_view`, and as a teacher's those of the first ("augmented"); the router's logits
            ("routing", one per expert); "coefficients": nothing, all is in `penalty`.
        needs_teacher: Whether `forward` reads the same of the task's own expert.
        needs_labels: Whether `forward` reads the images' labels, one-hot, in the teacher's place.
        differentiable: Whether its value has a gradient; otherwise only a search can minimise it.
        judges_all: Whether every image counts, so that losses of different coefficients can be compared.
        ascends: Whether it takes a gradient of its own, which a search does not compute.
    """

    reads: Reads = "prediction"
    needs_teacher = False
    needs_labels = False
    differentiable = True
    judges_all = True
    ascends = False

    @property
    def needs_router(self) -> bool:
        """Whether there must be a router whose logits can be read."""
        return self.reads == "routing"

    def build(self, tasks: Sequence[str]) -> None:
        """Meet the tasks, in the order of the router's logits."""

    @abstractmethod
    def forward(self, logits: Logits, task: str, teacher: Logits | None = None) -> Loss | None:
        """Give the loss of one task's images, or None where they are not worth a step."""

    @property
    def augments(self) -> bool:
        """Whether images are needed in a second view."""
        return self.reads == "augmented"

    def second_view(self, images: Tensor, task: str, step: int) -> Tensor:
        """Give the other view of a task's images; asked if it augments.

        A function of the arguments and of `per_task_state` alone: uint8, or floats in [0, 255].
        """
        return images

    def loss(self, seen: Views, task: str, teacher: Views) -> Loss | None:
        """Give the loss from all that there is to read, by its name in `reads`.

        Args:
            seen: Of the merged model and the router.
            task: Whose images these are.
            teacher: Of the task's own expert; may be empty.

        Raises:
            InputError: What this objective reads is not there.
        """
        if self.reads not in seen:
            whose = "a router" if self.needs_router else f"a model's {self.reads}"
            raise InputError(f"{type(self).__name__} needs {whose}, found {list(seen)}.")
        return self(seen[self.reads], task, teacher.get(self.reads))

    def start_at(self, parameters: Sequence[Tensor]) -> None:
        """Meet the parameters of the coefficients, at their initial values."""

    def penalty(self, parameters: Sequence[Tensor]) -> Loss | None:
        """Give what the parameters themselves cost, once per step and differentiable; None: nothing."""
        return None

    def begin_step(self) -> None:
        """Forget what belongs to the last step; called once before each optimizer step."""

    def recovery_due(self) -> bool:
        """Tell, once, whether the coefficients should go back to their initial values."""
        return False

    def forget(self) -> None:
        """Forget what was remembered of all tasks; called when the coefficients start again."""

    def per_task_state(self) -> Memory:
        """Give what the objective remembers of each task, for checkpoints and other processes.

        By task: a float, or a list of floats; what is loaded again must be the same bit for bit. Tensors
        are on the CPU and never changed in place.
        """
        return {}

    def load_per_task_state(self, state: Memory) -> None:
        """Take back what `per_task_state` gave."""
