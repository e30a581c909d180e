"""One coefficient per task and entry of every tensor: the largest space."""

import torch
from jaxtyping import Float
from torch import Tensor

from adamerge.spaces.base import Numbers, Space
from adamerge.vectors import TaskVectors


class Elements(Space):
    """One learned coefficient per task and entry, as ProDistill has them (arXiv:2502.12706).

    It has as many parameters as all experts together. It needs an objective that says much about every
    image, such as `FeatureMatching` or `KLTeacher`, and several times the memory of the experts.

    Args:
        initial: The coefficients' start.
        pattern: Which tensors are refined (`re.search`); the others have one number per task. None: all.

    Raises:
        InputError: The pattern is no regular expression.
    """

    def __init__(self, initial: float = 0.3, pattern: str | None = None) -> None:
        super().__init__("tensor", initial, pattern=pattern)
        self.initial = initial

    def refine(self, name: str, vectors: TaskVectors) -> None:
        """Give every task and entry a coefficient."""
        self.fine.add(name, torch.full(vectors.blocks[name].shape, self.initial))

    def merged(self, name: str, numbers: Numbers, vectors: TaskVectors) -> Float[Tensor, "*param"]:
        """Give base + sum over tasks of coefficients * vector, entry by entry."""
        block, values = vectors.blocks[name], self.fine[name]
        return block.base_tensor().to(values) + (values * block.dense().to(values)).sum(0)

    def effective(self, name: str, numbers: Numbers) -> Numbers:
        """Give the mean over entries."""
        return self.fine[name].flatten(1).mean(1)

    def start(self, name: str) -> Tensor:
        """Give the same value for all."""
        return torch.full_like(self.fine[name], self.initial)
