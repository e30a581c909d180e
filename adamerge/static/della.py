"""DELLA: drop entries at random, the smaller the likelier, then merge by signs."""

from typing import get_args

import torch
from jaxtyping import Float
from torch import Tensor

from adamerge.errors import InputError
from adamerge.ranges import Seed
from adamerge.static.primitives.dropping import (
    Rescale,
    highest_kept,
    in_pieces,
    match_l1_,
    random_bits,
)
from adamerge.static.primitives.ranking import by_magnitude, row_blocks
from adamerge.static.primitives.selection import require_choice
from adamerge.static.primitives.signs import Aggregate, aggregate_by, agreeing
from adamerge.static.registry import static_method, task_vector_edit

_TITLE, _SOURCE = "DELLA-Merging", "arXiv:2406.11617"


@task_vector_edit(title=f"{_TITLE}: MagPrune", source=_SOURCE, scope="tensor", needs=("name",), ordered=True)
def della_drop(
    vectors: Float[Tensor, "task *param"],
    *,
    name: str,
    density: float = 0.5,
    epsilon: float = 0.15,
    rescale: Rescale = "l1",
    seed: Seed = 0,
) -> Float[Tensor, "task *param"]:
    """Drop entries of every task vector at random, the smaller ones of a row with greater probability.

    The probability to keep an entry rises evenly with the rank of its magnitude along the last axis, from
    density - epsilon to density + epsilon.

    Args:
        vectors: fp32 task vectors of one parameter.
        name: The parameter, of which what is dropped depends, as on the expert's place in the order given.
        density: Mean probability to keep an entry.
        epsilon: How far the probability departs from it at either end.
        rescale: "l1" restores each parameter's sum of magnitudes (mergekit); "inverse_prob" divides every
            entry by its own probability (the paper); "none" leaves the kept entries as they are.
        seed: Seed of the masks.

    Returns:
        The edited vectors.

    Raises:
        InputError: A probability lies outside (0, 1], or another option is out of its range.
    """
    _require(density, epsilon, rescale)
    rows = vectors if vectors.dim() > 1 else vectors[:, None]
    size, kept = rows.shape[-1], torch.empty(rows.shape)
    ramp = torch.linspace(-1, 1, size, dtype=torch.float64) if size > 1 else torch.zeros(size)
    probability = density + epsilon * ramp
    limits = highest_kept(probability)
    weights = 1 / probability.float() if rescale == "inverse_prob" else torch.ones(size)
    for task, (vector, target) in enumerate(zip(rows, kept, strict=True)):
        start = 0
        for block, out in row_blocks(vector, target):
            bits = random_bits(seed, name, task, start, block.numel()).reshape(block.shape)
            mask = torch.le(bits, limits, out=torch.empty(block.shape))
            out.scatter_(1, by_magnitude(block), mask.mul_(weights)).mul_(block)
            start += block.numel()
    kept = kept.reshape(vectors.shape)
    return match_l1_(kept, vectors) if rescale == "l1" else kept


@static_method(title=_TITLE, source=_SOURCE, scope="tensor", needs=("name",), ordered=True)
def della(
    vectors: Float[Tensor, "task *param"],
    *,
    name: str,
    density: float = 0.5,
    epsilon: float = 0.15,
    rescale: Rescale = "l1",
    aggregate: Aggregate = "sum",
    scale: float = 0.3,
    seed: Seed = 0,
) -> Float[Tensor, "*param"]:
    """Merge what DELLA leaves of the task vectors where it agrees with the elected sign, as TIES does.

    Signs are elected parameter by parameter, as in mergekit; where a sum is exactly 0, the majority of
    the parameter's signs decides.

    Args:
        vectors: fp32 task vectors of one parameter.
        name: The parameter.
        density: Mean probability to keep an entry.
        epsilon: How far the probability departs from it for the smallest and largest entries of a row.
        rescale: How the kept entries make up for it: "l1", "inverse_prob" or "none"; see `della_drop`.
        aggregate: How agreeing entries are joined: "sum", "mean" or "max".
        scale: Coefficient of the merged task vector.
        seed: Seed of the masks.

    Returns:
        The merged task vector.

    Raises:
        InputError: An option is out of its range.
    """
    join = aggregate_by(aggregate)
    kept = della_drop(vectors, name=name, density=density, epsilon=epsilon, rescale=rescale, seed=seed)
    majority = kept.sum(0).sign().sum(dtype=torch.float64).sign().float()
    return scale * in_pieces(lambda piece: join(agreeing(piece, majority)), kept)


def _require(density: float, epsilon: float, rescale: str) -> None:
    if not 0 <= epsilon < density <= 1 - epsilon + 1e-9:
        raise InputError(
            f"density={density} and epsilon={epsilon} give probabilities outside (0, 1].",
            "Use e.g. density=0.5 and epsilon=0.15.",
        )
    require_choice("rescale", rescale, get_args(Rescale))
