"""EMR-Merging: elect one vector, mask it for each task, and rescale."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from adamerge.static.primitives.selection import per_task
from adamerge.static.registry import task_vector_edit
from adamerge.vectors import Stacks


@task_vector_edit(title="EMR-Merging", source="arXiv:2405.17461", scope="model", oracle=True)
def emr(stacks: Stacks) -> Callable[[Tensor], Tensor]:
    """Give each task its part of one unified vector, at the mean magnitude of the task's own.

    What a model then needs per task is one bit for every entry and one number.

    Args:
        stacks: fp32 task vectors of the whole model.

    Returns:
        The edit of ``[task, *any]`` vectors.
    """
    own = torch.zeros(stacks.n_tasks, dtype=torch.float64)
    masked = torch.zeros_like(own)
    for name, piece in stacks.pieces():
        size = max(torch.Size(stacks.shapes[name]).numel(), 1)  # a parameter may be empty
        own += piece.abs().sum(1, dtype=torch.float64) / size
        masked += _masked(piece).abs().sum(1, dtype=torch.float64) / size
    rescale = torch.where(masked > 0, own / masked, 0).float()
    return lambda stack: per_task(rescale, stack) * _masked(stack)


def _masked(stack: Float[Tensor, "task *any"]) -> Float[Tensor, "task *any"]:
    """Give each task the largest magnitudes of the elected sign, where its own entry has that sign."""
    elected = torch.where(stack.sum(0) > 0, 1.0, -1.0)
    agreeing = (stack * elected).clamp_(min=0)
    return agreeing.sign() * (agreeing.amax(0) * elected)
