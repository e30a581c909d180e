"""Forward passes that several tasks share, and the losses that follow from their features."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from adamerge.models import Head
from adamerge.objectives import Mixed, Objective

Batch = Mapping[str, Mapping[str, Tensor]]


def shared_passes(batch: Batch, most_images: int) -> Iterator[list[str]]:
    """Group tasks so that each group's images fit into one pass.

    Args:
        batch: Images of each task.
        most_images: Images of a pass; a task that has more is alone.
    """
    group: list[str] = []
    for task in batch:
        images = [batch[t]["images"] for t in (*group, task)]
        fits = sum(len(i) for i in images) <= most_images
        if group and not (fits and len({i.shape[1:] for i in images}) == 1):
            yield group
            group = []
        group.append(task)
    yield group


def joined_images(tasks: Sequence[str], batch: Batch) -> Tensor:
    """Give the images of a pass."""
    images = [batch[task]["images"] for task in tasks]
    return images[0] if len(images) == 1 else torch.cat(images)


def task_losses(
    features: Float[Tensor, "image dim"],
    tasks: Sequence[str],
    batch: Batch,
    *,
    heads: Mapping[str, Head],
    objective: Objective,
    teacher: Mapping[str, Tensor],
    routing: Float[Tensor, "image task"] | None = None,
) -> dict[str, Tensor]:
    """Give the loss of every task of a pass that is worth a step.

    Args:
        features: Of the pass's images, task after task.
        tasks: The pass's tasks.
        batch: With the images' indices, where there are teachers.
        heads: Frozen heads.
        objective: What is minimised.
        teacher: The experts' logits of all images, by task; may be empty.
        routing: A router's logits of the same images, for objectives that are a sum.
    """
    sizes = [len(batch[task]["images"]) for task in tasks]
    routings = [None] * len(tasks) if routing is None else routing.split(sizes)
    found: dict[str, Tensor] = {}
    for task, part, scores in zip(tasks, features.split(sizes), routings, strict=True):
        known = teacher[task][batch[task]["index"]] if task in teacher else None
        more: dict[str, Any] = {"routing": scores} if isinstance(objective, Mixed) else {}
        loss = objective(heads[task].logits(part), task, known, **more)
        if loss is not None:
            found[task] = loss
    return found
