"""Task arithmetic."""

from jaxtyping import Float
from torch import Tensor

from adamerge.static.registry import static_method


@static_method(title="Editing models with task arithmetic", source="arXiv:2212.04089", scope="entry")
def task_arithmetic(vectors: Float[Tensor, "task *any"], *, scale: float = 0.3) -> Float[Tensor, "*any"]:
    """Add the task vectors, all with one coefficient.

    Args:
        vectors: fp32 task vectors.
        scale: The merging coefficient; 0.3 is the published value for the eight CLIP tasks.

    Returns:
        The merged task vector.
    """
    return scale * vectors.sum(0)
