"""Model Breadcrumbs: of each task vector neither the smallest entries nor the outliers."""

from typing import Literal, get_args

from jaxtyping import Float
from torch import Tensor

from adamerge.static.primitives.ranking import keep_ranked
from adamerge.static.primitives.selection import (
    kept_count,
    require_choice,
    require_fraction,
    require_proper_fraction,
)
from adamerge.static.registry import static_method, task_vector_edit

_TITLE, _SOURCE = "Model Breadcrumbs", "arXiv:2312.06795"
Scope = Literal["row", "tensor"]


@task_vector_edit(title=f"{_TITLE}: trim both tails", source=_SOURCE, scope="tensor")
def breadcrumbs_trim(
    vectors: Float[Tensor, "task *param"],
    *,
    keep: float = 0.15,
    outliers: float = 0.006,
    scope: Scope = "row",
) -> Float[Tensor, "task *param"]:
    """Zero the largest entries of every row, and all but the largest of what remains.

    Counts are exact: of equal magnitudes, earlier entries count as larger. In short rows they may be zero:
    of a row of 3 nothing stays under ``keep`` = 0.15. Scalars pass unchanged.

    Args:
        vectors: fp32 task vectors of one parameter.
        keep: Share of each row's entries that stays, in (0, 1]; the search of the official code begins
            at these values.
        outliers: Share of each row's entries, the largest, that is zeroed first, in [0, 1).
        scope: What a row is: "row", the entries along the last axis (the official code), or "tensor",
            the whole parameter (mergekit).

    Returns:
        The edited vectors.

    Raises:
        InputError: An option is out of its range.
    """
    require_fraction("keep", keep)
    require_proper_fraction("outliers", outliers)
    require_choice("scope", scope, get_args(Scope))
    if vectors.dim() == 1:
        return vectors
    rows = vectors if scope == "row" else vectors.flatten(1)
    size = rows.shape[-1]
    return keep_ranked(rows, kept_count(outliers, size), kept_count(keep, size)).reshape(vectors.shape)


@static_method(title=_TITLE, source=_SOURCE, scope="tensor")
def breadcrumbs(
    vectors: Float[Tensor, "task *param"],
    *,
    keep: float = 0.15,
    outliers: float = 0.006,
    scope: Scope = "row",
    scale: float = 0.2,
) -> Float[Tensor, "*param"]:
    """Sum what trimming both tails leaves of the task vectors.

    Args:
        vectors: fp32 task vectors of one parameter.
        keep: Share of each row's entries that stays, in (0, 1].
        outliers: Share of each row's entries, the largest, that is zeroed first, in [0, 1).
        scope: What a row is: "row", the entries along the last axis, or "tensor", the whole parameter.
        scale: Coefficient of the sum.

    Returns:
        The merged task vector.

    Raises:
        InputError: An option is out of its range.
    """
    return scale * breadcrumbs_trim(vectors, keep=keep, outliers=outliers, scope=scope).sum(0)
