"""KnOTS: low-rank task matrices are merged in the directions that they have in common."""

from collections.abc import Callable
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from adamerge.errors import InputError
from adamerge.ranges import Seed
from adamerge.static.primitives.dropping import highest_kept, random_bits
from adamerge.static.primitives.selection import (
    global_threshold,
    keep_at_least,
    require_choice,
    require_fraction,
    require_proper_fraction,
)
from adamerge.static.primitives.signs import Aggregate, aggregate_by, agreeing
from adamerge.static.primitives.spectral import RANK_TOLERANCE, is_matrix, product, svd
from adamerge.static.registry import static_method
from adamerge.vectors import Stacks

Merger = Literal["ties", "linear"]


@static_method(
    title="Model merging with SVD to tie the KnOTS",
    source="arXiv:2410.19735",
    scope="model",
    needs=("name",),
    grain="tensor",
)
def knots(
    stacks: Stacks,
    *,
    merger: Merger = "ties",
    density: float = 0.2,
    aggregate: Aggregate = "mean",
    scale: float = 1.0,
    cutoff: float = 1e-4,
    drop_rate: float = 0.0,
    seed: Seed = 0,
) -> Callable[..., Tensor]:
    """Align the tasks' matrices by one SVD, and merge their coordinates.

    The SVD of a parameter's task matrices side by side, [V_1 ... V_T] = U S [W_1' ... W_T'], gives left
    directions U that all tasks share, and coordinates S W_t' of each. Those are merged, and U leads back.
    "ties" trims each task's coordinates by magnitude over all matrices of the model; a coordinate whose
    sum is exactly 0 is dropped, for a majority sign means nothing where every direction's sign is
    arbitrary. Tensors that are no matrices are the mean of the vectors, without the scale.

    With a drop rate, coordinates are first dropped at random and the others rescaled, as DARE
    (arXiv:2311.03099) does, by each expert's place in the order given.

    Directions and coordinates stay in memory: small for LoRA experts; as large as all the vectors, and
    more, where experts were fine-tuned in full.

    Args:
        stacks: fp32 task vectors of the whole model.
        merger: "ties" trims and elects signs; "linear" joins all coordinates.
        density: Fraction of coordinates kept per task; for "ties".
        aggregate: How coordinates are joined: "sum", "mean" (of non-zero ones), or "max" (the largest
            magnitude).
        scale: Coefficient of merged matrices; the authors have 0.6 for ViT-B/32 with rank 16, by search.
        cutoff: Directions whose singular value is not above this are left out.
        drop_rate: Probability to drop a coordinate, in [0, 1).
        seed: Seed of the dropping.

    Returns:
        The merge of ``[task, *param]`` vectors, by name.

    Raises:
        InputError: An option is out of its range.
    """
    require_choice("merger", merger, get_args(Merger))
    if not cutoff >= 0:
        raise InputError(f"cutoff={cutoff} is negative.", "Use e.g. 1e-4.")
    require_fraction("density", density)
    require_proper_fraction("drop_rate", drop_rate)
    join = aggregate_by(aggregate)
    directions: dict[str, Tensor] = {}
    coordinates: dict[str, Tensor] = {}
    for name, stack in stacks:
        if is_matrix(stack):
            directions[name], coordinates[name] = _align(stack, cutoff)
            _drop_(coordinates[name], name, drop_rate, seed)
    if merger == "ties" and coordinates:
        threshold = global_threshold(Stacks.of(coordinates), density)
        coordinates = {
            name: agreeing(keep_at_least(stack, threshold), torch.zeros(()))
            for name, stack in coordinates.items()
        }
    merged = {name: scale * join(stack) for name, stack in coordinates.items()}

    def apply(stack: Tensor, *, name: str) -> Tensor:
        return product(directions[name], merged[name]) if name in merged else stack.mean(0)

    return apply


def _align(
    stack: Float[Tensor, "task row column"], cutoff: float
) -> tuple[Float[Tensor, "row rank"], Float[Tensor, "task rank column"]]:
    """Give the directions that the tasks share, and each task's coordinates in them."""
    parts = [svd(vector) for vector in stack]
    # The SVD of [L_1 S_1 R_1' ... L_T S_T R_T'] follows from that of [L_1 S_1 ... L_T S_T], as the R_t are
    # orthonormal.
    left, values, mixed = svd(torch.cat([part.left * part.values for part in parts], dim=1), floor=cutoff)
    own = (mixed * values).T.split([len(part.values) for part in parts], dim=1)
    coordinates = torch.stack([(o @ p.right.T).float() for o, p in zip(own, parts, strict=True)])
    rounding = RANK_TOLERANCE * values.max().item() if len(values) else 0.0
    return left.float(), coordinates.where(coordinates.abs() > rounding, 0.0)  # TIES counts what is not 0


def _drop_(coordinates: Float[Tensor, "task rank column"], name: str, rate: float, seed: int) -> None:
    """Drop coordinates in place, and rescale the others."""
    if rate == 0:
        return
    limit = highest_kept(torch.tensor(1 - rate))
    for task, own in enumerate(coordinates):
        bits = random_bits(seed, name, task, 0, own.numel()).reshape(own.shape)
        own.mul_((bits <= limit) / (1 - rate))
