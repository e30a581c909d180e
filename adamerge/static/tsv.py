"""TSV-Merge: few singular triplets of every task, made orthogonal to one another."""

import torch
from jaxtyping import Float
from torch import Tensor

from adamerge.static.primitives.spectral import OTHERS, Triplets, is_matrix, orthogonal_product, svd
from adamerge.static.registry import static_method


@static_method(
    title="Task Singular Vectors (TSV-Merge)", source="arXiv:2412.00081", scope="tensor", needs=("name",)
)
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
    most = min(vectors.shape[1:]) // len(vectors)
    parts = zip(*[svd(vector, most) for vector in vectors], strict=True)
    return orthogonal_product(Triplets(*(torch.cat(part, dim=-1) for part in parts))).mul_(scale)
