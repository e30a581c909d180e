"""TIES-Merging: trim, elect sign, disjoint merge."""

from collections.abc import Callable

from torch import Tensor

from adamerge.static.primitives.signs import Aggregate, aggregate_by, trim_and_elect
from adamerge.static.registry import static_method, task_vector_edit
from adamerge.vectors import Stacks

_TITLE, _SOURCE = "TIES-Merging", "arXiv:2306.01708"


@task_vector_edit(title=f"{_TITLE}: trim and elect", source=_SOURCE, scope="model")
def ties_trim(stacks: Stacks, *, density: float = 0.2) -> Callable[[Tensor], Tensor]:
    """Trim every task vector and drop the entries that disagree with the elected sign.

    The vectors stay separate: this is the pre-processing of AdaMerging++ (arXiv:2310.02575).

    Args:
        stacks: fp32 task vectors of the whole model.
        density: Fraction of entries kept per task, by magnitude over the whole model; entries equal to
            the threshold are all kept.

    Returns:
        The edit of ``[task, *any]`` vectors.

    Raises:
        InputError: ``density`` is outside (0, 1].
    """
    return trim_and_elect(stacks, density)


@static_method(title=_TITLE, source=_SOURCE, scope="model")
def ties(
    stacks: Stacks, *, density: float = 0.2, aggregate: Aggregate = "sum", scale: float = 0.3
) -> Callable[[Tensor], Tensor]:
    """Merge the trimmed entries that agree with the elected sign.

    Args:
        stacks: fp32 task vectors of the whole model.
        density: Fraction of entries kept per task, by magnitude over the whole model.
        aggregate: How agreeing entries are joined: "sum" (with scale 0.3: the CLIP tables), "mean" of
            the non-zero ones (with scale 1: the paper's default), or "max" (the largest magnitude).
        scale: Coefficient of the merged task vector.

    Returns:
        The merge of ``[task, *any]`` vectors.

    Raises:
        InputError: An option is out of its range.
    """
    join, trim = aggregate_by(aggregate), ties_trim(stacks, density=density)
    return lambda stack: scale * join(trim(stack))
