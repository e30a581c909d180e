"""Fisher merging: every entry averaged by how much each expert's predictions depend on it."""

from collections.abc import Callable, Iterable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from adamerge.errors import InputError
from adamerge.static.registry import static_method
from adamerge.vectors import Stacks

_Fisher = Callable[[str, Mapping[str, Tensor]], Tensor | None]


@static_method(
    title="Merging Models with Fisher-Weighted Averaging",
    source="arXiv:2111.09832",
    scope="model",
    grain="tensor",
    needs=("fisher", "name"),
)
def fisher(
    stacks: Stacks, *, fisher: _Fisher, normalize: bool = True, floor: float = 1e-6
) -> Callable[..., Tensor]:
    """Average the experts entry by entry, weighted by the diagonals of their Fisher matrices.

    Where no expert has any Fisher information, this is the plain average.

    Args:
        stacks: fp32 task vectors of the whole model.
        fisher: The diagonals ``[task, *param]`` of a parameter, by name; None: the plain average.
        normalize: Divide every expert's diagonal by its root mean square over the model, so that no
            expert outweighs the others because its predictions are less certain.
        floor: Added to every (normalised) diagonal.

    Returns:
        The merge of a parameter's ``[task, *param]`` vectors.

    Raises:
        InputError: ``floor`` is negative.
    """
    if not floor >= 0:
        raise InputError(f"floor={floor} is negative.", "Use e.g. 1e-6; 0 for none.")
    sizes = _sizes(stacks.shapes, fisher, stacks.n_tasks) if normalize else torch.ones(stacks.n_tasks)

    def weighted(vectors: Float[Tensor, "task *param"], *, name: str) -> Float[Tensor, "*param"]:
        diagonals = fisher(name, {})
        if diagonals is None:
            return vectors.mean(0)
        weights = diagonals / sizes.reshape(-1, *[1] * (vectors.dim() - 1)) + floor
        weights = torch.where(weights.sum(0) > 0, weights, 1.0)
        return vectors[0] + (weights * (vectors - vectors[0])).sum(0) / weights.sum(0)

    return weighted


def _sizes(names: Iterable[str], fisher: _Fisher, n_tasks: int) -> Float[Tensor, " task"]:
    """Give each diagonal's root mean square over the model; infinite where it is zero everywhere."""
    squares, count = torch.zeros(n_tasks, dtype=torch.float64), 0
    for name in names:
        diagonals = fisher(name, {})
        if diagonals is not None:
            squares += diagonals.reshape(n_tasks, -1).double().square().sum(1)
            count += diagonals[0].numel()
    return torch.where(squares > 0, (squares / max(count, 1)).sqrt(), torch.inf).float()
