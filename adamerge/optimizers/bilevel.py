"""Two levels: masks are judged after a step of the numbers."""

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from adamerge.errors import InputError
from adamerge.ranges import Rate, checked


class BiLevel(torch.optim.Adam):
    """Learns masks by the loss that they have after a step of the numbers (arXiv:2312.06173, 2410.13910).

    Each step calls its closure twice: (1) Adam moves the numbers by a large step; (2) at that point Adam
    moves the masks, and the numbers go back. Once the masks have no gradient (`Concrete`'s ``fix_after``),
    steps are Adam's on the numbers, with fresh moments. Both calls read the same images; the published code
    draws others for each.

    Args:
        params: The numbers per task and tensor first, then the masks: those of `Concrete`.
        lr: Of the numbers, once masks are fixed.
        inner_lr: Of the numbers before that.
        mask_lr: Of the masks' logits.

    Raises:
        InputError: There are no masks.
    """

    @checked
    def __init__(
        self, params: Iterable[Any], lr: Rate = 1e-3, *, inner_lr: Rate = 1.0, mask_lr: Rate = 1e-3
    ) -> None:
        numbers, *masks = params
        if not masks:
            raise InputError("BiLevel found numbers and no masks.", "Use adamerge.Concrete coefficients.")
        groups = [{"params": [numbers], "lr": inner_lr}, {"params": masks, "lr": mask_lr}]
        super().__init__([{**group, "bilevel": True} for group in groups], lr=lr)
        self.final_lr, self.inner_lr = lr, inner_lr

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]  # torch overloads it
        """Take a step on both levels, or on the numbers alone where masks have no gradient.

        Raises:
            InputError: No closure was given.
        """
        if closure is None:
            raise InputError(
                "BiLevel.step() needs a closure that recomputes the gradient.",
                "It cannot be used with precision '16-mixed', whose scaler passes none.",
            )
        numbers, masks = self.param_groups[0]["params"][0], self.param_groups[1]["params"]
        with torch.enable_grad():
            loss = closure()
        if numbers.grad is not None:
            has_two_levels = any(mask.grad is not None for mask in masks)
            self._begin(numbers, has_two_levels)
            if has_two_levels:
                self._try_numbers(numbers, masks, closure)
        super().step()
        return loss

    @torch.no_grad()
    def _try_numbers(
        self, numbers: nn.Parameter, masks: list[nn.Parameter], closure: Callable[[], Any]
    ) -> None:
        """Leave the masks' gradient at the point that a step of the numbers leads to."""
        before, moments = numbers.clone(), copy.deepcopy(self.state.get(numbers))
        for mask in masks:
            mask.grad = None
        super().step()
        try:
            with torch.enable_grad():
                closure()
        except BaseException:  # the step has not been taken
            self.state.pop(numbers)
            if moments is not None:
                self.state[numbers] = moments
            raise
        finally:
            numbers.copy_(before)
        numbers.grad = None

    def _begin(self, numbers: nn.Parameter, has_two_levels: bool) -> None:
        """Where masks have just been fixed, or are learned again, the numbers' moments are of no use."""
        group = self.param_groups[0]
        if group["bilevel"] != has_two_levels:
            self.state.pop(numbers, None)
            group.update(lr=self.inner_lr if has_two_levels else self.final_lr, bilevel=has_two_levels)
