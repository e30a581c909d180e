"""RegMean: linear layers merged by regression on the experts' own inputs."""

from jaxtyping import Float
from torch import Tensor

from adamerge.static.primitives.gram import regression_mean
from adamerge.static.registry import static_method


@static_method(
    title="Dataless Knowledge Fusion by Merging Weights of Language Models",
    source="arXiv:2212.09849",
    scope="tensor",
    needs=("gram",),
)
def regmean(
    vectors: Float[Tensor, "task *param"],
    *,
    gram: Float[Tensor, "task in in"] | None,
    shrink: float = 0.95,
) -> Float[Tensor, "*param"]:
    """Merge each linear weight so that it maps every expert's inputs as that expert does.

    Biases, norms, embeddings and convolutions are averaged.

    Args:
        vectors: fp32 task vectors.
        gram: X'X / n of each expert's inputs to this weight; None where it is no linear weight.
        shrink: Factor of the off-diagonal entries of the Gram matrices: 1 is the bare regression, 0
            weighs every input on its own. 0.95 is usual for CLIP, 0.9 for T5, 0.6 for GPT-2.

    Returns:
        The merged task vector.

    Raises:
        InputError: ``shrink`` is outside [0, 1].
    """
    return regression_mean(vectors, gram, shrink)
