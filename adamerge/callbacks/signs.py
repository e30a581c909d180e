"""Label-free signs of a merged model's health: its predictions beside those of the experts."""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from adamerge.objectives import entropy_of

_TEMPERATURES = [2 ** (k / 2) for k in range(-4, 9)]  # 1/4 to 16
_RELIABLE = 0.4  # of log C: SAR's bound of the entropy of a reliable prediction


class Signs(NamedTuple):
    """Signs of one task, on adaptation images that training does not see.

    Attributes:
        marginal: Entropy of the mean prediction, divided by log C.
        top_share: Share of the most frequent predicted class.
        agreement: Share of images on which the merged model and the task's expert agree.
        teacher_kl: Mean KL divergence of the merged model's prediction from the expert's, divided by log C,
            at the temperature of the merged model's logits that makes it least (ours): so that only what the
            model predicts counts, not how sure it is, which entropy minimisation changes most.
        reliable: Share of predictions with an entropy below 0.4 log C, as SAR counts them.
    """

    marginal: float
    top_share: float
    agreement: float
    teacher_kl: float
    reliable: float


def signs_of(logits: Float[Tensor, "image class"], expert: Float[Tensor, "image class"]) -> Signs:
    """Measure the signs of one task's predictions beside its expert's."""
    n_classes = logits.shape[-1]
    scale = math.log(max(n_classes, 2))
    ours, theirs = (x.float().log_softmax(-1) for x in (logits, expert))
    classes = logits.argmax(-1)
    shares = torch.bincount(classes, minlength=n_classes) / len(classes)
    return Signs(
        marginal=float(entropy_of(ours.exp().mean(0, keepdim=True).log())) / scale,
        top_share=float(shares.max()),
        agreement=float((classes == expert.argmax(-1)).float().mean()),
        teacher_kl=min(_divergence(logits.float() / t, theirs) for t in _TEMPERATURES) / scale,
        reliable=float((entropy_of(ours) < _RELIABLE * scale).float().mean()),
    )


def _divergence(logits: Float[Tensor, "image class"], expert: Float[Tensor, "image class"]) -> float:
    """Give the mean KL divergence in nats from an expert's log-probabilities."""
    return float((expert.exp() * (expert - logits.log_softmax(-1))).sum(-1).mean())


def mean_of(signs: Mapping[str, Signs]) -> Signs:
    """Average each sign over tasks."""
    return Signs(*(sum(values) / len(values) for values in zip(*signs.values(), strict=True)))
