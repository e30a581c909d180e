"""Entropy minimisation that keeps all classes in use: mutual information with a running mean."""

from typing import Annotated

import torch
from jaxtyping import Float
from torch import Tensor

from adamerge.objectives.base import Logits, Loss, Memory, Objective, entropy_of
from adamerge.ranges import Factor, Range, checked

_LEAST = 1e-6  # probability that a class keeps in the running mean: its logarithm is read


class Balanced(Objective):
    """Mean entropy minus ``weight`` times the entropy of the mean prediction.

    At weight 1 this is minus the mutual information of image and class (information maximisation, as in
    SHOT, arXiv:2002.08546); its use on coefficients and the running mean are ours. The mean of a batch
    alone is of no use: it pushes the images of a one-class batch apart. Here a task's mean prediction runs
    over the steps before, from the uniform one on, and the second entropy is the cross-entropy of the
    batch with it. That has the gradient of the entropy of the mean, without the batch's own share in it:
    whatever the order of images, only classes that many batches crowd into are pushed back.

    Args:
        weight: Factor of the second entropy; 0: plain entropy.
        window: Images per class that the running mean remembers: a batch of n images moves the mean of C
            classes by ``n / (window * C)``, so that neither tiny batches nor many classes make it noisy.

    Raises:
        InputError: ``weight`` is negative or ``window`` is not positive.
    """

    @checked
    def __init__(self, weight: Factor = 1.0, window: Annotated[float, Range("(0, 1e6]")] = 32.0) -> None:
        super().__init__()
        self.weight, self.window = weight, window
        self.means: dict[str, Float[Tensor, " class"]] = {}
        self._before: dict[str, Float[Tensor, " class"]] = {}

    def begin_step(self) -> None:
        """Let what the last step saw count from now on."""
        self._before = dict(self.means)

    def forward(self, logits: Logits, task: str, teacher: Logits | None = None) -> Loss:
        """Give the loss in nats; it may be negative."""
        n_images, n_classes = logits.shape
        batch = logits.float().softmax(-1).mean(0)
        past = self._before.get(task, batch.new_full((n_classes,), 1 / n_classes).detach()).to(batch)
        rate = min(1.0, n_images / (self.window * n_classes))
        self.means[task] = past.lerp(batch.detach(), rate)
        spread = -(batch * past.clamp_min(_LEAST).log()).sum()
        return entropy_of(logits).mean() - self.weight * spread

    def forget(self) -> None:
        """Forget the mean predictions of all tasks."""
        self.means = {}

    def per_task_state(self) -> Memory:
        """Give the mean predictions as lists of floats, which hold fp32 exactly."""
        return {task: mean.tolist() for task, mean in self.means.items()}

    def load_per_task_state(self, state: Memory) -> None:
        """Take back mean predictions."""
        self.means = {task: torch.tensor(mean) for task, mean in state.items()}
