"""One coefficient per task and entry of every tensor, or per row: the largest spaces."""

from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from adamerge.errors import InputError
from adamerge.ranges import Coefficient, checked
from adamerge.spaces.base import Numbers, Space
from adamerge.vectors import Block, TaskVectors


class Weighted(torch.autograd.Function):
    """base + sum over tasks of coefficients * vector; expands one tensor at a time and keeps none of them."""

    @staticmethod
    def forward(ctx: Any, values: Float[Tensor, "task *shared"], block: Block) -> Float[Tensor, "*param"]:
        """Add up task by task; ``values`` broadcast to the vectors."""
        ctx.block, ctx.shape = block, values.shape
        merged = block.base_tensor().to(values, copy=True)
        for value, vector in zip(values, block.dense(), strict=True):
            merged.addcmul_(value, vector.to(values))
        return merged

    @staticmethod
    def backward(ctx: Any, gradient: Float[Tensor, "*param"]) -> tuple[Tensor, None]:  # type: ignore[override]  # torch declares Any
        """Give each coefficient the inner product of the gradient with what it scales."""
        vectors = ctx.block.dense()
        rows = [(gradient * v.to(gradient)).sum_to_size(ctx.shape[1:]) for v in vectors]
        return torch.stack(rows), None


class Elements(Space):
    """One learned coefficient per task and entry, as ProDistill has them (arXiv:2502.12706), or per row.

    Per entry there are as many parameters as in all experts together: it needs an objective that says much
    about every image, such as `FeatureMatching` or `KLTeacher`, and, with Adam, five times the memory of the
    experts. Per row (ours) each output of a matrix has a coefficient per task; vectors of one axis have one
    per entry either way.

    Args:
        per: What has a coefficient: an "entry", or a "row" along the first axis.
        initial: The coefficients' start.
        pattern: Which tensors are refined (`re.search`); the others have one number per task. None: all.

    Raises:
        InputError: The pattern is no regular expression, or ``per`` is neither.
    """

    @checked
    def __init__(
        self, per: Literal["entry", "row"] = "entry", initial: Coefficient = 0.3, pattern: str | None = None
    ) -> None:
        super().__init__("tensor", initial, pattern=pattern)
        if per not in ("entry", "row"):
            raise InputError(f"per={per!r} is unknown.", "Use 'entry' or 'row'.")
        self.per, self.initial = per, initial

    def refine(self, name: str, vectors: TaskVectors) -> None:
        """Give every task and entry, or row, a coefficient."""
        n_tasks, *shape = vectors.blocks[name].shape
        shape = shape if self.per == "entry" else [*shape[:1], *(1 for _ in shape[1:])]
        self.fine.add(name, torch.full((n_tasks, *shape), self.initial))

    def merged(self, name: str, numbers: Numbers, vectors: TaskVectors) -> Float[Tensor, "*param"]:
        """Give base + sum over tasks of coefficients * vector, entry by entry."""
        return Weighted.apply(self.fine[name], vectors.blocks[name])

    def effective(self, name: str, numbers: Numbers) -> Numbers:
        """Give the mean over entries or rows."""
        return self.fine[name].flatten(1).mean(1)

    def start(self, name: str) -> Tensor:
        """Give the same value for all."""
        return torch.full_like(self.fine[name], self.initial)
