"""A task is a row: its classes, its prompts and where its images are."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import get_type_hints

from adamerge.data.corruptions import parse_corruption
from adamerge.errors import InputError
from adamerge.names import require_file_names
from adamerge.ranges import require

EMBEDDED = "embedded:"
DEFAULT_TEMPLATES = ["a photo of a {}."]


@dataclass
class TaskSpec:
    """One task of a merge.

    Attributes:
        adapt: Unlabelled images that adaptation sees: a folder of images, a parquet file or folder, a
            `datasets` folder or a hub id, each with ``#CONFIG`` and ``@SPLIT`` where needed, or
            ``embedded:TASK/SPLIT``. Labels found there are dropped. None: the task is evaluated only.
        test: Labelled images for `adamerge test`, in the same forms; None: no accuracy is reported.
        classes: Class names in label order, for the zero-shot head, as a list or as the lines of one text
            (which a command line reads faster); empty: those of an embedded task,
            or unknown, where a head file or an expert's own classifier serves.
        templates: Prompts with ``{}`` for the class name; empty: those of an embedded task, else
            "a photo of a {}.".
        head: A safetensors file with ``weight [class, dim]`` instead of a zero-shot head.
        image_column: Column of the images; default: image, img, jpg, jpeg, png or webp.
        columns: Columns of the texts: one, or two that are read as pairs (premise, hypothesis); default: a
            pair of known names (text and text_pair, sentence1 and sentence2, premise and hypothesis,
            question1 and question2, question and sentence or passage), else text or sentence.
        label_column: Column of the labels; default: label, fine_label, cls or labels.
        corruption: ``NAME/SEVERITY`` of a corruption of all images, applied before resizing.
        adapt_corruption: The same of the adaptation images alone, in the place of ``corruption``.
        batch_size: Adaptation images of this task per step; default: data.batch_size.

    Raises:
        InputError: A class name or a template is no text.
    """

    adapt: str | None = None
    test: str | None = None
    classes: list[str] | str = field(default_factory=list)
    templates: list[str] = field(default_factory=list)
    head: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    corruption: str | None = None
    adapt_corruption: str | None = None
    batch_size: int | None = None
    columns: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(TaskSpec, include_extras=True).items():
            if name not in ("classes", "templates"):
                require(name, getattr(self, name), hint)
        if isinstance(self.classes, str):
            self.classes = self.classes.splitlines()
        for name, words in (("classes", self.classes), ("templates", self.templates)):
            wrong = [word for word in words or () if not isinstance(word, str)]
            if wrong:
                raise InputError(
                    f"{name} has {wrong[0]!r} ({type(wrong[0]).__name__}), which is no text.",
                    f"Quote them in the YAML file: {name}: ['0', 'yes', ...]",
                )


def resolve(tasks: Mapping[str, TaskSpec]) -> dict[str, TaskSpec]:
    """Fill in what embedded tasks know of themselves, and check the rows.

    Raises:
        InputError: A name cannot be a file name, two names differ only in case, a row has no images, a
            corruption is unknown, a batch is empty, or a head file does not exist.
    """
    if not tasks:
        raise InputError("no tasks were given.", "Name at least one task under data.tasks.")
    require_file_names(tasks)
    return {name: _complete(name, spec) for name, spec in tasks.items()}


def _complete(name: str, spec: TaskSpec) -> TaskSpec:
    classes, templates = spec.classes, spec.templates
    source = spec.adapt or spec.test
    if source is None:
        raise InputError(f"task {name!r} has no images.", "Give `adapt`, `test`, or both.")
    _check_corruption(name, spec)
    _check_columns(name, spec)
    if spec.batch_size is not None and spec.batch_size < 1:
        raise InputError(f"task {name!r}: batch_size={spec.batch_size}.", "It must be positive.")
    if source.startswith(EMBEDDED):
        from adamerge.data.embedded import EMBEDDED_TASKS

        row = EMBEDDED_TASKS[embedded_source(source)[0]]
        classes, templates = classes or list(row.classes), templates or list(row.templates)
    if spec.head and not Path(spec.head).exists():
        raise InputError(f"task {name!r}: head file {spec.head} does not exist.")
    templates = templates or DEFAULT_TEMPLATES
    without = [t for t in templates if "{}" not in t]
    if without:
        raise InputError(f"task {name!r}: template {without[0]!r} has no '{{}}' for the class name.")
    return replace(spec, classes=classes, templates=templates)


def _check_columns(name: str, spec: TaskSpec) -> None:
    columns = spec.columns or []
    if len(columns) > 2 or len(set(columns)) < len(columns) or not all(isinstance(c, str) for c in columns):
        raise InputError(f"task {name!r}: columns {columns}.", "Name one column of texts, or two of a pair.")
    if columns and spec.image_column:
        raise InputError(f"task {name!r} has both `columns` and `image_column`.", "Name texts by `columns`.")


def _check_corruption(name: str, spec: TaskSpec) -> None:
    for corruption, sources in (
        (spec.corruption, (spec.adapt, spec.test)),
        (spec.adapt_corruption, (spec.adapt,)),
    ):
        if corruption is None:
            continue
        parse_corruption(corruption)
        if any((source or "").startswith(EMBEDDED) for source in sources):
            raise InputError(f"task {name!r}: embedded images are too small to be corrupted.")


def embedded_source(source: str) -> tuple[str, str]:
    """Split ``embedded:TASK/SPLIT`` and check both.

    Raises:
        InputError: The task or the split is unknown.
    """
    from adamerge.data.embedded import EMBEDDED_TASKS, SPLITS
    from adamerge.errors import nearest

    task, _, split = source.removeprefix(EMBEDDED).partition("/")
    for word, known in ((task, EMBEDDED_TASKS), (split, SPLITS)):
        if word not in known:
            raise InputError(f"{source!r}: {word!r} is unknown.", nearest(word, known))
    return task, split
