"""What labelled test images say of a model: accuracy with the task known and unknown, and routing."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from adamerge.coefficients import spread
from adamerge.data.module import MultiTaskData
from adamerge.mixture import Mixture
from adamerge.models import Head, accuracy, union_accuracy
from adamerge.progress import track


class Evaluation(NamedTuple):
    """Results on test images.

    Attributes:
        known: Top-1 accuracy in percent by task, with the task's own head.
        unknown: The same over all tasks' classes together; empty where routing is told the task.
        routing: By task, each expert's mean routing weight; empty for static models.
        entropy: By task, the mean over images of the `spread` of routing weights; likewise.
    """

    known: dict[str, float]
    unknown: dict[str, float]
    routing: dict[str, list[float]]
    entropy: dict[str, float]


def evaluate(
    features: Callable[[Tensor, str], tuple[Tensor, Tensor | None]],
    heads: Mapping[str, Head],
    data: MultiTaskData,
    walk: Callable[[Callable[[Tensor], Tensor], str], Float[Tensor, "image value"]],
    *,
    told: bool = False,
    tasks: Sequence[str] | None = None,
) -> Evaluation:
    """Evaluate a model on every task's test images, each of which is read once.

    Args:
        features: From a batch and its true task to features and, for routed models, weights.
        heads: Frozen heads, on the device of the features.
        data: Where the images come from.
        walk: Applies a function to all test images of a task.
        told: Whether the model is told the task, so that "unknown" means nothing.
        tasks: Which tasks to evaluate; default: all that have test images.
    """
    data.use_heads(heads)
    found = Evaluation({}, {}, {}, {})
    for task in track(data.tested_tasks if tasks is None else tasks, "Evaluating"):
        weights: list[Tensor] = []
        labels = data.test(task).labels
        assert labels is not None  # `test` loads them or raises

        def read(batch: Tensor, task: str = task, weights: list[Tensor] = weights) -> Tensor:
            rows, mixed = features(batch, task)
            weights.extend([] if mixed is None else [mixed.cpu()])
            return rows

        rows = walk(read, task)
        known = {name: head.to(rows.device) for name, head in heads.items()}
        found.known[task] = accuracy(known[task].logits(rows), labels)
        if not told:
            found.unknown[task] = union_accuracy(rows, known, task, labels)
        if weights:
            mixed = torch.cat(weights)
            found.routing[task] = mixed.mean(0).tolist()
            found.entropy[task] = spread(mixed).nanmean().item()
    return found


def mixture_features(mixture: Mixture) -> Callable[[Tensor, str], tuple[Tensor, Tensor | None]]:
    """Give a mixture as `evaluate` reads it."""

    def features(batch: Tensor, task: str) -> tuple[Tensor, Tensor | None]:
        gates = mixture.gates(batch, task)
        rows = mixture.features(batch, gates)
        return rows, None if gates is None else gates.summary()

    return features
