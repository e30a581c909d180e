"""The staged step: the exact gradient of the coefficients at the cost of training one model.

Merge once; treat the merged tensors as leaves; run forward and backward pass after pass, each graph freed
at once, gradients adding up on the leaves; then project them onto the vectors, once.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from adamerge.state import State
from adamerge.vectors.block import project
from adamerge.vectors.store import TaskVectors


class StepResult(NamedTuple):
    """What a staged step gives back.

    Attributes:
        losses: One detached loss per pass.
        gradient: d (sum of losses) / d coefficients, ``[task, tensor]``, fp32.
    """

    losses: list[Float[Tensor, ""]]
    gradient: Float[Tensor, "task tensor"]


def staged_step(
    vectors: TaskVectors,
    coefficients: Float[Tensor, "task tensor"],
    passes: Iterable[Callable[[State], Tensor]],
    *,
    names: Sequence[str] | None = None,
    scale: float = 1.0,
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
    """
    names = vectors.names if names is None else names
    merged = vectors.merge(coefficients.detach(), names)
    leaves = {name: weight.requires_grad_() for name, weight in merged.items()}
    losses = []
    for loss_of in passes:
        loss = loss_of(leaves)
        if loss.requires_grad:
            (loss * scale).backward()
        losses.append(loss.detach())
    gradients = [leaves[name].grad if name in leaves else None for name in vectors.names]
    blocks = [vectors.blocks[name] for name in vectors.names]
    gradient = project(blocks, gradients)
    if gradient is None:
        return StepResult(losses, torch.zeros_like(coefficients, dtype=torch.float32))
    return StepResult(losses, gradient / scale)
