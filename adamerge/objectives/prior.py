"""Staying near the start: an objective of the coefficients alone."""

from collections.abc import Sequence

from torch import Tensor

from adamerge.objectives.base import Logits, Loss, Objective, Views


class Prior(Objective):
    """Squared distance of all coefficients from their initial values, as a part of `Mixed`.

    The sum over parameters, as L2-SP has it for weights (arXiv:1802.01483); its use on coefficients is
    ours. `Mixed` gives its weight. Where no task is worth a step, it does not step either.
    """

    reads = "coefficients"

    def __init__(self) -> None:
        super().__init__()
        self.start: list[Tensor] = []

    def start_at(self, parameters: Sequence[Tensor]) -> None:
        """Remember where the parameters start."""
        self.start = [parameter.detach().clone() for parameter in parameters]

    def forward(self, logits: Logits, task: str, teacher: Logits | None = None) -> None:
        """Give nothing: images do not matter."""

    def loss(self, seen: Views, task: str, teacher: Views) -> None:
        """Give nothing: images do not matter."""

    def penalty(self, parameters: Sequence[Tensor]) -> Loss | None:
        """Give the sum of squared differences; None where there are no parameters."""
        terms = [(a - b.to(a)).square().sum() for a, b in zip(parameters, self.start, strict=True)]
        return sum(terms[1:], terms[0]) if terms else None
