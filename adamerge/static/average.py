"""Weight averaging."""

from jaxtyping import Float
from torch import Tensor

from adamerge.static.registry import static_method


@static_method(title="Model soups: simple averaging", source="arXiv:2203.05482", scope="entry")
def average(vectors: Float[Tensor, "task *any"]) -> Float[Tensor, "*any"]:
    """Average the experts, which is to average their task vectors.

    Args:
        vectors: fp32 task vectors.

    Returns:
        The merged task vector.
    """
    return vectors.mean(0)
