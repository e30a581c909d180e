"""Routing without training: bounds that routers are held against, and scores that the experts give."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from adamerge.coefficients.base import Routing
from adamerge.coefficients.selection import Selection
from adamerge.ranges import Count, checked


class Oracle(Routing):
    """The true task's expert for every sample: what a faultless router would reach.

    Args:
        groups: Pattern of the tensors that are routed; None: all.
    """

    reads = "task"

    def logits(self, features: Int[Tensor, " sample"], group: str = "") -> Float[Tensor, "sample task"]:
        """Give 1 to the task of each index, 0 to the others."""
        return functional.one_hot(features.long(), len(self.tasks)).float()


class Uniform(Routing):
    """The same share of every expert for every sample: routing without knowledge.

    Args:
        groups: Pattern of the tensors that are routed; None: all.
    """

    def logits(self, features: Float[Tensor, "sample dim"], group: str = "") -> Float[Tensor, "sample task"]:
        """Give 1/T to each of T tasks."""
        n_tasks = len(self.tasks)
        return torch.full((len(features), n_tasks), 1 / n_tasks, device=features.device)


class Subspace(Routing):
    """At each matrix, the experts whose leading input directions a token has most of.

    SMILE (arXiv:2408.10174), without data or training. A token's score of an expert is the length of its
    projection on the expert's first ``gate_rank`` right singular vectors; the weights are the renormalised
    softmax of the ``top_k`` largest scores.

    Args:
        gate_rank: Right singular vectors that the score reads.
        top_k: Experts that a token gets.
        groups: Pattern of the tensors that are routed; None: all.

    Raises:
        InputError: A number is below 1.
    """

    reads = "token"

    @checked
    def __init__(self, gate_rank: Count = 1, top_k: Count = 1, groups: str | None = None) -> None:
        super().__init__(groups)
        self.gate_rank, self.top_k = gate_rank, top_k
        self._selection = Selection("top_k", top_k, renormalize=True)

    def build(self, tasks: Sequence[str], sizes: Mapping[str, int], /) -> None:
        """Meet the tasks.

        Raises:
            InputError: There are fewer tasks than ``top_k``.
        """
        super().build(tasks, sizes)
        self._selection.require_experts(len(tasks))

    def logits(self, features: Float[Tensor, "*token task"], group: str = "") -> Float[Tensor, "*token task"]:
        """Give the projections' lengths as they came, in fp32."""
        return features.float()

    def select_from(self, logits: Float[Tensor, "*token task"]) -> Float[Tensor, "*token task"]:
        """Give the renormalised softmax of the largest scores."""
        return self._selection(logits)
