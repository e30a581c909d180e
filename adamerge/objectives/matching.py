"""Matching the experts on unlabelled images."""

from typing import Literal

from torch.nn import functional

from adamerge.errors import InputError
from adamerge.objectives.base import Logits, Loss, Objective
from adamerge.ranges import Temperature, checked


def divergence(logits: Logits, target: Logits, temperature: float) -> Loss:
    """Give the mean over images of KL(target || prediction) in nats, both softened."""
    student = (logits.float() / temperature).log_softmax(-1)
    expected = (target.float() / temperature).log_softmax(-1)
    return functional.kl_div(student, expected, reduction="batchmean", log_target=True)


class KLTeacher(Objective):
    """KL(expert || merged) of softened predictions on the same unlabelled images (arXiv:2512.21288).

    The mean over images, without the factor of temperature squared, as published.

    Args:
        temperature: Divides both logits.
    """

    needs_teacher = True

    @checked
    def __init__(self, temperature: Temperature = 2.0) -> None:
        super().__init__()
        self.temperature = temperature

    def forward(self, logits: Logits, task: str, teacher: Logits | None = None) -> Loss:
        """Give the mean KL divergence in nats.

        Raises:
            InputError: No teacher logits were given.
        """
        if teacher is None:
            raise InputError(f"KLTeacher needs the expert's logits of task {task!r}, found none.")
        return divergence(logits, teacher, self.temperature)


class FeatureMatching(Objective):
    """Distance of the merged model's features from the expert's on the same unlabelled images.

    L1 is what Representation Surgery trains its adapters with (ICML 2024), the squared one what
    ProDistill trains blocks with (ICML 2025); both the mean over images and dimensions. Here they train
    whatever coefficients there are.

    Args:
        distance: "l1" or "mse".
        normalize: Compare on the unit sphere, where CLIP's heads read. By default features are compared
            as they are, as published.
    """

    reads = "features"
    needs_teacher = True

    @checked
    def __init__(self, distance: Literal["l1", "mse"] = "l1", normalize: bool = False) -> None:
        super().__init__()
        if distance not in ("l1", "mse"):
            raise InputError(f"distance={distance!r} is unknown.", "Use 'l1' or 'mse'.")
        self.distance, self.normalize = distance, normalize

    def forward(self, logits: Logits, task: str, teacher: Logits | None = None) -> Loss:
        """Give the mean distance.

        Args:
            logits: The merged model's features ``[image, dim]``.
            task: Whose images these are.
            teacher: The expert's features of them.

        Raises:
            InputError: No teacher's features were given.
        """
        if teacher is None:
            raise InputError(f"FeatureMatching needs the expert's features of task {task!r}, found none.")
        pair = logits.float(), teacher.float()
        merged, expert = (functional.normalize(x, dim=-1) for x in pair) if self.normalize else pair
        measure = functional.l1_loss if self.distance == "l1" else functional.mse_loss
        return measure(merged, expert)
