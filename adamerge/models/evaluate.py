"""Evaluation of given weights, without a trainer."""

from collections.abc import Callable, Iterable, Mapping

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from adamerge.models.base import Backbone
from adamerge.models.heads import Head
from adamerge.state import State


@torch.no_grad()
def predict_all(
    weights: State, backbone: Backbone, head: Head, batches: Iterable[Mapping[str, Tensor]]
) -> Float[Tensor, "image class"]:
    """Give the logits of all images of a loader, in its order, on the CPU."""
    device = head.weight.device
    return walk(lambda images: head.logits(backbone.features(weights, images.to(device))), batches)


@torch.no_grad()
def walk(
    function: Callable[[Tensor], Tensor], batches: Iterable[Mapping[str, Tensor]]
) -> Float[Tensor, "image value"]:
    """Give what a function makes of all images of a loader, in its order, on the CPU."""
    return torch.cat([function(batch["images"]).cpu() for batch in batches])


def accuracy(logits: Float[Tensor, "image class"], labels: Int64[Tensor, " image"]) -> float:
    """Give top-1 accuracy over all images (micro average), in percent."""
    return 100 * (logits.argmax(-1) == labels).double().mean().item()


def union_accuracy(
    features: Float[Tensor, "image dim"],
    heads: Mapping[str, Head],
    task: str,
    labels: Int64[Tensor, " image"],
) -> float:
    """Give top-1 accuracy in percent where the task is not known: over all tasks' classes together.

    The class with the highest logit among all heads must be the right class of the right task.
    """
    logits = torch.cat([head.logits(features) for head in heads.values()], -1)
    before = list(heads)[: list(heads).index(task)]
    return accuracy(logits, labels + sum(len(heads[name].weight) for name in before))
