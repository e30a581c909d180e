"""Evaluation of given weights, without a trainer."""

from collections.abc import Iterable, Mapping

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
    logits = [
        head.logits(backbone.features(weights, batch["images"].to(head.weight.device))).cpu()
        for batch in batches
    ]
    return torch.cat(logits)


def accuracy(logits: Float[Tensor, "image class"], labels: Int64[Tensor, " image"]) -> float:
    """Give top-1 accuracy over all images (micro average), in percent."""
    return 100 * (logits.argmax(-1) == labels).double().mean().item()
