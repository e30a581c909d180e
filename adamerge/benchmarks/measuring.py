"""Statistics of a benchmark's experts on its unlabelled adaptation images."""

from collections.abc import Mapping
from typing import Any

from adamerge.data.module import MultiTaskData
from adamerge.models import Backbone, Head, Statistics
from adamerge.vectors import TaskVectors


def expert_statistics(
    vectors: TaskVectors,
    backbone: Backbone,
    heads: Mapping[str, Head],
    data: MultiTaskData,
    digests: Mapping[str, str],
    **options: Any,
) -> Statistics:
    """Prepare statistics of the experts on the unlabelled adaptation images.

    Args:
        vectors: The experts.
        backbone: Features of any weights.
        heads: Every task's head.
        data: The images.
        digests: SHA-256 of base and experts.
        options: Those of `Statistics`, with its cache.
    """
    images = "/".join(data.fingerprint().values())
    return Statistics(
        backbone,
        heads,
        {task: data.adaptation(task).images for task in vectors.tasks},
        lambda task: vectors.state(vectors.one_hot(task)),
        keys={task: f"{digests['base']}/{digests[task]}/{images}" for task in vectors.tasks},
        **options,
    )
