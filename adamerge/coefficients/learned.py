"""Freely learned coefficients: task-wise and layer-wise AdaMerging are two groupings of this class."""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from adamerge.coefficients.base import Coefficients
from adamerge.coefficients.grouping import group_of
from adamerge.errors import InputError
from adamerge.ranges import Coefficient, checked

Grouping = Literal["task", "tensor", "block", "module", "type"]
Clamp = Literal["off", "on", "projected"]


class Learned(Coefficients):
    """One learned number per task and group of tensors (AdaMerging, arXiv:2310.02575).

    Args:
        grouping: What shares a coefficient: "task" (task-wise), "tensor" (layer-wise as published),
            "block", "module" or "type".
        initial: Starting value, one for all or one per task.
        clamp: "off": any value; "on": clamped to [0, 1] in the forward pass, as the official code does
            (outside the range the gradient is zero); "projected": the parameter itself is clipped
            after every step.
        frozen: The values are not learned: a static merge, which something else is learned on top of.

    Raises:
        InputError: An option is out of its range.
    """

    values: Tensor

    @checked
    def __init__(
        self,
        grouping: Grouping = "tensor",
        initial: Coefficient | list[Coefficient] = 0.3,
        clamp: Clamp = "off",
        *,
        frozen: bool = False,
    ) -> None:
        super().__init__()
        values = initial if isinstance(initial, list) else [initial]
        if not values or not all(math.isfinite(value) for value in values):
            raise InputError(f"initial={initial} is not finite.", "Use a number such as 0.3.")
        if clamp not in ("off", "on", "projected"):
            raise InputError(f"clamp={clamp!r} is unknown.", "Use 'off', 'on' or 'projected'.")
        group_of((), grouping)
        self.grouping, self.initial, self.clamp, self.frozen = grouping, initial, clamp, frozen
        self.tasks: tuple[str, ...] = ()
        self.groups: list[str] = []

    def build(self, tasks: Sequence[str], names: Sequence[str]) -> None:
        """Create one fp32 parameter ``values [task, group]``; a buffer where they are frozen.

        Raises:
            InputError: ``initial`` is a list of another length than the tasks.
        """
        if isinstance(self.initial, list) and len(self.initial) != len(tasks):
            raise InputError(
                f"initial has {len(self.initial)} values for {len(tasks)} tasks.",
                f"Give one number, or one per task in the order {', '.join(tasks)}.",
            )
        self.tasks = tuple(tasks)
        self.groups, index = group_of(names, self.grouping)
        self.register_buffer("index", torch.tensor(index), persistent=False)
        if self.frozen:
            self.register_buffer("values", self._start())
        else:
            self.values = nn.Parameter(self._start())

    def forward(self) -> Float[Tensor, "task tensor"]:
        """Give one coefficient per task and tensor."""
        return self._effective()[:, self.get_buffer("index")]

    def reset(self) -> None:
        """Go back to the initial values, in place."""
        with torch.no_grad():
            self.values.copy_(self._start())

    def after_step(self) -> None:
        """Clip the parameter to [0, 1] where ``clamp`` is "projected"."""
        if self.clamp == "projected":
            with torch.no_grad():
                self.values.clamp_(0, 1)

    def table(self) -> tuple[list[str], Float[Tensor, "task group"]]:
        """Give the groups' labels and the effective coefficients on the CPU."""
        return self.groups, self._effective().detach().float().cpu()

    def _effective(self) -> Float[Tensor, "task group"]:
        return self.values.clamp(0, 1) if self.clamp == "on" else self.values

    def _start(self) -> Float[Tensor, "task group"]:
        column = torch.tensor(self.initial, dtype=torch.float32).expand(len(self.tasks))
        return column[:, None].repeat(1, len(self.groups))
