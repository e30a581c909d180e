"""The staged step: the exact gradient of the coefficients at the cost of training one model.

Merge once; treat the merged tensors as leaves; run forward and backward pass after pass, each graph freed
at once; project the leaves' gradients onto the vectors. Large gradients are projected and freed while the
backward runs, so that no copy of the model's gradients ever exists; small ones add up over the passes and
are projected once, which is faster. So are all of them where vectors stay in their files, which are then
read twice in a step, however many passes it has: one copy of the gradients is less than the experts.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from adamerge.state import State
from adamerge.vectors.block import Block, project_one, stack_columns
from adamerge.vectors.store import TaskVectors

_LARGE = 2**17  # entries from which freeing a gradient at once is worth a projection in every pass


class StepResult(NamedTuple):
    """What a staged step gives back.

    Attributes:
        losses: One detached loss per pass.
        gradient: d (sum of losses) / d coefficients, ``[task, tensor]``, fp32.
        gradients: d (each loss) / d coefficients, where they were asked for.
    """

    losses: list[Float[Tensor, ""]]
    gradient: Float[Tensor, "task tensor"]
    gradients: Sequence[Float[Tensor, "task tensor"]] = ()


def staged_step(
    vectors: TaskVectors,
    coefficients: Float[Tensor, "task tensor"],
    passes: Iterable[Callable[[State], Tensor]],
    *,
    names: Sequence[str] | None = None,
    scale: float = 1.0,
    apart: bool = False,
) -> StepResult:
    """Differentiate a sum of losses of one merged model with respect to its coefficients.

    Args:
        vectors: The base and the task vectors.
        coefficients: One coefficient per task and tensor, in the order of ``vectors.names``.
        passes: Functions from merged weights to a scalar loss; each one's graph is freed before the
            next begins, so peak memory does not depend on their number.
        names: The tensors that the losses read; default: all. Others get a zero gradient.
        scale: Factor of the loss during the backward passes (fp16 under autocast); it is taken out of
            the gradient again.
        apart: Give each loss's gradient, too.
    """
    names = vectors.names if names is None else names
    merged = vectors.merge(coefficients.detach(), names)
    leaves = {name: weight.requires_grad_() for name, weight in merged.items() if name in vectors.blocks}
    columns = _Columns(vectors.blocks)
    columns.watch(leaves)
    losses, gradients = [], []
    zero = torch.zeros_like(coefficients, dtype=torch.float32)
    for loss_of in passes:
        loss = loss_of(merged)
        if loss.requires_grad:
            (loss * scale).backward()
        losses.append(loss.detach())
        if apart:
            gradients.append(columns.matrix(leaves, vectors.names, zero) / scale)
            columns.known.clear()
    total = sum(gradients, zero) if apart else columns.matrix(leaves, vectors.names, zero) / scale
    return StepResult(losses, total, gradients)


def leaf_step(
    merged: State, passes: Iterable[Callable[[State], Tensor]], *, scale: float = 1.0
) -> tuple[list[Float[Tensor, ""]], Float[Tensor, ""]]:
    """Differentiate a sum of losses with respect to whatever weights were made from.

    The staged step for weights that are no plain sum of vectors: the graph that made them is walked once,
    after all passes.

    Args:
        merged: Weights with their graph; those without one cost no gradient.
        passes: As in `staged_step`.
        scale: As in `staged_step`.

    Returns:
        One detached loss per pass; and a scalar of value 0 with the gradient of their sum.
    """
    leaves = {name: w.detach().requires_grad_(w.requires_grad) for name, w in merged.items()}
    losses = []
    for loss_of in passes:
        loss = loss_of(leaves)
        if loss.requires_grad:
            (loss * scale).backward()
        losses.append(loss.detach())
    pairs = [(weight, leaves[name].grad) for name, weight in merged.items() if weight.requires_grad]
    terms = [((weight - weight.detach()) * (g / scale)).sum() for weight, g in pairs if g is not None]
    return losses, sum(terms[1:], terms[0]) if terms else torch.zeros(())


class _Columns:
    """The coefficients' gradient, tensor by tensor: collects the leaves' projected gradients."""

    def __init__(self, blocks: Mapping[str, Block]) -> None:
        self.blocks = blocks
        self.known: dict[str, Tensor] = {}

    def watch(self, leaves: State) -> None:
        """Take large leaves' gradients as soon as they are there, but for vectors that stay in their files.

        The hooks must not lead back to the leaves: such a cycle would keep them after the step.
        """
        for name, leaf in leaves.items():
            if leaf.numel() >= _LARGE and self.blocks[name].n_bytes:
                leaf.register_post_accumulate_grad_hook(partial(self._take, name))

    def matrix(self, leaves: State, names: Sequence[str], zero: Tensor) -> Float[Tensor, "task tensor"]:
        """Take what is left on the leaves, and join the columns in the order of names; or give ``zero``."""
        for name, leaf in leaves.items():
            if leaf.grad is not None:
                self._take(name, leaf)
        found = stack_columns([self.known.get(name) for name in names])
        return zero if found is None else found

    def _take(self, name: str, leaf: Tensor) -> None:
        """Add the projection of a leaf's gradient to its column, and free the gradient."""
        assert leaf.grad is not None  # a hook runs after accumulation
        column = project_one(self.blocks[name], leaf.grad)
        self.known[name] = self.known[name] + column if name in self.known else column
        leaf.grad = None
