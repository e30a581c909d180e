"""Inner products of task vectors, from which lengths and angles follow."""

import torch
from jaxtyping import Float, Float64
from torch import Tensor

_CHUNK = 2**18  # entries of all tasks that are widened to fp64 at once, in a core's cache


def row_products(
    vectors: Float[Tensor, "task *param"], origin: Float[Tensor, "*param"] | None = None
) -> Float64[Tensor, "row task task"]:
    """Give all inner products in fp64 for every row of a matrix or filter of a kernel.

    The products of whole tensors are their sum; tensors of fewer dimensions are one row.

    Args:
        vectors: fp32 task vectors.
        origin: Added to every vector first.
    """
    n_tasks, shape = len(vectors), vectors.shape[1:]
    n_rows = shape[0] if len(shape) > 1 else 1
    width = shape.numel() // max(n_rows, 1)
    rows = vectors.reshape(n_tasks, n_rows, width).transpose(0, 1)
    starts = rows.new_zeros(n_rows, 1, 1) if origin is None else origin.reshape(n_rows, 1, width)
    step = max(_CHUNK // max(n_tasks * width, 1), 1)
    buffer = rows.new_empty(min(step, n_rows), n_tasks, width, dtype=torch.float64)
    products = rows.new_empty(n_rows, n_tasks, n_tasks, dtype=torch.float64)
    for start in range(0, n_rows, step):
        span = slice(start, min(start + step, n_rows))
        wide = buffer[: span.stop - start].copy_(rows[span]).add_(starts[span])
        torch.bmm(wide, wide.mT, out=products[span])
    return products
