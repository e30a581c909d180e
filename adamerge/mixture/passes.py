"""Forward passes that several tasks share, and the losses that follow from their features."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from adamerge.models import Head
from adamerge.objectives import Objective

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
    routing: Float[Tensor, "image task"] | None = None,
    augmented: Float[Tensor, "image dim"] | None = None,
) -> dict[str, Tensor]:
    """Give the loss of every task of a pass that is worth a step.

    Args:
        features: Of the pass's images, task after task.
        tasks: The pass's tasks.
        batch: With the experts' features ("teacher") and one-hot labels, where the objective reads them.
        heads: Frozen heads.
        objective: What is minimised.
        routing: A router's logits of the same images, for objectives that read them.
        augmented: Features of the images' second view, for objectives that augment.
    """
    sizes = [len(batch[task]["images"]) for task in tasks]
    more = {"routing": routing, "augmented": augmented}
    parts = [{k: x.split(sizes)[i] for k, x in more.items() if x is not None} for i in range(len(tasks))]
    found: dict[str, Tensor] = {}
    for task, part, seen in zip(tasks, features.split(sizes), parts, strict=True):
        known = batch[task].get("teacher")
        bare = replace(heads[task], residual=None)  # experts need no correction
        ours, theirs = _views(heads[task], part), {} if known is None else _views(bare, known)
        theirs |= {name: x for name, x in batch[task].items() if name == "labels"}
        if "augmented" in seen:
            seen["augmented"] = heads[task].logits(seen["augmented"])
            theirs["augmented"] = ours["prediction"].detach()
        loss = objective.loss(seen | ours, task, theirs)
        if loss is not None:
            found[task] = loss
    return found


def _views(head: Head, features: Float[Tensor, "image dim"]) -> dict[str, Tensor]:
    """Give what an objective may read of a model, by its name."""
    return {"features": head.features(features), "prediction": head.logits(features)}
