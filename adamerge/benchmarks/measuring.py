"""Statistics of a benchmark's experts on its unlabelled adaptation images."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adamerge.checkpoints.settings import settings_digest
from adamerge.data.module import MultiTaskData
from adamerge.errors import InputError
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
        vectors: The experts, as their files have them.
        backbone: Features of any weights.
        heads: Every task's head.
        data: The images.
        digests: SHA-256 of base and experts.
        options: Those of `Statistics`, with its cache.

    Raises:
        InputError: An expert has no adaptation images.
    """
    missing = [task for task in vectors.tasks if task not in data.adapting_tasks]
    if missing:
        raise InputError(
            f"experts {missing} have no adaptation images, which statistics are measured on.",
            "Set data.tasks.TASK.adapt, or choose a method that reads no statistics.",
        )
    images = {task: data.adaptation(task) for task in vectors.tasks}
    seen = {task: hashlib.sha256(b"".join(found.digests())).hexdigest() for task, found in images.items()}
    root, key = getattr(vectors.origins.base, "root", None), getattr(backbone, "transform_key", "")
    function = f"{settings_digest(root) if isinstance(root, Path) else ''}/{key}"
    return Statistics(
        backbone,
        heads,
        {task: found.images for task, found in images.items()},
        lambda task: vectors.state(vectors.one_hot(task)),
        keys={
            task: f"{digests['base']}/{digests[task]}/{seen[task]}/{_digest(heads[task])}/{function}"
            for task in vectors.tasks
        },
        **options,
    )


def _digest(head: Head) -> str:
    """Hash a head: Fisher diagonals are about its predictions."""
    tensors = head.tensors.values()
    content = b"".join(tensor.detach().cpu().contiguous().numpy().tobytes() for tensor in tensors)
    return hashlib.sha256(content + bytes([head.normalize])).hexdigest()
