"""Counts a source's files, images (or texts) and classes, and names what differs from what is expected."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from adamerge.data.datasets import Images, Origin
from adamerge.data.decoded import digests_of
from adamerge.data.decoding import content, decode
from adamerge.data.labels import HeadClasses, difference_of_order, match_labels
from adamerge.data.rows import Rows, open_rows
from adamerge.data.sources import find_source
from adamerge.data.tasks import EMBEDDED, TaskSpec, embedded_source
from adamerge.data.texts import EMPTY, CutTexts, text_columns, text_problem, text_values
from adamerge.errors import DataError, shortlist
from adamerge.progress import track

_NO_CONTENT = hashlib.sha256(b"").digest()


@dataclass(frozen=True)
class Report:
    """What a source holds.

    Attributes:
        source: As it was given; empty where none was.
        files: Number of files.
        images: Number of images (or texts), those that cannot be decoded among them.
        classes: Class names in label order: the source's own, else the task's.
        per_class: Images of each class; empty without labels.
        undecodable: Images that cannot be decoded, and why.
        digest: SHA-256 of all encoded images and their labels, whatever their order and container;
            one that cannot be decoded counts as empty.
        problems: What is wrong, or differs from what was expected.
        kind: "images" or "texts".
        left_out: Files below the source that are not read.
        notes: What is worth knowing, and no problem.
    """

    source: str
    files: int = 0
    images: int = 0
    classes: tuple[str, ...] = ()
    per_class: tuple[int, ...] = ()
    undecodable: tuple[str, ...] = ()
    digest: str = ""
    problems: tuple[str, ...] = ()
    kind: str = "images"
    left_out: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def check_source(
    spec: TaskSpec,
    role: str,
    expected: Mapping[str, Any] | None = None,
    *,
    part: str = "test",
    head: HeadClasses | None = None,
    tokenize: Callable[[], Any] | None = None,
) -> Report:
    """Read a task's images once and compare them with what is expected.

    Args:
        spec: The task's row.
        role: What it is called in messages ("task 'cars', test images").
        expected: ``images`` (a number), ``classes`` (names in label order, or their number) and
            ``digest``, each only where it is known.
        part: "test" (labels are needed) or "adapt" (labels are not read).
        head: What is known of the rows of the task's head.
        tokenize: Gives what tokenises texts for the model, so that those that it cuts are counted.

    Returns:
        The report; what cannot be read at all is a problem in it.

    Raises:
        EnvironmentProblem: A hub id was given and the hub cannot be reached.
    """
    source = spec.test if part == "test" else spec.adapt
    if source is None:
        return Report("", problems=("no data were given",))
    try:
        report = _count(source, spec, role, head, tokenize, labelled=part == "test")
    except DataError as error:
        return Report(source, problems=(" ".join(str(error).splitlines()),))
    return replace(report, problems=(*_faults(report, spec.classes), *_differences(report, expected or {})))


def _count(
    source: str,
    spec: TaskSpec,
    role: str,
    head: HeadClasses | None,
    tokenize: Callable[[], Any] | None,
    *,
    labelled: bool,
) -> Report:
    if source.startswith(EMBEDDED):
        from adamerge.data.embedded import load_split

        images, labels = load_split(*embedded_source(source))
        found = Report(source, files=1, classes=tuple(spec.classes))
        return _with_counts(found, map(bytes, digests_of(images).numpy()), labels if labelled else None)
    rows = open_rows(find_source(source, role), role)
    texts = text_columns(rows, spec.columns, spec.image_column)
    column = "" if texts else rows.image_column(spec.image_column)
    named = rows.label_column(spec.label_column) if labelled else None
    found = list(_hashed_texts(rows, texts) if texts else _hashed_images(rows, column))
    report = Report(
        source,
        len(rows.source.files),
        classes=(rows.class_names(named) if named else ()) or tuple(spec.classes),
        undecodable=tuple(each for each in found if isinstance(each, str)),
        kind="texts" if texts else "images",
        left_out=rows.source.left_out,
        notes=tuple(_notes(rows, texts, tokenize)) if texts else (),
    )
    hashes = (_NO_CONTENT if isinstance(each, str) else each for each in found)
    labels = rows.labels(named, hidden=True) if named else None
    report = _with_counts(report, hashes, labels)
    if named is None or labels is None:
        return report
    return replace(report, problems=_label_problems(rows, named, labels, spec, head))


def _label_problems(
    rows: Rows, column: str, labels: Tensor, spec: TaskSpec, head: HeadClasses | None
) -> tuple[str, ...]:
    """Match labels with the task's classes, as evaluation does; words without classes are no problem here."""
    origin = Origin(rows.source.given, words=rows.names_are_words(column))
    if origin.words and not (spec.classes or (head and head.names)):
        return ()
    is_text = bool(text_columns(rows, spec.columns, spec.image_column))
    blank = torch.zeros(2, 1, dtype=torch.int64) if is_text else torch.zeros(3, 1, 1, dtype=torch.uint8)
    images = Images(blank.expand(len(labels), *blank.shape), labels, rows.class_names(column), origin=origin)
    try:
        match_labels("", images, spec.classes, head)
    except DataError as error:
        return (" ".join(str(error).splitlines()).removeprefix("task '': ").replace("task ''", "the task"),)
    return ()


def _hashed_images(rows: Rows, column: str) -> Iterator[bytes | str]:
    """Hash every encoded image, or name it and say why it cannot be decoded."""
    for index, value in enumerate(track(rows.images(column), f"Checking {rows.role}", len(rows))):
        problem = decode(value, _nothing)
        if isinstance(problem, str):
            yield f"{rows.name_of(index, value)} ({problem})"
        else:
            yield hashlib.sha256(content(value)).digest()


def _hashed_texts(rows: Rows, columns: Sequence[str]) -> Iterator[bytes | str]:
    """Hash every text, or pair of texts, or name the row that has none."""
    for index, value in enumerate(text_values(rows, columns)):
        problem = text_problem(value)
        if problem and problem != EMPTY:
            yield f"row {index} ({problem})"
        else:
            parts = value if isinstance(value, tuple) else (value,)
            yield hashlib.sha256("\0".join(parts).encode()).digest()


def _notes(rows: Rows, columns: Sequence[str], tokenize: Callable[[], Any] | None) -> Iterator[str]:
    """Count empty texts, and those that a model cuts."""
    texts = [text for text in text_values(rows, columns) if text_problem(text) in (None, EMPTY)]
    empty = sum(text_problem(text) == EMPTY for text in texts)
    if empty:
        yield f"{empty} of {len(rows)} texts are empty"
    preprocess, cut = tokenize() if tokenize else None, CutTexts()
    if preprocess is not None:
        for text in texts:
            cut.count(preprocess, text, preprocess(text))
    if cut.number:
        yield cut.note(len(rows))


def _with_counts(report: Report, hashes: Iterable[bytes], labels: Tensor | None) -> Report:
    """Add number, digest and images per class; a label that is no class's has none."""
    hashes = list(hashes)
    told = [-1] * len(hashes) if labels is None else labels.tolist()
    parts = sorted(b"%s %d" % pair for pair in zip(hashes, told, strict=True))
    size = max(len(report.classes), *(label + 1 for label in told), 0)
    return replace(
        report,
        images=len(parts),
        per_class=() if labels is None else tuple(told.count(label) for label in range(size)),
        digest=hashlib.sha256(b"".join(parts)).hexdigest(),
    )


def _faults(report: Report, classes: Sequence[str]) -> Iterator[str]:
    """Say what no source should have."""
    if report.undecodable:
        count = f"{len(report.undecodable)} of {report.images} {report.kind}"
        yield f"{count} cannot be decoded: {shortlist(report.undecodable, 3)}"
    problems = []
    if classes and max(len(report.classes), len(report.per_class)) != len(classes):
        count = max(len(report.classes), len(report.per_class))
        problems.append(f"{count} classes, the task has {len(classes)} names")
    moved = difference_of_order(classes, report.classes)
    if moved and report.problems:
        problems.append(moved)
    if sum(report.per_class) not in (0, report.images):
        problems.append(f"{report.images - sum(report.per_class)} {report.kind} have a negative label")
    yield from problems or report.problems


def _differences(report: Report, expected: Mapping[str, Any]) -> Iterator[str]:
    """Say what differs from what is expected."""
    images, classes = expected.get("images"), expected.get("classes")
    if images is not None and images != report.images:
        yield f"{report.images} {report.kind}, {images} are expected"
    count = classes if isinstance(classes, int) else len(classes or ())
    found = max(len(report.classes), len(report.per_class))
    if count and found != count:
        yield f"{found} classes, {count} are expected"
    if classes and not isinstance(classes, int) and report.classes:
        pairs = enumerate(zip_longest(classes, report.classes))
        moved = next(((i, a, b) for i, (a, b) in pairs if _folded(a) != _folded(b)), None)
        if moved:
            yield "classes differ first at index {}: {!r} is expected, found {!r}".format(*moved)
    if expected.get("digest") not in (None, report.digest):
        yield f"the digest is {report.digest[:12]}..., {str(expected['digest'])[:12]}... is expected"


def _folded(name: str | None) -> str | None:
    """Class names are equal whatever the case, and whether words are joined by _ or -."""
    return None if name is None else name.casefold().replace("_", " ").replace("-", " ")


def _nothing(_image: Any) -> Tensor:
    return torch.empty(0)
