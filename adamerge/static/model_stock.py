"""Model Stock: from the base towards the average, as far as the experts agree."""

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from adamerge.errors import InputError
from adamerge.static.primitives.angles import row_products
from adamerge.static.registry import static_method

_SMALLEST = 1e-6  # of a denominator


@static_method(
    title="Model Stock: All we need is just a few fine-tuned models",
    source="arXiv:2403.19522",
    scope="tensor",
)
def model_stock(
    vectors: Float[Tensor, "task *param"], *, per_row: bool = False, min_cosine: float = 0.0
) -> Float[Tensor, "*param"]:
    """Scale the mean task vector by T c / (1 + (T - 1) c), c being the experts' mean pairwise cosine.

    Args:
        vectors: fp32 task vectors.
        per_row: Measure the angle for every row of a matrix (every filter of a kernel) on its own
            instead of once per tensor.
        min_cosine: Lower bound of the mean cosine. 0: where experts oppose each other the base stays;
            -1: the bare formula, which then walks away from the experts and has a pole.

    Returns:
        The merged task vector.

    Raises:
        InputError: ``min_cosine`` is outside [-1, 1].
    """
    if not -1 <= min_cosine <= 1:
        raise InputError(f"min_cosine={min_cosine} is outside [-1, 1].", "0 is usual.")
    n_tasks, mean = len(vectors), vectors.mean(0)
    if n_tasks == 1:
        return mean
    products = row_products(vectors)
    cosine = _mean_cosine(products if per_row else products.sum(0, keepdim=True)).clamp(min=min_cosine)
    share = n_tasks * cosine / (1 + (n_tasks - 1) * cosine).clamp(min=_SMALLEST)
    return mean * (share.squeeze() if len(share) == 1 else share.reshape(-1, *[1] * (mean.dim() - 1)))


def _mean_cosine(products: Float64[Tensor, "row task task"]) -> Float[Tensor, " row"]:
    lengths = products.diagonal(dim1=1, dim2=2).sqrt()
    cosines = products / (lengths[:, :, None] * lengths[:, None]).clamp(min=_SMALLEST)
    first, second = torch.triu_indices(products.shape[1], products.shape[2], 1)
    return cosines[:, first, second].clamp(-1, 1).mean(1).float()
