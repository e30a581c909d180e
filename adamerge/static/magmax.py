"""MagMax: of every entry the change of largest magnitude."""

from jaxtyping import Float
from torch import Tensor

from adamerge.static.primitives.signs import largest_of
from adamerge.static.registry import static_method


@static_method(title="MagMax", source="arXiv:2407.06322", scope="entry")
def magmax(vectors: Float[Tensor, "task *any"], *, scale: float = 0.5) -> Float[Tensor, "*any"]:
    """Take every entry from the task vector in which its magnitude is largest.

    Args:
        vectors: fp32 task vectors.
        scale: Coefficient of the merged task vector; 0.5 to 0.6 is usual.

    Returns:
        The merged task vector; of x and -x it has the positive one, so that no order matters.
    """
    return scale * largest_of(vectors)
