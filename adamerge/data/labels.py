"""Labels of images against the class names of their task."""

import re
from collections.abc import Sequence
from itertools import zip_longest

from adamerge.data.datasets import Images
from adamerge.errors import DataError, shortlist

_NUMBER = re.compile(r"\d+[. ]+(?=\S)")  # as folders are numbered: 0_cat, 012.Robin


def require_same_classes(task: str, images: Images, classes: Sequence[str], part: str = "test") -> None:
    """Compare labels, and the source's class names where it has some, with the configured classes.

    Raises:
        DataError: The numbers of class names differ, the names stand in another order, or a label is no
            class's.
    """
    names, hint = images.class_names, "List the classes in the order of the labels."
    if names and len(names) != len(classes):
        pairs = enumerate(zip_longest(classes, names))
        i, (ours, theirs) = next((i, pair) for i, pair in pairs if pair[0] != pair[1])
        raise DataError(
            f"task {task!r} has {len(classes)} class names, its {part} images have {len(names)}; "
            f"first difference at index {i}: {ours!r} vs {theirs!r}.",
            hint,
        )
    moved = difference_of_order(classes, names)
    if moved:
        raise DataError(f"task {task!r}: {moved}.", hint)
    labels = images.labels
    bad = [] if labels is None else sorted({int(x) for x in labels.unique() if not 0 <= x < len(classes)})
    if bad:
        raise DataError(
            f"task {task!r}: {part} images have label {bad[0]}, there are {len(classes)} class names.", hint
        )


def difference_of_order(classes: Sequence[str], names: Sequence[str]) -> str | None:
    """Say how a task's classes and its source's are the same names in another order; None: they are not.

    Case, ``_`` and ``-`` for blanks, and numbers before all names of a list do not count. Nothing is said
    of names that are numbers, nor of lists of different names, which data sets often have.
    """
    ours, theirs = (_plain(words) for words in (classes, names))
    if ours == theirs or sorted(ours) != sorted(theirs) or all(word.isdecimal() for word in theirs):
        return None
    i = next(i for i, pair in enumerate(zip(ours, theirs, strict=True)) if pair[0] != pair[1])
    ours, theirs = (shortlist(words[i:]) for words in (classes, names))
    return f"{f'from index {i} on ' if i else ''}classes are [{ours}], the images have, in order, [{theirs}]"


def _plain(names: Sequence[str]) -> list[str]:
    """Give names as they are compared."""
    words = [" ".join(re.split(r"[\s_-]+", name.lower())).strip() for name in names]
    return [_NUMBER.sub("", word, 1) for word in words] if all(map(_NUMBER.match, words)) else words
