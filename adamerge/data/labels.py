"""Labels of a task's rows against the classes of its head: by name where both sides have names."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import torch
from jaxtyping import Int64
from torch import Tensor

from adamerge.data.datasets import Images
from adamerge.errors import DataError, shortlist

_NUMBER = re.compile(r"\d+[. ]+(?=\S)")  # as folders are numbered: 0_cat, 012.Robin
_ORDER = "List the classes in the order of the labels."


@dataclass(frozen=True)
class HeadClasses:
    """What is known of the rows of a task's head.

    Attributes:
        count: Number of rows; None: unknown.
        names: What the head's own file calls its rows; empty where it does not say.
        by_classes: Whether the configured classes name rows that are a file's own, so that labels in another
            order follow them.
    """

    count: int | None = None
    names: tuple[str, ...] = ()
    by_classes: bool = False


def head_names(task: str, classes: Sequence[str], head: HeadClasses) -> tuple[str, ...]:
    """Return what a head's rows are called, in their order.

    The configured classes and the names that the head's file has may be the same names in another order;
    then the head's order holds. Where they are other words, the configured ones hold, row by row.

    Args:
        task: Whose head it is, for messages.
        classes: The configured classes; empty: none.
        head: What is known of the head.

    Raises:
        DataError: The numbers differ, or both use one name for different rows.
    """
    count = len(head.names) or head.count
    if classes and count and len(classes) != count:
        raise DataError(
            f"task {task!r} has {len(classes)} class names, its head has {count} rows"
            + (f" ({shortlist(head.names)})." if head.names else "."),
            "Name each row of the head once.",
        )
    if not (classes and head.names):
        return tuple(head.names or classes)
    pairs = match_names(classes, head.names)
    if len(pairs) == len(classes):
        return tuple(head.names)
    moved = next((i for i, j in pairs.items() if i != j), None)
    if moved is not None:
        raise DataError(
            f"task {task!r}: class {moved} is {classes[moved]!r}, which its head calls row {pairs[moved]}; "
            f"its rows are [{shortlist(head.names)}].",
            "Leave out `classes`, or write the head's own names.",
        )
    return tuple(classes)


def match_labels(
    task: str, images: Images, classes: Sequence[str], head: HeadClasses | None = None, part: str = "test"
) -> Images:
    """Return images whose labels are rows of the task's head.

    Names match exactly first, then whatever their case, with ``_`` and ``-`` for blanks, then without
    numbers before all names of a list; each where that is unique. Sub-folders and declared names must be
    all classes of the head, in its order or, where the head's file names its rows, in any. Labels that are
    words may be some of them. Where names are other words, or one side has none, the order counts.

    Args:
        task: Whose images they are, for messages.
        images: The images, labelled or not.
        classes: The configured classes; empty: none.
        head: What is known of the head; None: nothing.
        part: "test" or "adaptation", for messages.

    Raises:
        DataError: Numbers or names of classes differ, or a label is no class's.
    """
    head, part = head or HeadClasses(), f"{part} {images.noun}"
    targets = head_names(task, classes, head)
    names, labels = images.class_names, images.labels
    if labels is None:
        return images
    rows: Sequence[int] | None = None
    if names:
        rows = _rows_of(task, images, targets, head, part)
    elif classes and targets != tuple(classes):  # the classes are in the order of the labels
        pairs = match_names(classes, targets)
        rows = [pairs[i] for i in range(len(classes))]
        _require_labels(task, images, labels, len(classes), part)
    if rows is not None and list(rows) != list(range(len(rows))):
        labels = torch.tensor(rows)[labels]
        images = images.with_labels(labels)
    count = head.count or len(targets)
    if count:
        _require_labels(task, images, labels, count, part)
    return images


def match_names(names: Sequence[str], targets: Sequence[str]) -> dict[int, int]:
    """Return, for the indices of names, the indices of the same names among the targets.

    Names that are not found, or are not unique, are left out; equal lists are matched one by one.
    """
    if _folded(names) == _folded(targets):
        return {i: i for i in range(len(names))}
    found: dict[int, int] = {}
    for keys in (list, _folded, _plain):
        ours, theirs = _unique(keys, names), _unique(keys, targets)
        taken = set(found.values())
        pairs = ((i, theirs.get(key)) for key, i in ours.items() if i not in found)
        found |= {i: j for i, j in pairs if j is not None and j not in taken}
    return dict(sorted(found.items()))


def difference_of_order(classes: Sequence[str], names: Sequence[str]) -> str | None:
    """Return how a task's classes and its source's are the same names in another order; None: they are not.

    Case, ``_`` and ``-`` for blanks, and numbers before all names of a list do not count. Nothing is said
    of lists of different names, which data sets often have.
    """
    ours, theirs = (_plain(words) for words in (classes, names))
    if ours == theirs or sorted(ours) != sorted(theirs) or len(set(ours)) < len(ours):
        return None
    i = next(i for i, pair in enumerate(zip(ours, theirs, strict=True)) if pair[0] != pair[1])
    ours, theirs = (shortlist(words[i:]) for words in (classes, names))
    return f"{f'from index {i} on ' if i else ''}classes are [{ours}], the data have, in order, [{theirs}]"


def _rows_of(
    task: str, images: Images, targets: Sequence[str], head: HeadClasses, part: str
) -> Sequence[int] | None:
    """Return the head's row of each class name of the images; None: the order counts."""
    names = images.class_names
    pairs = match_names(names, targets)
    own = match_names(names, head.names)
    pairs = own if len(pairs) < len(own) == len(names) else pairs
    if images.origin.words:
        return _rows_of_words(task, images, targets, pairs, part)
    count = len(targets) or head.count
    if count and len(names) != count:
        raise _other_number(task, names, targets, count, part)
    is_free = bool(head.names) or head.by_classes  # else the classes are in the order of the labels
    if len(pairs) == len(names) and (is_free or all(i == j for i, j in pairs.items())):
        return [pairs[i] for i in range(len(names))]
    problem = _problem_of_order(names, targets, pairs, named=bool(head.names))
    if problem:
        raise DataError(f"task {task!r}: {problem}.", _HINTS[bool(head.names)])
    return None


_HINTS = {
    False: _ORDER,
    True: "List as `classes` what the data call the head's rows, in the order of the rows.",
}


def _problem_of_order(
    names: Sequence[str], targets: Sequence[str], pairs: dict[int, int], *, named: bool
) -> str:
    """Return why names cannot stand for the targets one by one; empty where they can."""
    numbers = [name for name in names if name.isdecimal()]
    is_unsorted = len(numbers) == len(names) and sorted(numbers, key=int) != list(names)
    if not targets:
        told = "the data's classes are numbers in the order of words: {}; the head does not name its rows"
        return told.format(shortlist(names)) if is_unsorted else ""
    if named:
        return f"the head's classes are [{shortlist(targets)}], the data have [{shortlist(names)}]"
    moved = difference_of_order(targets, names)
    if moved:
        return moved
    wrong = min(((j, i) for i, j in pairs.items() if i != j), default=None)
    if wrong:
        told = "classes stand in another order: {!r} is {} here, {} in the data"
        return told.format(targets[wrong[0]], *wrong)
    if is_unsorted:
        told = "the data's classes are numbers in the order of words: {}; the classes are [{}]"
        return told.format(shortlist(names), shortlist(targets))
    return ""


def _rows_of_words(
    task: str, images: Images, targets: Sequence[str], pairs: dict[int, int], part: str
) -> list[int]:
    """Return the row of every word that stands as a label.

    Raises:
        DataError: A word is no class, or nothing names the head's rows.
    """
    names, labels = images.class_names, images.labels
    assert labels is not None  # else nobody asks
    if not targets:
        raise DataError(
            f"task {task!r}: labels of the {part} are words ({shortlist(names)}), and nothing says "
            "which rows of the head they are.",
            "List the names as `classes`, in the order of the head's rows.",
        )
    missing = [i for i in range(len(names)) if i not in pairs]
    if missing:
        image = int((labels == missing[0]).nonzero()[0])
        raise DataError(
            f"task {task!r}: row {images.origin.row_of(image)} of {images.origin.source} has the label "
            f"{names[missing[0]]!r}, which is no class; the classes are [{shortlist(targets)}].",
            "Correct the label, or the classes.",
        )
    return [pairs[i] for i in range(len(names))]


def _other_number(
    task: str, names: Sequence[str], targets: Sequence[str], count: int, part: str
) -> DataError:
    told = f"task {task!r} has {count} class names, its {part} have {len(names)}"
    if not targets:
        told = f"task {task!r}: the head has {count} rows, its {part} have {len(names)} classes"
        return DataError(f"{told} ({shortlist(names)}).", "Give data of the head's own classes.")
    missing = sorted(set(range(len(targets))) - set(match_names(names, targets).values()))
    if len(names) + len(missing) == len(targets):
        absent = shortlist(targets[i] for i in missing)
        hint = f"A class without data needs an (empty) folder, or a name among the declared ones: {absent}."
        return DataError(f"{told}.", hint)
    pairs = enumerate(zip_longest(targets, names))
    i, (ours, theirs) = next((i, pair) for i, pair in pairs if pair[0] != pair[1])
    return DataError(f"{told}; first difference at index {i}: {ours!r} vs {theirs!r}.", _ORDER)


def _require_labels(
    task: str, images: Images, labels: Int64[Tensor, " image"], count: int, part: str
) -> None:
    bad = ((labels < 0) | (labels >= count)).nonzero().flatten()
    if len(bad):
        image = int(bad[0])
        origin = images.origin
        where = f" (row {origin.row_of(image)} of {origin.source})" if origin.source else ""
        raise DataError(
            f"task {task!r}: {part} have label {int(labels[image])}, there are {count} class names{where}.",
            "Labels count from 0, one for each row of the head: give data of its classes.",
        )


def _unique(keys: Callable[[Sequence[str]], list[str]], names: Sequence[str]) -> dict[str, int]:
    """Return the places of the keys that occur once."""
    places: dict[str, int | None] = {}
    for i, key in enumerate(keys(names)):
        places[key] = None if key in places else i
    return {key: i for key, i in places.items() if i is not None}


def _folded(names: Sequence[str]) -> list[str]:
    return [" ".join(re.split(r"[\s_-]+", name.casefold())).strip() for name in names]


def _plain(names: Sequence[str]) -> list[str]:
    """Return names as they are compared at last: folded, and without numbers before all of them."""
    words = _folded(names)
    return [_NUMBER.sub("", word, 1) for word in words] if words and all(map(_NUMBER.match, words)) else words
