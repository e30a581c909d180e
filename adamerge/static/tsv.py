"""TSV-Merge: few singular triplets of every task, made orthogonal to one another."""

from jaxtyping import Float
from torch import Tensor

from adamerge.static.primitives.spectral import (
    OTHERS,
    Triplets,
    is_matrix,
    orthogonal_product,
    orthogonal_terms,
    side_by_side,
    svd,
)
from adamerge.static.registry import static_method, task_vector_edit

_TITLE, _SOURCE = "Task Singular Vectors (TSV-Merge)", "arXiv:2412.00081"


@static_method(title=_TITLE, source=_SOURCE, scope="tensor", needs=("name",))
def tsv(
    vectors: Float[Tensor, "task *param"], *, name: str, scale: float = 1.0, others: list[str] = OTHERS
) -> Float[Tensor, "*param"]:
    """Merge the leading 1/T of every task's singular triplets, with the singular vectors made orthogonal.

    Of a matrix with r = min(rows, columns), floor(r / T) triplets of each task remain (none at all where
    r < T); the tasks' left vectors side by side are replaced by the nearest orthonormal ones, and so are
    the right vectors. Null directions take part in neither: two tasks with the same triplets share them.
    Every other tensor is the mean of the vectors, without the scale.

    Args:
        vectors: fp32 task vectors.
        name: The parameter's name.
        scale: Coefficient of merged matrices; the authors choose 0.1 to 3.0 on validation data.
        others: Patterns (``fnmatch``) of names whose matrices are treated as other tensors.

    Returns:
        The merged task vector.
    """
    if not is_matrix(vectors, name, others):
        return vectors.mean(0)
    return orthogonal_product(side_by_side(_leading(vectors))).mul_(scale)


@task_vector_edit(name="tsv", title=_TITLE, source=_SOURCE, scope="tensor", needs=("name",))
def tsv_terms(
    vectors: Float[Tensor, "task *param"], *, name: str, scale: float = 1.0, others: list[str] = OTHERS
) -> Float[Tensor, "task *param"]:
    """Give what each task adds to the method's merged vector: with coefficients of 1 the sum is that vector.

    A matrix is left with its own triplets under the singular vectors that all tasks made orthogonal; of every
    other tensor remains 1/T. (Ours: the start of an adaptation, which learns one coefficient for each.)

    Args:
        vectors: fp32 task vectors.
        name: The parameter's name.
        scale: Factor of the terms of matrices.
        others: As in the method: names (``fnmatch``) of matrices that are treated as other tensors.

    Returns:
        The edited vectors.
    """
    if not is_matrix(vectors, name, others):
        return vectors / len(vectors)
    return orthogonal_terms(_leading(vectors)).mul_(scale)


def _leading(vectors: Float[Tensor, "task row column"]) -> list[Triplets]:
    most = min(vectors.shape[1:]) // len(vectors)
    return [svd(vector, most) for vector in vectors]
