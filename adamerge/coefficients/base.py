"""What any source of merging coefficients offers to the trainer."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor, nn


class Coefficients(nn.Module, ABC):
    """Merging coefficients that an optimizer can change.

    They are configured first and meet their tasks and tensors later, in `build`.
    """

    @abstractmethod
    def build(self, tasks: Sequence[str], names: Sequence[str]) -> None:
        """Create the parameters for these tasks and tensor names."""

    @abstractmethod
    def forward(self) -> Float[Tensor, "task tensor"]:
        """Give one coefficient per task and tensor, differentiable in the parameters."""

    @abstractmethod
    def reset(self) -> None:
        """Go back to the initial values, in place."""

    def after_step(self) -> None:
        """Repair the parameters after an optimizer step, where their space asks for it."""

    @abstractmethod
    def table(self) -> tuple[list[str], Float[Tensor, "task group"]]:
        """Give the groups' labels and the effective coefficients, for reports."""
