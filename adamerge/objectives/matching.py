"""Matching the experts on unlabelled images."""

from torch.nn import functional

from adamerge.errors import InputError
from adamerge.objectives.base import Logits, Loss, Objective


class KLTeacher(Objective):
    """KL(expert || merged) of softened predictions on the same unlabelled images (arXiv:2512.21288).

    The mean over images, without the factor of temperature squared, as published.

    Args:
        temperature: Divides both logits.
    """

    needs_teacher = True

    def __init__(self, temperature: float = 2.0) -> None:
        super().__init__()
        if not temperature > 0:
            raise InputError(f"temperature={temperature} is not positive.", "Use e.g. 2.0.")
        self.temperature = temperature

    def forward(self, logits: Logits, task: str, teacher: Logits | None = None) -> Loss:
        """Give the mean KL divergence in nats.

        Raises:
            InputError: No teacher logits were given.
        """
        if teacher is None:
            raise InputError(f"KLTeacher needs the expert's logits of task {task!r}, found none.")
        student = (logits.float() / self.temperature).log_softmax(-1)
        target = (teacher.float() / self.temperature).log_softmax(-1)
        return functional.kl_div(student, target, reduction="batchmean", log_target=True)
