"""TALL masks, and Consensus merging: what several tasks need."""

from jaxtyping import Bool, Float
from torch import Tensor

from adamerge.errors import InputError
from adamerge.static.registry import static_method, task_vector_edit

_SOURCE = "arXiv:2405.07813"


@task_vector_edit(title="TALL-masks", source=_SOURCE, scope="entry", oracle=True)
def tall_mask(vectors: Float[Tensor, "task *any"], *, mask_scale: float = 0.6) -> Float[Tensor, "task *any"]:
    """Give each task its part of the sum of all task vectors: one vector, and one bit per task and entry.

    Args:
        vectors: fp32 task vectors.
        mask_scale: How large an entry of a task's own vector must be beside the sum of all others';
            FusionBench has 0.6, the paper chooses one of 0.2, 0.3, ..., 0.6 on validation data.

    Returns:
        The masked sum, for each task.

    Raises:
        InputError: ``mask_scale`` is negative.
    """
    return _masks(vectors, mask_scale) * _total(vectors)


@task_vector_edit(title="Consensus merging: masks", source=_SOURCE, scope="entry")
def consensus_mask(
    vectors: Float[Tensor, "task *any"], *, mask_scale: float = 0.6, minimum: int = 2
) -> Float[Tensor, "task *any"]:
    """Zero the entries that fewer than ``minimum`` tasks' TALL masks hold.

    Args:
        vectors: fp32 task vectors.
        mask_scale: How large an entry of a task's own vector must be beside the sum of all others', for
            its mask to hold it.
        minimum: Number of masks that must hold an entry: 0 keeps all, more than there are tasks none.

    Returns:
        The edited vectors.

    Raises:
        InputError: An option is negative.
    """
    if minimum < 0:
        raise InputError(f"minimum={minimum} is negative.", "Use 2: an entry that two tasks need.")
    return vectors * (_masks(vectors, mask_scale).sum(0) >= minimum)


@static_method(title="Consensus merging (TALL-masks)", source=_SOURCE, scope="entry")
def consensus(
    vectors: Float[Tensor, "task *any"], *, mask_scale: float = 0.6, minimum: int = 2, scale: float = 0.3
) -> Float[Tensor, "*any"]:
    """Sum the task vectors where several tasks need them, so that what serves one task alone is left out.

    Args:
        vectors: fp32 task vectors.
        mask_scale: How large an entry of a task's own vector must be beside the sum of all others', for
            its mask to hold it.
        minimum: Number of masks that must hold an entry: 0 keeps all, more than there are tasks none.
        scale: Coefficient of the sum.

    Returns:
        The merged task vector.

    Raises:
        InputError: An option is negative.
    """
    return scale * _total(consensus_mask(vectors, mask_scale=mask_scale, minimum=minimum))


def _masks(vectors: Float[Tensor, "task *any"], mask_scale: float) -> Bool[Tensor, "task *any"]:
    if mask_scale < 0:
        raise InputError(f"mask_scale={mask_scale} is negative.", "Use 0.2 to 0.6.")
    return vectors.abs() > mask_scale * (_total(vectors) - vectors).abs()


def _total(vectors: Float[Tensor, "task *any"]) -> Float[Tensor, "*any"]:
    return vectors.double().sum(0).float()  # the same bits in whatever order the experts come
