"""Iso-CTS: common and task-specific directions, all with one singular value."""

import torch
from jaxtyping import Float
from torch import Tensor

from adamerge.static.primitives.selection import kept_count
from adamerge.static.primitives.spectral import (
    OTHERS,
    RANK_TOLERANCE,
    Matrix,
    Triplets,
    gram,
    is_matrix,
    orthogonal_product,
    require_share,
    svd,
    total,
)
from adamerge.static.registry import static_method


@static_method(
    title="Isotropic merging in common and task-specific subspaces (Iso-CTS)",
    source="arXiv:2502.04959",
    scope="tensor",
    needs=("name",),
)
def iso_cts(
    vectors: Float[Tensor, "task *param"],
    *,
    name: str,
    common_share: float = 0.8,
    scale: float = 1.0,
    others: list[str] = OTHERS,
) -> Float[Tensor, "*param"]:
    """Join the sum's leading directions with what each task has beside them, all with one singular value.

    Of a matrix with r = min(rows, columns), the r - floor(common_share r) last directions of the sum, their
    number taken to the nearest multiple of T, make room for the leading directions of the tasks' rests
    (the vectors without what lies in the common left directions). The joined directions are made
    orthogonal, and their singular values are replaced by the mean. Null directions do not take part, as
    with ``iso_c``, which this is where the common share is 1. Every other tensor is the mean of the
    vectors, without the scale.

    The authors choose the scale on validation data. For 8 / 14 / 20 tasks they have 1.50 / 1.20 / 1.10 with
    ViT-B/32, 1.60 / 1.20 / 1.10 with ViT-B/16 and 1.90 / 1.50 / 1.20 with ViT-L/14.

    Args:
        vectors: fp32 task vectors.
        name: The parameter's name.
        common_share: Share of the directions that are the sum's, before the number is adjusted.
        scale: Coefficient of merged matrices.
        others: Patterns (``fnmatch``) of names whose matrices are treated as other tensors.

    Returns:
        The merged task vector.

    Raises:
        InputError: ``common_share`` is outside [0, 1].
    """
    require_share("common_share", common_share)
    if not is_matrix(vectors, name, others):
        return vectors.mean(0)
    rank, tasks = min(vectors.shape[1:]), len(vectors)
    own = _own_directions(rank, tasks, common_share)
    found = [svd(total(vectors), rank - tasks * own)]
    if own:
        found += [_beside(vector, found[0].left, own) for vector in vectors]
    left, values, right = (torch.cat(part, dim=-1) for part in zip(*found, strict=True))
    return orthogonal_product(Triplets(left, values.mean().expand_as(values), right)).mul_(scale)


def _own_directions(rank: int, tasks: int, common_share: float) -> int:
    """Count the directions of each task: the nearest number, as the authors' code has it, that fits."""
    return min(round((rank - kept_count(common_share, rank)) / tasks), rank // tasks)


def _beside(vector: Matrix, common: Float[Tensor, "row rank"], most: int) -> Triplets:
    """Give the leading triplets of a vector without its part in the common left directions."""
    rest = vector.double()
    floor = RANK_TOLERANCE * rest.norm().item()  # the rest of a vector may be nothing but rounding
    rest.addmm_(common, gram(common, vector), alpha=-1)
    return svd(rest, most, floor)
