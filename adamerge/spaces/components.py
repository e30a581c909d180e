"""Coefficients of singular components: which directions of each expert's matrices take part."""

from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from adamerge.coefficients.learned import Clamp, Grouping
from adamerge.errors import InputError
from adamerge.ranges import Coefficient, PositiveShare, checked
from adamerge.spaces.base import Numbers, Space
from adamerge.vectors import TaskVectors

Kind = Literal["mask", "weight"]
_SHARPNESS = 10.0  # of the sigmoid that stands in for the step in the backward pass: logits are divided by it
_LOGIT = 0.1  # of a component that is kept at the start; minus this: left out


class Components(Space):
    """Numbers per task and tensor, and per singular component a mask or a weight (AdaRank, arXiv:2503.22178).

    A matrix (a convolution as its first axis by all others) of task t is sum over i of s_i u_i v_i'; here
    each term has a coefficient: number[task, tensor] x mask[task, i]. Masks are binary, with the gradient
    of sigmoid(logit / 10) in the backward pass; weights are free and start at 1.

    Args:
        kind: "mask" (AdaRank) or "weight" (ours).
        keep: Share of the components that take part at the start, the largest ones.
        rank: Share of the components that can take part; the others are left out for good.
        grouping: Which tensors share a number, as in `Learned`.
        initial: The numbers' start, as in `Learned`.
        clamp: Of the numbers, as in `Learned`.
        pattern: Which tensors are refined (`re.search`), of those with two or more axes; None: all.

    Raises:
        InputError: An option is out of its range.
    """

    @checked
    def __init__(
        self,
        kind: Kind = "mask",
        keep: PositiveShare = 1.0,
        rank: PositiveShare = 1.0,
        *,
        grouping: Grouping = "tensor",
        initial: Coefficient | list[Coefficient] = 0.3,
        clamp: Clamp = "off",
        pattern: str | None = None,
    ) -> None:
        super().__init__(grouping, initial, clamp, pattern=pattern)
        if not 0 < keep <= 1 or not 0 < rank <= 1:
            raise InputError(f"keep={keep}, rank={rank}.", "Both are shares in (0, 1].")
        if kind not in get_args(Kind):
            raise InputError(f"kind={kind!r} is unknown.", f"Use one of {', '.join(get_args(Kind))}.")
        self.kind, self.keep, self.rank = kind, keep, rank

    def refine(self, name: str, vectors: TaskVectors) -> None:
        """Decompose a tensor's vectors, unless it has one axis."""
        dense = vectors.blocks[name].dense()
        if dense.dim() < 3:
            return
        matrices = dense.flatten(2).float()
        count = max(1, round(self.rank * min(matrices.shape[1:])))
        left, values, right = (x[..., :count] for x in _svd(matrices))
        start = self._start(*values.shape).to(values)
        self.fine.add(name, start, left=left * values[:, None], right=right)

    def merged(self, name: str, numbers: Numbers, vectors: TaskVectors) -> Float[Tensor, "*param"]:
        """Give base + sum over tasks and components of number * coefficient * left * right'."""
        left, right = self.fine.constant(name, "left"), self.fine.constant(name, "right")
        coefficients = numbers[:, None] * self._coefficients(name)
        scaled = (left * coefficients[:, None]).transpose(0, 1).flatten(1)
        base = vectors.blocks[name].base_tensor().to(scaled)
        found = torch.addmm(base.flatten(1), scaled, right.transpose(1, 2).flatten(0, 1))
        return found.view(base.shape)

    def effective(self, name: str, numbers: Numbers) -> Numbers:
        """Give number x mean over components."""
        return numbers * self._coefficients(name).mean(1)

    def start(self, name: str) -> Tensor:
        """Give the logits of the components that are kept at the start, or weights of 1."""
        return self._start(*self.fine[name].shape)

    def _start(self, n_tasks: int, count: int) -> Float[Tensor, "task component"]:
        inside = torch.arange(count) < max(1, round(self.keep * count))
        high, low = (_LOGIT, -_LOGIT) if self.kind == "mask" else (1.0, 0.0)
        return torch.where(inside, high, low).expand(n_tasks, -1).clone()

    def _coefficients(self, name: str) -> Float[Tensor, "task component"]:
        values = self.fine[name]
        if self.kind == "weight":
            return values
        soft = torch.sigmoid(values / _SHARPNESS)
        return (soft > 0.5).to(soft) + soft - soft.detach()


def _svd(matrices: Float[Tensor, "task row column"]) -> tuple[Tensor, Tensor, Tensor]:
    """Give left vectors in columns, singular values, and right vectors in columns."""
    left, values, right = torch.linalg.svd(matrices, full_matrices=False)
    return left, values, right.transpose(1, 2)
