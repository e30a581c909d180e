"""Entropy of reliable predictions only, with recovery from collapse: SAR's idea per task."""

import math
from typing import Annotated

from jaxtyping import Bool
from torch import Tensor

from adamerge.objectives.base import Logits, Loss, Memory, Objective, entropy_of
from adamerge.ranges import Factor, Range, checked

_DECAY = 0.9

Threshold = Annotated[float, Range("(0, inf]")]  # infinite: plain entropy


class ReliableEntropy(Objective):
    """Mean entropy of the images whose entropy is low enough (SAR, ICLR 2023, on coefficients).

    Under a sharpness-aware optimizer the second pass keeps, among the images of the first, those that are
    still reliable. Without a reliable image a task is skipped for the step.

    Args:
        threshold: Reliable means entropy below ``threshold`` x log C.
        recovery: When a task's moving average of the loss falls below ``recovery`` x log C, the
            coefficients go back to their initial values and the averages are forgotten; 0 turns it
            off. 0.029 is SAR's 0.2 for 1000 classes, free of scale.

    Raises:
        InputError: With these no image would be reliable, or none unreliable.
    """

    judges_all = False

    @checked
    def __init__(self, threshold: Threshold = 0.4, recovery: Factor = 0.029) -> None:
        super().__init__()
        self.threshold, self.recovery = threshold, recovery
        self.averages: dict[str, float] = {}
        self._before: dict[str, float] = {}
        self._kept: dict[str, Bool[Tensor, " image"]] = {}
        self._collapsed: set[str] = set()

    def begin_step(self) -> None:
        """Forget which images the last step's first pass kept."""
        self._kept, self._before = {}, dict(self.averages)

    def forward(self, logits: Logits, task: str, teacher: Logits | None = None) -> Loss | None:
        """Give the mean entropy of the reliable images in nats, or None where there is none."""
        entropies = entropy_of(logits)
        scale = math.log(logits.shape[-1])
        kept = entropies.detach() < self.threshold * scale
        if task in self._kept:
            kept = kept & self._kept[task]
        self._kept[task] = kept
        if not kept.any():
            return None
        loss = entropies[kept].mean()
        self._remember(task, float(loss.detach()), scale)
        return loss

    def recovery_due(self) -> bool:
        """Tell, once, whether a task's average fell below its threshold."""
        due, self._collapsed = bool(self._collapsed), set()
        return due

    def forget(self) -> None:
        """Forget the averages of all tasks."""
        self.averages = {}

    def per_task_state(self) -> Memory:
        """Give the moving averages."""
        return dict(self.averages)

    def load_per_task_state(self, state: Memory) -> None:
        """Take back moving averages."""
        self.averages = dict(state)

    def _remember(self, task: str, loss: float, scale: float) -> None:
        """Average over steps: a sharpness-aware step's second pass replaces what its first remembered."""
        if not math.isfinite(loss):
            return
        self.averages[task] = _DECAY * self._before.get(task, loss) + (1 - _DECAY) * loss
        collapsed = self.averages[task] < self.recovery * scale
        (self._collapsed.add if collapsed else self._collapsed.discard)(task)
