"""Natural-gradient steps: the coefficients are few, so their curvature is kept and solved exactly."""

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from adamerge.errors import InputError
from adamerge.optimizers.base import CoefficientOptimizer
from adamerge.ranges import Positive, checked

Curvature = Literal["fisher", "gauss_newton"]


class NaturalGradient(CoefficientOptimizer):
    """Damped natural gradient from each task's own gradient (ours, after arXiv:1412.1193).

    The curvature C is a running mean, over steps, of ``sum_t w_t g_t g_t'`` over the tasks' gradients g_t:
    "fisher": w = 1, the empirical Fisher matrix of tasks; "gauss_newton": w = 1 / (2 loss_t), the
    Gauss-Newton matrix of the residuals sqrt(2 loss_t), for losses whose least value is 0, such as
    `KLTeacher`. A step is ``-lr (C + damping * trace(C) / n * I)^-1 sum_t g_t``, solved in fp64. It costs
    one backward pass per task, as steps of one task per pass do anyway.

    Args:
        params: The matrix ``[task, group]``.
        lr: Share of the step.
        damping: Relative to the mean eigenvalue of the curvature.
        decay: Weight of the earlier steps' curvature.
        curvature: "fisher" or "gauss_newton".
        most: Longest step, as the root mean square of the coefficients' changes.

    Raises:
        InputError: An option is out of its range.
    """

    reads = "task_gradients"

    @checked
    def __init__(
        self,
        params: Iterable[Any],
        lr: Positive = 1.0,
        *,
        damping: Positive = 1.0,
        decay: float = 0.9,
        curvature: Curvature = "gauss_newton",
        most: Positive = 0.1,
    ) -> None:
        if not 0 <= decay < 1:
            raise InputError(f"decay={decay} is not in [0, 1).", "Use e.g. 0.9.")
        if curvature not in ("fisher", "gauss_newton"):
            raise InputError(f"curvature={curvature!r} is unknown.", "Use 'fisher' or 'gauss_newton'.")
        super().__init__(params, {"lr": lr})
        self.damping, self.decay, self.curvature, self.most = damping, decay, curvature, most

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]  # torch overloads it
        """Update the curvature and step.

        Raises:
            InputError: The tasks' gradients are missing, the coefficients are not one matrix, or a loss is
                negative, which the Gauss-Newton matrix cannot have.
        """
        loss, values = self.evaluate(closure), self.values
        if values.grad is None:
            return loss
        gradients, losses = (found.double() for found in self.received())
        rows = gradients.flatten(1)
        state = self.state[values]
        state["curvature"] = curvature = self._updated(rows, losses, state.get("curvature"))
        state["steps"] = state.get("steps", 0) + 1
        mean = curvature / (1 - self.decay ** state["steps"])  # the running mean starts at zero
        size = self.damping * mean.diagonal().mean()
        if size > 0:  # otherwise all gradients so far are zero
            damped = mean + size * torch.eye(len(mean), dtype=mean.dtype, device=mean.device)
            step = self.param_groups[0]["lr"] * torch.linalg.solve(damped, rows.sum(0))
            length = step.square().mean().sqrt()
            with torch.no_grad():
                values.sub_((step * (self.most / length).clamp(max=1)).reshape(values.shape))
        return loss

    def _updated(
        self,
        rows: Float64[Tensor, "loss coefficient"],
        losses: Float64[Tensor, " loss"],
        before: Float[Tensor, "coefficient coefficient"] | None,
    ) -> Float64[Tensor, "coefficient coefficient"]:
        if self.curvature == "gauss_newton":
            if (losses < 0).any():
                raise InputError(
                    f"a loss is {float(losses.min()):.3g}; Gauss-Newton curvature needs losses of 0 or more.",
                    "Use curvature='fisher', or an objective such as KLTeacher.",
                )
            rows = rows / (2 * losses.clamp(min=1e-12)).sqrt()[:, None]
        found = (1 - self.decay) * rows.T @ rows
        return found if before is None else found + self.decay * before.to(rows)
