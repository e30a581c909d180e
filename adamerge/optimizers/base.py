"""What an optimizer of static coefficients may ask of the trainer."""

import copy
from collections.abc import Callable
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.optim import Optimizer

from adamerge.errors import InputError

Reads = Literal["gradient", "task_gradients", "loss"]


class CoefficientOptimizer(Optimizer):
    """An optimizer of one matrix ``[task, group]`` of coefficients.

    Attributes:
        reads: What a step needs: the "gradient" of the sum of losses; beside it each task's own
            ("task_gradients", see `receive`); or the "loss" alone: then nothing is differentiated.
    """

    reads: Reads = "gradient"
    _received: tuple[Tensor, Tensor] | None = None

    @property
    def values(self) -> Float[Tensor, "task group"]:
        """The coefficients.

        Raises:
            InputError: They are not one matrix.
        """
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        if len(parameters) != 1 or parameters[0].ndim != 2:
            raise InputError(
                f"{type(self).__name__} needs one matrix [task, group], found {len(parameters)} parameters.",
                "Use adamerge.Learned coefficients, or another optimizer.",
            )
        return parameters[0]

    def receive(self, gradients: Float[Tensor, "loss task group"], losses: Float[Tensor, " loss"]) -> None:
        """Take the losses of a step, one by one, and the gradient of each."""
        self._received = gradients, losses

    def received(self) -> tuple[Float[Tensor, "loss task group"], Float[Tensor, " loss"]]:
        """Give what `receive` took, once.

        Raises:
            InputError: Nothing was received since the last step.
        """
        if self._received is None:
            raise InputError(
                f"{type(self).__name__} needs the gradient of every task, and found none.",
                "Give it to MergeTask itself, not to a wrapper such as SharpnessAware.",
            )
        found, self._received = self._received, None
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state bit for bit: torch would round fp64 to the parameters' fp32."""
        super().load_state_dict(state_dict)
        for saved in state_dict["state"].values():  # there is one parameter
            self.state[self.values] = copy.deepcopy(saved)

    @staticmethod
    def evaluate(closure: Callable[[], Any] | None) -> Any:
        """Call the closure, where there is one, with gradients on."""
        if closure is None:
            return None
        with torch.enable_grad():
            return closure()
