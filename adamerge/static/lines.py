"""LiNeS: a merged vector that counts the more, the deeper its block."""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from adamerge.static.registry import static_method
from adamerge.vectors import Stacks

_BLOCK = re.compile(r"^((?:.*?\.)?(?:resblocks|layers?|blocks?|stages|h))\.(\d+)(?:\.|$)")


@static_method(
    title="LiNeS: Post-training Layer Scaling Prevents Forgetting and Enhances Model Merging",
    source="arXiv:2410.17146",
    scope="model",
    grain="tensor",
    needs=("name", "merged"),
)
def lines(
    stacks: Stacks,
    *,
    merged: Callable[[], Iterator[tuple[str, Tensor]]],
    alpha: float | None = None,
    beta: float | None = None,
) -> Callable[..., Tensor]:
    """Scale the merged vector of block l, of L, by alpha + beta l / (L - 1).

    Blocks are numbered by their parameters' names, each tower on its own; what lies outside blocks is
    scaled by alpha.

    Args:
        stacks: fp32 task vectors of the whole model.
        merged: Gives the vectors that are corrected, anew at each call.
        alpha: Scale of the first block; default: (1/T) |sum of the task vectors|_1 / |merged vector|_1
            over the whole model, which brings it to the size of the average's.
        beta: What the last block's scale has more than the first's; the paper tunes it on validation.
            Default: 2 (1 - alpha), but at least 0, so that blocks on average keep the size that the
            corrected method gave them.

    Returns:
        The scaling of a parameter's merged vector.
    """
    if alpha is None:
        alpha = _averages_share(stacks, merged())
    if beta is None:
        beta = max(2 * (1 - alpha), 0.0)
    depths = _depths(stacks.shapes)

    def scaled(_vectors: Tensor, *, name: str, merged: Tensor) -> Tensor:
        return merged * (alpha + beta * depths[name])

    return scaled


def _averages_share(stacks: Stacks, merged: Iterable[tuple[str, Tensor]]) -> float:
    summed = sum(_length(piece.sum(0)) for _, piece in stacks.pieces())
    size = sum(_length(vector) for _, vector in merged)
    return summed / (stacks.n_tasks * size) if size else 1.0


def _length(vector: Tensor) -> float:
    """Give the L1 norm; fp32 cannot add up a whole model."""
    return vector.abs().sum(dtype=torch.float64).item()


def _depths(names: Iterable[str]) -> dict[str, float]:
    """Give l / (L - 1) by name: 0 in the first block and outside blocks, 1 in the last of its tower."""
    depths = dict.fromkeys(names, 0.0)
    towers: dict[str, dict[str, int]] = defaultdict(dict)
    for name in depths:
        if match := _BLOCK.match(name):
            towers[match[1]][name] = int(match[2])
    for blocks in towers.values():
        last = max(blocks.values())
        depths |= {name: block / last for name, block in blocks.items() if last}
    return depths
