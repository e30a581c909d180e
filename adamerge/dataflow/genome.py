"""What data-flow search varies: one gene per slot of the sequence, and one per pair of blocks."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

from adamerge.dataflow.flow import Flow, Step
from adamerge.errors import InputError

_MOST = 5000  # the covariance of CMA-ES has the square of this many numbers


@dataclass(frozen=True)
class Genome:
    """The space of paths (arXiv:2403.13187): the blocks of all models, laid out several times in sequence.

    Genes are the include genes, of which positive ones let a block run, then, row by row, the scales
    W[i, j] of the hidden state where block j follows block i. At the start model A runs once in order:
    its include genes of the first round are +2 sigma, as published; all others are -2 sigma, where the
    publication leaves them at 0, so that a generation begins near model A and not at half of all blocks.

    Attributes:
        models: Number of models.
        blocks: Blocks of each.
        repeats: How often they are laid out.
        scales: Whether W is searched; otherwise it is 1.

    Raises:
        InputError: A number is not positive, or the genes are too many.
    """

    models: int
    blocks: int
    repeats: int = 2
    scales: bool = True

    def __post_init__(self) -> None:
        if min(self.models, self.blocks, self.repeats) < 1:
            raise InputError(f"{self} has nothing to search.", "Use repeats of 1 or more.")
        if self.size > _MOST:
            raise InputError(
                f"{self.models} models of {self.blocks} blocks have {self.size} genes, above {_MOST}.",
                "Give fewer models, or search without scales (--scales false).",
            )

    @property
    def slots(self) -> int:
        """Length of the sequence."""
        return self.models * self.blocks * self.repeats

    @property
    def size(self) -> int:
        """Number of genes."""
        return self.slots + (self.models * self.blocks) ** 2 * self.scales

    def start(self, sigma: float) -> Float64[Tensor, "1 gene"]:
        """Give the genes of model A as it is."""
        include = torch.full((self.slots,), -2 * sigma, dtype=torch.float64)
        include[: self.blocks] = 2 * sigma
        return torch.cat([include, include.new_ones(self.size - self.slots)])[None]

    def flow(self, blocks: str, genes: Float64[np.ndarray, " gene"]) -> Flow:
        """Give the path that genes stand for; it may be empty.

        Args:
            blocks: Name of the list of blocks.
            genes: Their values.
        """
        count = self.models * self.blocks
        scale = genes[self.slots :].reshape(count, count) if self.scales else np.ones((count, count))
        chosen = [int(slot) % count for slot in np.flatnonzero(genes[: self.slots] > 0)]
        before = [None, *chosen]
        factors = [1.0 if i is None else float(scale[i, j]) for i, j in zip(before, chosen, strict=False)]
        steps = [Step(*divmod(j, self.blocks), factor) for j, factor in zip(chosen, factors, strict=True)]
        return Flow(blocks, tuple(steps))
