"""DARE: drop entries at random and rescale the others, then merge."""

from collections.abc import Callable
from functools import partial
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from adamerge.ranges import Seed
from adamerge.static.primitives.dropping import (
    Rescale,
    highest_kept,
    in_pieces,
    match_l1_,
    placed,
    random_bits,
    spans,
)
from adamerge.static.primitives.selection import require_choice, require_proper_fraction
from adamerge.static.primitives.signs import Aggregate, aggregate_by, trim_and_elect
from adamerge.static.registry import static_method, task_vector_edit
from adamerge.vectors import Stacks

_TITLE, _SOURCE = "DARE: Language Models are Super Mario", "arXiv:2311.03099"
Merger = Literal["linear", "ties"]


@task_vector_edit(title=_TITLE, source=_SOURCE, scope="tensor", needs=("name",), ordered=True)
def dare_drop(
    vectors: Float[Tensor, "task *param"],
    *,
    name: str,
    drop_rate: float = 0.5,
    rescale: Rescale = "inverse_prob",
    seed: Seed = 0,
) -> Float[Tensor, "task *param"]:
    """Drop every entry of every task vector with one probability, independently, and rescale the others.

    What is dropped follows from the seed, the parameter's name and the expert's place in the order given;
    neither values nor other parameters matter.

    Args:
        vectors: fp32 task vectors of one parameter.
        name: The parameter.
        drop_rate: Probability to drop an entry, in [0, 1). 0.5 is FusionBench's choice; language models
            bear 0.9 and more.
        rescale: "inverse_prob" divides by 1 - drop_rate (the paper); "l1" restores each parameter's sum
            of magnitudes (mergekit); "none" leaves the kept entries as they are.
        seed: Seed of the masks.

    Returns:
        The edited vectors.

    Raises:
        InputError: An option is out of its range.
    """
    _require(drop_rate, rescale)
    drop = partial(_drop, name=name, drop_rate=drop_rate, rescale=rescale, seed=seed)
    entries = vectors.reshape(len(vectors), -1)
    kept = torch.empty(entries.shape)
    for span in spans(entries):
        kept[:, span] = drop(entries[:, span], start=span.start)
    kept = kept.reshape(vectors.shape)
    return match_l1_(kept, vectors) if rescale == "l1" else kept


@static_method(title=_TITLE, source=_SOURCE, scope="model", needs=("name",), grain="tensor", ordered=True)
def dare(
    stacks: Stacks,
    *,
    drop_rate: float = 0.5,
    rescale: Rescale = "inverse_prob",
    merger: Merger = "linear",
    density: float = 0.2,
    aggregate: Aggregate = "sum",
    scale: float = 0.3,
    seed: Seed = 0,
) -> Callable[..., Tensor]:
    """Merge what DARE leaves of the task vectors, by task arithmetic or by TIES.

    Args:
        stacks: fp32 task vectors of the whole model.
        drop_rate: Probability to drop an entry, in [0, 1).
        rescale: How the kept entries make up for it; see `dare_drop`.
        merger: "linear" (their sum) or "ties" (trimmed over the whole model, with elected signs).
        density: Under "ties", the fraction of all entries that trimming keeps per task.
        aggregate: Under "ties", how agreeing entries are joined: "sum", "mean" or "max".
        scale: Coefficient of the merged task vector; FusionBench has 0.5 for "ties".
        seed: Seed of the masks.

    Returns:
        The merge of one parameter's ``[task, *param]`` vectors, given its name.

    Raises:
        InputError: An option is out of its range.
    """
    _require(drop_rate, rescale)
    require_choice("merger", merger, get_args(Merger))
    drop = partial(dare_drop, drop_rate=drop_rate, rescale=rescale, seed=seed)
    if merger == "linear":
        return lambda vectors, *, name: scale * drop(vectors, name=name).sum(0)
    if rescale == "l1":  # whose factor is the whole parameter's
        dropped = stacks.map(lambda name, vectors: drop(vectors, name=name), entrywise=False)
    else:
        dropped = placed(stacks, partial(_drop, drop_rate=drop_rate, rescale=rescale, seed=seed))
    join, trim = aggregate_by(aggregate), trim_and_elect(dropped, density)
    return lambda vectors, *, name: scale * in_pieces(lambda x: join(trim(x)), drop(vectors, name=name))


def _drop(
    piece: Float[Tensor, "task entry"], *, name: str, start: int, drop_rate: float, rescale: str, seed: int
) -> Float[Tensor, "task entry"]:
    """Drop entries of one piece of a flattened parameter, which begins at ``start``."""
    limit = highest_kept(torch.tensor([1 - drop_rate], dtype=torch.float64))
    kept = torch.empty(piece.shape)
    for task, row in enumerate(kept):
        torch.le(random_bits(seed, name, task, start, len(row)), limit, out=row)
    kept.mul_(piece)
    return kept.div_(1 - drop_rate) if rescale == "inverse_prob" else kept


def _require(drop_rate: float, rescale: str) -> None:
    require_proper_fraction("drop_rate", drop_rate)
    require_choice("rescale", rescale, get_args(Rescale))
