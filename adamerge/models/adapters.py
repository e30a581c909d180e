"""Per-task residuals on a model's features, which only the task's own head sees."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated

import torch
from jaxtyping import Float
from torch import Tensor, nn

from adamerge.models.heads import Head, Residual
from adamerge.ranges import Range, Seed, checked


class Surgery(nn.Module):
    """One low-rank residual per task, after any merge (Representation Surgery, arXiv:2402.02705).

    A task's head reads z - up relu(down z) in place of the merged model's feature z, so the task must be
    known, or every head reads what its own residual makes of z. ``up`` starts at zero: at first nothing is
    changed. Train it with `FeatureMatching`, alone (``Learned(frozen=True)``) or beside coefficients.

    Args:
        rank: Inner dimension.
        seed: Of ``down``'s start, which is that of a linear layer (Kaiming, uniform).

    Raises:
        InputError: ``rank`` is not positive.
    """

    @checked
    def __init__(self, rank: Annotated[int, Range("[1, 1e5]")] = 16, seed: Seed = 0) -> None:
        super().__init__()
        self.rank, self.seed = rank, seed
        self.tasks: tuple[str, ...] = ()

    def build(self, tasks: Sequence[str], dim: int) -> None:
        """Create ``down [task, rank, dim]`` and ``up [task, dim, rank]`` in fp32."""
        self.tasks = tuple(tasks)
        self.down = nn.Parameter(torch.empty(len(tasks), self.rank, dim))
        self.up = nn.Parameter(torch.empty(len(tasks), dim, self.rank))
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """Go back to the start, in place."""
        generator = torch.Generator().manual_seed(self.seed)
        for down in self.down:
            start = torch.empty(down.shape)
            down.copy_(nn.init.kaiming_uniform_(start, a=math.sqrt(5), generator=generator))
        self.up.zero_()

    def fitted(
        self, heads: Mapping[str, Head], values: Mapping[str, Tensor] | None = None
    ) -> dict[str, Head]:
        """Give heads that read adapted features, where there is an adapter of their task.

        Args:
            heads: Heads by task; the residuals go to their device.
            values: In place of the parameters, by name.
        """
        down, up = (dict(values or self.named_parameters())[name] for name in ("down", "up"))
        own = {task: Residual(down[i], up[i]) for i, task in enumerate(self.tasks)}
        return {
            task: replace(head, residual=own[task].to(head.weight.device)) if task in own else head
            for task, head in heads.items()
        }


def surrogate(module: nn.Module, leaves: Mapping[str, Tensor], scale: float) -> Float[Tensor, ""]:
    """Give a scalar of value 0 that hands the gradients of leaves on to the parameters they were copied from.

    Parameters without a gradient get one of zeros: every process must have all of them.
    """
    terms = []
    for name, value in module.named_parameters():
        gradient = leaves[name].grad
        gradient = torch.zeros_like(value) if gradient is None else gradient / scale
        terms.append(((value - value.detach()) * gradient).sum())
    return torch.stack(terms).sum()
