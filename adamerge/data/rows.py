"""The rows of a source: its columns, its labels, and its images one after another, still encoded."""

import contextlib
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int64
from torch import Tensor

from adamerge.data.decoding import image_suffixes, require_regular
from adamerge.data.folders import is_hidden
from adamerge.data.sources import Source
from adamerge.data.tables import LABEL_COLUMNS, kind_of, read_table
from adamerge.errors import AdamergeError, DataError, brief, nearest, shortlist

if TYPE_CHECKING:
    from datasets import Dataset, Features

Encoded = dict[str, Any]
_IMAGE_COLUMNS = ("image", "img", "jpg", "png", "jpeg", "webp")
_AT_ONCE = 64  # encoded images in memory
_MOST = 2**31  # classes
_WORDS = ("string", "large_string", "string_view")


@dataclass(frozen=True)
class Rows:
    """Rows whose images stay where they are until they are asked for.

    Attributes:
        source: Where they lie.
        role: Who asks, for messages.
        features: The columns.
        length: How many rows there are.
        values: Gives all values of a column.
        batches: Gives a column's images, undecoded, a few at a time: ``{"bytes": ..., "path": ...}``.
    """

    source: Source
    role: str
    features: "Features"
    length: int
    values: Callable[[str], list[Any]]
    batches: Callable[[str], Iterator[list[Encoded | None]]]

    def __len__(self) -> int:
        return self.length

    def image_column(self, wanted: str | None = None) -> str:
        """Name the column that holds the images.

        Raises:
            DataError: There is none, or not the one that was asked for.
        """
        holds_images, holds_texts = (
            not set(names).isdisjoint(self.features) for names in (_IMAGE_COLUMNS, ("text", "sentence"))
        )
        if holds_texts and not holds_images and not wanted:
            problem = f"{self.role}: {self.source.given} holds texts, the model reads images."
            raise DataError(problem, "Give a folder of images, or a table with a column of them.")
        problem = f"columns {list(self.features)}, and none named 'image'"
        return self._column(wanted, _IMAGE_COLUMNS, problem, self._hint("image_column"))

    def label_column(self, wanted: str | None = None) -> str:
        """Name the column that holds the labels.

        Raises:
            DataError: There is none, or not the one that was asked for.
        """
        problem = f"columns {list(self.features)}, and no 'label'"
        return self._column(wanted, LABEL_COLUMNS, problem, self._hint("label_column"))

    def labels(self, column: str, *, hidden: bool = False) -> Int64[Tensor, " image"]:
        """Return all labels; words are numbered in the order of `class_names`.

        Args:
            column: The column.
            hidden: Accept negative numbers, as unlabelled rows have them.

        Raises:
            DataError: A label is no whole number from 0 on and no name, or a folder's sub-folders cannot be
                its classes.
        """
        if self.source.fault and not self.source.columns:
            raise DataError(
                f"{self.role}: {self.source.given}: {self.source.fault}.",
                "Give a folder whose sub-folders are the classes.",
            )
        values = self._label_values(column)
        if _are_words(values):
            rows = {name: row for row, name in enumerate(self.class_names(column))}
            return torch.tensor([rows[value] for value in values])
        begins_with_a_word = _are_words(values[:1])
        for row, value in enumerate(values):
            if begins_with_a_word:
                problem = "" if _are_words([value]) else "are words elsewhere"
            else:
                problem = _label_problem(value, hidden)
            if problem:
                raise DataError(
                    f"{self.role}: the labels of {self.source.given} {problem}: row {row} has {value!r}.",
                    "Labels are each row's index into the class names, or the name itself.",
                )
        return torch.tensor([int(value) for value in values], dtype=torch.int64)

    def class_names(self, column: str) -> tuple[str, ...]:
        """Return what the source calls its labels, in order; empty where it does not say.

        Where labels are words, these are all that occur, sorted.
        """
        declared = self.declared_names(column)
        if declared or getattr(self.features[column], "dtype", "") not in _WORDS:
            return declared
        values = self._label_values(column)
        return tuple(sorted(set(values))) if _are_words(values) else ()

    def declared_names(self, column: str | None = None) -> tuple[str, ...]:
        """Return the class names that features declare, or sub-folders are; no label is read."""
        names = [column] if column else [name for name in LABEL_COLUMNS if name in self.features]
        return tuple(getattr(self.features.get(names[0]), "names", None) or ()) if names else ()

    def names_are_words(self, column: str) -> bool:
        """Return whether the class names are the labels that occur, in an order that means nothing."""
        return not self.declared_names(column) and bool(self.class_names(column))

    def _label_values(self, column: str) -> list[Any]:
        with self._told():
            return list(self.values(column))

    def images(self, column: str) -> Iterator[Encoded | None]:
        """Walk the images in order, undecoded."""
        with self._told():
            for batch in self.batches(column):
                yield from batch

    def holds_its_images(self, column: str) -> bool:
        """Tell whether the source's files alone decide what the images are."""
        first = next(self.images(column)) or {}
        return self.source.layout == "folder" or first.get("bytes") is not None

    def name_of(self, index: int, value: Encoded | None) -> str:
        """Name an image for messages: its file below the source, or its row."""
        if self.source.layout == "folder":
            return str(self.source.files[index].relative_to(self.source.root))
        return (value or {}).get("path") or f"row {index}"

    def _hint(self, key: str) -> str:
        if self.source.layout == "folder" and not self.source.columns:
            return "Use one sub-folder per class, or metadata.csv with file_name and label."
        return f"Name it in the task's row: {key}: NAME"

    def _column(self, wanted: str | None, known: tuple[str, ...], problem: str, hint: str) -> str:
        if wanted and wanted not in self.features:
            told = f"{self.role}: {self.source.given} has no column {brief(wanted)}."
            raise DataError(told, nearest(wanted, self.features))
        found = [wanted] if wanted else [name for name in known if name in self.features]
        if not found:
            raise DataError(f"{self.role}: {self.source.given} has {problem}.", hint)
        return found[0]

    def _told(self) -> "contextlib.AbstractContextManager[None]":
        return _named_problems(self.source.given, self.role)


def open_rows(source: Source, role: str) -> Rows:
    """Open a source; no image is read, and nothing is copied to a cache.

    Raises:
        DataError: A file is damaged, or there are no rows.
    """
    from datasets import Dataset

    with _named_problems(source.given, role):
        if source.layout != "folder":
            require_regular(*source.files)
        if source.layout == "parquet":
            rows = _parquet_rows(source, role)
        elif source.layout == "tar":
            rows = _tar_rows(source, role)
        elif source.layout == "text":
            rows = _text_rows(source, role)
        elif source.layout == "datasets":
            rows = _dataset_rows(source, role, Dataset.load_from_disk(str(source.root)))
        else:
            rows = _dataset_rows(source, role, _listed(source))
    if len(rows) == 0:
        raise _nothing_in(source, role)
    return rows


def _nothing_in(source: Source, role: str) -> DataError:
    if source.layout == "text":
        return DataError(f"{role}: {source.given} holds no texts.", "Give a file with rows.")
    hint = "Give a folder with files such as .png, .jpg, .webp, or a file with rows: .parquet, .csv, .jsonl."
    if source.root.is_file() and source.layout == "folder":
        return DataError(f"{role}: {source.given} is no file of images or texts that is read.", hint)
    others = f" and no tables; it has {shortlist(source.left_out)}" if source.left_out else ""
    return DataError(f"{role}: {source.given} holds no images{others}.", hint)


def _parquet_rows(source: Source, role: str) -> Rows:
    from datasets import Features, Image
    from pyarrow import parquet

    files = [parquet.ParquetFile(file) for file in source.files]

    def batches(column: str) -> Iterator[list[Encoded | None]]:
        for file in files:
            for batch in file.iter_batches(_AT_ONCE, columns=[column]):
                yield Image(decode=False).cast_storage(batch.column(0)).to_pylist()

    def values(column: str) -> list[Any]:
        return [value for file in files for value in file.read([column]).column(0).to_pylist()]

    features = Features.from_arrow_schema(files[0].schema_arrow)
    return Rows(source, role, features, sum(f.metadata.num_rows for f in files), values, batches)


def _tar_rows(source: Source, role: str) -> Rows:
    """Index the files ``KEY.COLUMN`` of tars: a row is what shares a key."""
    from datasets import Features, Image, Value

    places: dict[str, dict[str, tuple[Path, int, int]]] = {}
    for file in source.files:
        with tarfile.open(file, "r:") as tar:
            for member in filter(tarfile.TarInfo.isfile, tar):
                folder, _, name = member.name.rpartition("/")
                key, _, column = name.partition(".")
                if key:  # hidden files have none
                    row = places.setdefault(f"{file}/{folder}/{key}", {})
                    row[column] = (file, member.offset_data, member.size)
    columns = sorted({column for row in places.values() for column in row})

    def read(row: dict[str, tuple[Path, int, int]], column: str) -> bytes | None:
        file, start, size = row.get(column, (None, 0, 0))
        if file is None:
            return None
        with file.open("rb") as stream:
            stream.seek(start)
            return stream.read(size)

    def values(column: str) -> list[Any]:
        found = ((read(row, column) or b"").decode().strip() for row in places.values())
        texts = list(found)
        numbers = all(text.removeprefix("-").isdecimal() for text in texts)
        return [int(text) for text in texts] if numbers else [text or None for text in texts]

    def batches(column: str) -> Iterator[list[Encoded | None]]:
        for key, row in places.items():
            yield [{"bytes": read(row, column), "path": f"{key}.{column}"}]

    kinds = {name: Image() if f".{name.lower()}" in image_suffixes() else Value("string") for name in columns}
    return Rows(source, role, Features(kinds), len(places), values, batches)


def _text_rows(source: Source, role: str) -> Rows:
    """Read tables of texts; a column that a file lacks is None there."""
    from datasets import Features, Value

    tables = [read_table(file, role) for file in source.files]
    sizes = [len(next(iter(table.values()), ())) for table in tables]
    names = dict.fromkeys(name for table in tables for name in table)
    columns: dict[str, list[Any]] = {name: [] for name in names}
    for table, size in zip(tables, sizes, strict=True):
        for name, values in columns.items():
            values.extend(table.get(name, [None] * size))

    def batches(column: str) -> Iterator[list[Encoded | None]]:
        raise DataError(f"{role}: {source.given} is a table of texts, which holds no images ({column!r}).")

    kinds = {name: Value(kind_of(values)) for name, values in columns.items()}
    return Rows(source, role, Features(kinds), sum(sizes), columns.__getitem__, batches)


def _dataset_rows(source: Source, role: str, dataset: "Dataset") -> Rows:
    from datasets import Image

    def batches(column: str) -> Iterator[list[Encoded | None]]:
        encoded = dataset.select_columns(column).cast_column(column, Image(decode=False))
        for start in range(0, len(encoded), _AT_ONCE):
            yield encoded[start : start + _AT_ONCE][column]

    return Rows(source, role, dataset.features, len(dataset), lambda name: dataset[name][:], batches)


def _listed(source: Source) -> "Dataset":
    """List a folder's images with what a table says of them, or with sub-folders in order as classes."""
    from datasets import ClassLabel, Dataset, Features, Image

    root = source.root
    images = [path.relative_to(root) for path in source.files if root.is_dir()]
    columns: dict[str, list[Any]] = {"image": [str(root / p) for p in images]}
    if source.columns:
        described = Dataset.from_dict({**source.columns})
        kinds = Features({**described.features, "image": Image(decode=False)})
        return Dataset.from_dict({**source.columns, **columns}, kinds)
    features: dict[str, Any] = {"image": Image(decode=False)}
    if images and all(len(p.parts) > 1 for p in images):
        filled = {p.parts[0] for p in images}
        folders = (p for p in root.iterdir() if p.is_dir() and not is_hidden(p.name))
        classes = sorted(p.name for p in folders if p.name in filled or not p.is_symlink())
        columns["label"] = [classes.index(p.parts[0]) for p in images]
        features["label"] = ClassLabel(names=classes)
    return Dataset.from_dict(columns, Features(features))


def _are_words(values: Sequence[Any]) -> bool:
    return all(isinstance(value, str) and value for value in values) and len(values) > 0


def _label_problem(value: Any, hidden: bool) -> str:
    """Return what is wrong with a label; empty where nothing is."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "are no numbers"
    if isinstance(value, float) and not value.is_integer():
        return "are no whole numbers"
    if value >= _MOST:
        return "are no class's"
    return "" if value >= 0 or hidden else "are negative, as those of unlabelled rows are"


@contextlib.contextmanager
def _named_problems(given: str, role: str) -> Iterator[None]:
    """Turn what our libraries raise for damaged files into one line."""
    try:
        yield
    except AdamergeError:
        raise
    except Exception as error:  # whatever they stumble over, the files are what is wrong
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise DataError(f"{role}: {given} cannot be read: {reason}") from error
