"""Sharpness-aware minimisation as a wrapper of any optimizer."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from adamerge.errors import InputError
from adamerge.ranges import Factor, checked

BaseOptimizer = Callable[[Iterable[Any]], Optimizer]


class SharpnessAware(Optimizer):
    """Steps with the gradient taken at the worst point nearby (SAM; its use in SAR, ICLR 2023).

    Each step calls its closure twice: the second time at ``coefficients + e``, where the model is merged
    again, so it costs two merges, forwards and backwards.

    Args:
        params: Parameters.
        base: Makes the optimizer that applies the second gradient.
        rho: Length of the ascent ``e`` (2-norm over all parameters).
        adaptive: Scale the ascent by the squared parameter (ASAM): a coefficient of exactly 0 is then
            never perturbed.

    Raises:
        InputError: ``rho`` is negative.
    """

    @checked
    def __init__(
        self,
        params: Iterable[Any],
        base: BaseOptimizer = torch.optim.Adam,
        rho: Factor = 0.05,
        adaptive: bool = False,
    ) -> None:
        super().__init__(params, {"rho": rho, "adaptive": adaptive})
        self.base = base(self.param_groups)
        self.param_groups = self.base.param_groups
        self.state = self.base.state

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]  # torch overloads it
        """Ascend, take the gradient there, come back bit-exactly, and let the base optimizer step.

        Raises:
            InputError: No closure was given.
        """
        if closure is None:
            raise InputError(
                "SharpnessAware.step() needs a closure that recomputes the gradient.",
                "It cannot be used with precision '16-mixed', whose scaler passes none.",
            )
        with torch.enable_grad():
            loss = closure()
        before = self._ascend()
        try:
            with torch.enable_grad():
                closure()
        finally:  # also where the second pass stops with an error
            with torch.no_grad():
                for parameter, value in before.items():
                    parameter.copy_(value)
        self.base.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Give the base optimizer's state; the wrapper has none of its own."""
        return self.base.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the base optimizer's state."""
        self.base.load_state_dict(state_dict)
        self.param_groups, self.state = self.base.param_groups, self.base.state

    @torch.no_grad()
    def _ascend(self) -> dict[Tensor, Tensor]:
        """Move every parameter along its gradient; give the values from before."""
        moved = [(p, g) for g in self.param_groups for p in g["params"] if p.grad is not None]
        before = {parameter: parameter.clone() for parameter, _ in moved}
        scaled = [p.grad * (p.abs() if g["adaptive"] else 1) for p, g in moved]
        norm = torch.linalg.vector_norm(torch.cat([s.reshape(-1) for s in scaled])) if scaled else 0
        for (parameter, group), gradient in zip(moved, scaled, strict=True):
            factor = parameter.abs() if group["adaptive"] else 1
            parameter.add_(gradient * factor, alpha=group["rho"] / (float(norm) + 1e-12))
        return before
