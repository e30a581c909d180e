"""Labels of images against the class names of their task."""

from collections.abc import Sequence
from itertools import zip_longest

from adamerge.data.datasets import Images
from adamerge.errors import DataError


def require_same_classes(task: str, images: Images, classes: Sequence[str], part: str = "test") -> None:
    """Compare labels, and the source's class names where it has some, with the configured classes.

    Raises:
        DataError: The numbers of class names differ, or a label is no class's.
    """
    names, hint = images.class_names, "List the class names in label order."
    if names and len(names) != len(classes):
        pairs = enumerate(zip_longest(classes, names))
        i, (ours, theirs) = next((i, pair) for i, pair in pairs if pair[0] != pair[1])
        raise DataError(
            f"task {task!r} has {len(classes)} class names, its {part} images have {len(names)}; "
            f"first difference at index {i}: {ours!r} vs {theirs!r}.",
            hint,
        )
    labels = images.labels
    bad = [] if labels is None else sorted({int(x) for x in labels.unique() if not 0 <= x < len(classes)})
    if bad:
        raise DataError(
            f"task {task!r}: {part} images have label {bad[0]}, there are {len(classes)} class names.", hint
        )
