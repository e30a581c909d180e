"""RegMean++: RegMean, block after block, on the inputs that the merged blocks before it give."""

from jaxtyping import Float
from torch import Tensor

from adamerge.static.primitives.gram import regression_mean
from adamerge.static.registry import static_method


@static_method(
    title="RegMean++: Enhancing Effectiveness and Generalization of Regression Mean for Model Merging",
    source="arXiv:2508.03121",
    scope="tensor",
    needs=("prefix_gram",),
)
def regmean_pp(
    vectors: Float[Tensor, "task *param"],
    *,
    prefix_gram: Float[Tensor, "task in in"] | None,
    shrink: float = 0.95,
) -> Float[Tensor, "*param"]:
    """Merge each linear weight by regression on inputs as they are behind the merged blocks before it.

    Biases, norms, embeddings and convolutions are averaged.

    Args:
        vectors: fp32 task vectors.
        prefix_gram: X'X / n of the inputs to this weight in each expert's block, which reads what the
            merged blocks before it make of that expert's images; None where it is no linear weight.
        shrink: Factor of the off-diagonal entries of the Gram matrices, in [0, 1].

    Returns:
        The merged task vector.

    Raises:
        InputError: ``shrink`` is outside [0, 1].
    """
    return regression_mean(vectors, prefix_gram, shrink)
