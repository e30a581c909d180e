"""OPCM: continual merging that projects out of each expert what the merged model occupies already."""

from collections.abc import Callable

import torch
from torch import Tensor

from adamerge.static.primitives.spectral import (
    Matrix,
    gram,
    is_matrix,
    product,
    require_share,
    spectrum,
    square_norm,
    tall,
)
from adamerge.static.registry import static_method
from adamerge.vectors import Stacks

_EMBEDDINGS = ["*embed*", "*wte.*", "*wpe.*", "shared.weight", "*.shared.weight"]


@static_method(
    title="Orthogonal projection-based continual merging (OPCM)",
    source="arXiv:2501.09522",
    scope="model",
    needs=("name",),
    grain="tensor",
    ordered=True,
)
def opcm(
    stacks: Stacks, *, alpha: float = 0.5, others: list[str] = _EMBEDDINGS, shuffle_seed: int | None = None
) -> Callable[..., Tensor]:
    """Add the experts one after the other, each without what overlaps the leading directions so far.

    Per linear weight, the next vector is written in the singular directions of the merged one; its block
    in the leading directions and its diagonal are dropped (in null directions, of which an SVD chooses
    arbitrary ones, nothing is). Other tensors are added up. The norm of the whole merged vector is pinned
    to the mean norm of the experts'. The published recursion pins it after every expert and undoes that
    before the next; as neither the directions nor the split depend on the scale, once at the end is the same.

    One merged vector of the model is kept in fp32, however many experts there are.

    Args:
        stacks: fp32 task vectors of the whole model, in the order in which the experts arrive.
        alpha: Share of the sum of singular values that the leading directions hold.
        others: Patterns (``fnmatch``) of names whose matrices are no linear weights; the default has the
            usual names of embeddings.
        shuffle_seed: Seed of a random order of arrival; by default the experts arrive as given.

    Returns:
        The merge of ``[task, *param]`` vectors, by name.

    Raises:
        InputError: ``alpha`` is outside [0, 1].
    """
    require_share("alpha", alpha)
    order = _order(stacks.n_tasks, shuffle_seed)
    merged: dict[str, Tensor] = {}
    own, pinned = torch.zeros(len(order), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for name, stack in stacks:
        project = is_matrix(stack, name, others)
        arrived = torch.zeros(stack.shape[1:], dtype=torch.float64)
        for index in order:
            vector = stack[index]
            own[index] += square_norm(vector)
            if project and arrived.any():
                _make_room(arrived, vector, alpha)
            arrived += vector
        pinned += square_norm(arrived)
        merged[name] = arrived.float()
    factor = (own.sqrt().mean() / pinned.sqrt()).item() if pinned > 0 else 1.0
    return lambda stack, *, name: factor * merged[name]


def _make_room(merged: Matrix, vector: Matrix, alpha: float) -> None:
    """Subtract, in place, what is to be dropped of a vector: the leading block and the diagonal."""
    long = tall(merged)
    values, basis = spectrum(gram(long))
    inside = basis.T @ gram(long, vector if long is merged else vector.T) @ basis / values[:, None]
    leading = int((values.cumsum(0) <= alpha * values.sum()).sum())
    dropped = inside.diagonal().diag()
    dropped[:leading, :leading] = inside[:leading, :leading]
    long -= product(long, basis / values @ dropped @ basis.T)


def _order(tasks: int, seed: int | None) -> list[int]:
    if seed is None:
        return list(range(tasks))
    return torch.randperm(tasks, generator=torch.Generator().manual_seed(seed)).tolist()
