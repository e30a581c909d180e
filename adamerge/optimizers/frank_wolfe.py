"""Frank-Wolfe steps: towards the experts that the gradient points at, never out of their hull."""

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from adamerge.errors import InputError
from adamerge.optimizers.base import CoefficientOptimizer
from adamerge.ranges import PositiveShare, Rate, checked

Granularity = Literal["group", "task"]
Direction = Literal["inner_product", "cosine"]


class FrankWolfe(CoefficientOptimizer):
    """FW-Merging (arXiv:2503.12649) on coefficients.

    The candidates are the experts (``scale`` for one task, 0 for the others) and the start. Step t goes by
    ``lr * 2 / (t + 2)`` of the way to the candidate that the linearised loss prefers, so the coefficients
    stay in the candidates' hull.

    Hard steps choose by the gradient of the sum of losses. Soft ones go to the mean of what each task's
    own gradient chooses (ours: the published code learns the chosen candidates' shares by 500 Adam steps,
    and lets no candidate be chosen twice, so that with as many tasks as candidates all are).

    Args:
        params: The matrix ``[task, group]``.
        lr: Factor of the steps in (0, 1]; the published code has 0.03, the algorithm 1.
        scale: Coefficient of a candidate's task. 1: the expert itself; from 0.3 times the number of tasks
            on, the hull has task arithmetic's usual point inside (ours).
        soft: Let every task choose.
        granularity: "group": each group of tensors has a candidate of its own (layer-wise); "task": all
            groups have the same (task-wise).
        direction: "inner_product": the linear minimisation of the algorithm; "cosine": each group's
            products are divided by the lengths of gradient and candidate, so that all groups have the same
            say (the published code does so with whole weights, here with coefficients).

    Raises:
        InputError: An option is out of its range.
    """

    @checked
    def __init__(
        self,
        params: Iterable[Any],
        lr: PositiveShare = 1.0,
        *,
        scale: Rate = 1.0,
        soft: bool = False,
        granularity: Granularity = "group",
        direction: Direction = "inner_product",
    ) -> None:
        if not 0 < lr <= 1:
            raise InputError(f"lr={lr} leaves the hull of the experts.", "Use a factor in (0, 1].")
        if not scale > 0:
            raise InputError(f"scale={scale} is not positive.", "Use 1, or 0.3 times the number of tasks.")
        for option, value, known in (
            ("granularity", granularity, ("group", "task")),
            ("direction", direction, ("inner_product", "cosine")),
        ):
            if value not in known:
                raise InputError(f"{option}={value!r} is unknown.", f"Use {known[0]!r} or {known[1]!r}.")
        super().__init__(params, {"lr": lr})
        self.scale, self.soft, self.granularity, self.direction = scale, soft, granularity, direction
        self.reads = "task_gradients" if soft else "gradient"

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]  # torch overloads it
        """Go a part of the way to the chosen candidates; where the gradient is zero, stay.

        Raises:
            InputError: The coefficients are not one matrix, or soft steps lack the tasks' gradients.
        """
        loss, values = self.evaluate(closure), self.values
        if values.grad is None:
            return loss
        gradients = self.received()[0] if self.soft else values.grad[None]
        state = self.state[values]
        if not state:
            state |= {"start": values.detach().clone(), "step": torch.tensor(0)}
        share = self.param_groups[0]["lr"] * 2 / (int(state["step"]) + 2)
        start = state["start"].to(values.device)
        with torch.no_grad():
            chosen = torch.stack([self._choice(g, start, values) for g in gradients])
            values.lerp_(chosen.mean(0), share)
        state["step"] += 1
        return loss

    def _choice(
        self,
        gradient: Float[Tensor, "task group"],
        start: Float[Tensor, "task group"],
        values: Float[Tensor, "task group"],
    ) -> Float[Tensor, "task group"]:
        """Give the candidate that a gradient prefers: the linear minimisation oracle."""
        n_tasks, n_groups = gradient.shape
        corners = self.scale * torch.eye(n_tasks, device=gradient.device)
        candidates = torch.cat([corners[:, :, None].expand(-1, -1, n_groups), start[None]])
        products = (candidates * gradient).sum(1)  # [candidate, group]
        if self.direction == "cosine":
            lengths = gradient.norm(dim=0) * candidates.norm(dim=1)
            products = torch.where(lengths > 0, products / lengths, 0)
        moves = gradient.any(dim=0)
        if self.granularity == "task":
            products = products.sum(1, keepdim=True).expand(-1, n_groups)
            moves = moves.any().expand(n_groups)
        best = candidates[products.argmin(0), :, torch.arange(n_groups, device=gradient.device)].T
        return torch.where(moves, best, values)
