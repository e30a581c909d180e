"""Predictions that stay sure of themselves under the worst small change that all images share."""

import math

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from adamerge.errors import InputError
from adamerge.objectives.base import Logits, Loss, Memory, Objective, entropy_of
from adamerge.ranges import Rate, checked

_BETAS, _EPS = (0.9, 0.999), 1e-8  # Adam's own
_Adversary = tuple[Tensor, Tensor, Tensor, int]  # perturbation, first and second moment, steps


class Perturbed(Objective):
    """Mean prediction entropy of images under a universal adversarial perturbation (DAM, arXiv:2410.13910).

    It is a stand-in for the unknown trigger of a backdoor. Each task has one perturbation ``[channel, height,
    width]`` that is added to all its images in [0, 1]; the sum is clipped to [0, 1]. It starts at 0, and Adam
    moves it up the cross-entropy with the model's own clean predictions. In `Mixed` beside `Entropy` with
    weights 1 and 0.1 it is DAM's objective.

    Ours: the perturbation ascends on the step's own images, after they were used, in the same pass (the
    published code spends a pass of its own before), and is clipped there, too. A step costs a second forward
    and almost two further backwards of every image.

    Args:
        lr: Learning rate of the perturbation, in units of the full range of pixels.

    Raises:
        InputError: ``lr`` is not positive.
    """

    reads = "augmented"
    ascends = True

    @checked
    def __init__(self, lr: Rate = 1e-4) -> None:
        super().__init__()
        if not (lr > 0 and math.isfinite(lr)):
            raise InputError(f"lr={lr}.", "Use a positive number such as 1e-4.")
        self.lr = lr
        self._adversaries: dict[str, _Adversary] = {}  # on the CPU, never changed in place
        self._before: dict[str, _Adversary] = {}
        self._leaves: dict[str, Tensor] = {}

    def begin_step(self) -> None:
        """From now on images are perturbed as the last step left it: a step's second pass sees the same."""
        self._before = dict(self._adversaries)

    def second_view(
        self, images: Tensor, task: str, step: int
    ) -> Float[Tensor, "image channel height width"]:
        """Add the task's perturbation; the result is in [0, 255].

        Raises:
            InputError: The inputs are not uint8 images.
        """
        if images.dim() != 4 or images.dtype != torch.uint8:
            raise InputError(f"Perturbed changes uint8 images; task {task!r} has {images.dtype} inputs.")
        found = self._before.get(task)
        start = torch.zeros(images.shape[1:]) if found is None else found[0]
        self._leaves[task] = leaf = start.clone().to(images.device).requires_grad_()
        return 255 * (images / 255 + leaf).clamp(0, 1)

    def forward(self, logits: Logits, task: str, teacher: Logits | None = None) -> Loss:
        """Give the mean entropy in nats, and move the perturbation for the next step.

        Args:
            logits: Of the perturbed images.
            task: Whose images these are.
            teacher: Of the images themselves.

        Raises:
            InputError: The clean images' logits were not given.
        """
        if teacher is None:
            raise InputError(f"Perturbed needs both views of task {task!r}, found one.")
        leaf = self._leaves.pop(task, None)
        if leaf is not None and logits.requires_grad:
            loss = functional.cross_entropy(logits.float(), teacher.argmax(-1))
            (gradient,) = torch.autograd.grad(loss, leaf, retain_graph=True)
            self._adversaries[task] = self._ascended(task, gradient.cpu())
        return entropy_of(logits).mean()

    def _ascended(self, task: str, gradient: Tensor) -> _Adversary:
        """Give the perturbation after one step of Adam from where this step began."""
        zero = torch.zeros_like(gradient)
        value, first, second, count = self._before.get(task, (zero, zero, zero, 0))
        first = first.lerp(gradient, 1 - _BETAS[0])
        second = second.lerp(gradient.square(), 1 - _BETAS[1])
        mean, square = (x / (1 - b ** (count + 1)) for x, b in zip((first, second), _BETAS, strict=True))
        return value + self.lr * mean / (square.sqrt() + _EPS), first, second, count + 1

    def forget(self) -> None:
        """Forget all perturbations."""
        self._adversaries = {}

    def per_task_state(self) -> Memory:
        """Give each task's perturbation and its moments."""
        return dict(self._adversaries)

    def load_per_task_state(self, state: Memory) -> None:
        """Take them back."""
        self._adversaries = dict(state)
