"""Never a silently wrong step: what must be finite, and the state to go back to."""

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim import Optimizer

from adamerge.errors import NumericError

_HINT = "The last good coefficients are back. Try a smaller learning rate or fp32."
_MANY, _SELDOM = 2**22, 50  # parameters from which on copies are seldom, and how seldom


class LastGood:
    """Remembers coefficients and optimizer moments from before the last step that proved finite.

    Where they are many, a copy at every step would cost more than the step: then only every 50th is copied.
    """

    def __init__(self) -> None:
        self._steps, self.under_way = 0, False
        self._candidate: tuple[dict[str, Any], list[dict[str, Any]]] | None = None
        self._good: tuple[dict[str, Any], list[dict[str, Any]]] | None = None

    def consider(self, module: nn.Module, optimizers: Sequence[Optimizer]) -> None:
        """Copy the state that the coming step starts from."""
        self._steps, self.under_way = self._steps + 1, True
        if self._good and self._steps % _SELDOM and sum(p.numel() for p in module.parameters()) > _MANY:
            return
        states = [optimizer.state_dict() for optimizer in optimizers]
        self._candidate = copy.deepcopy((dict(module.state_dict()), states))

    @property
    def began(self) -> tuple[dict[str, Any], list[dict[str, Any]]] | None:
        """Coefficients and moments that the step under way started from; None between steps.

        None, too, where they are many and were not copied: until the optimizer steps they have not changed.
        """
        return self._candidate

    def finish(self) -> None:
        """The step is done: what it left counts from now on."""
        self._candidate, self.under_way = None, False

    def accept(self) -> None:
        """Losses and gradient at the considered state were finite: it is good."""
        self._good = self._candidate or self._good

    def restore(self, module: nn.Module, optimizers: Sequence[Optimizer]) -> None:
        """Go back to the last good state, or to the first one where none proved good."""
        state, self._candidate = self._good or self._candidate, None
        if state is not None:
            module.load_state_dict(state[0])
            for optimizer, moments in zip(optimizers, state[1], strict=True):
                optimizer.load_state_dict(moments)


def require_finite_step(
    step: int,
    losses: Mapping[str, float],
    gradient: Float[Tensor, "task tensor"] | None,
    tasks: Sequence[str],
) -> None:
    """Check a step's losses, and its gradient where one is given.

    Raises:
        NumericError: Which task's loss, or which expert's gradient, is not finite.
    """
    for task, loss in losses.items():
        if not math.isfinite(loss):
            raise NumericError(f"step {step}: the loss of task {task!r} is {loss}.", _HINT)
    if gradient is not None and not torch.isfinite(gradient).all():
        row = int((~torch.isfinite(gradient)).nonzero()[0, 0])
        raise NumericError(f"step {step}: the gradient of expert {tasks[row]!r} is not finite.", _HINT)


def require_finite_parameters(step: int, module: nn.Module) -> None:
    """Check what an optimizer step left.

    Raises:
        NumericError: A parameter is not finite.
    """
    if not all(torch.isfinite(parameter).all() for parameter in module.parameters()):
        raise NumericError(f"step {step}: a coefficient is not finite after the optimizer's step.", _HINT)
