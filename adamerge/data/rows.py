"""The rows of a source: its columns, its labels, and its images one after another, still encoded."""

import contextlib
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int64
from torch import Tensor

from adamerge.data.sources import IMAGES, Source, is_hidden
from adamerge.errors import DataError, nearest

if TYPE_CHECKING:
    from datasets import Dataset, Features

Encoded = dict[str, Any]
_IMAGE_COLUMNS = ("image", "img", "jpg", "png", "jpeg", "webp")
_LABEL_COLUMNS = ("label", "fine_label", "cls", "labels")
_AT_ONCE = 64  # encoded images in memory


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
        return self._column(wanted, _IMAGE_COLUMNS, f"columns {list(self.features)}, and none named 'image'")

    def label_column(self, wanted: str | None = None) -> str:
        """Name the column that holds the labels.

        Raises:
            DataError: There is none, or not the one that was asked for.
        """
        return self._column(wanted, _LABEL_COLUMNS, f"columns {list(self.features)}, and no 'label'")

    def labels(self, column: str) -> Int64[Tensor, " image"]:
        """Give all labels; truth values count as 0 and 1.

        Raises:
            DataError: They are no numbers.
        """
        with self._told():
            values = self.values(column)
        try:
            return torch.tensor(values, dtype=torch.int64)
        except (TypeError, ValueError, RuntimeError) as error:
            raise DataError(
                f"{self.role}: the labels of {self.source.given} are no numbers ({self.features[column]}).",
                "Store each image's index into the class names.",
            ) from error

    def class_names(self, column: str) -> tuple[str, ...]:
        """Give what the source calls its labels, in order; empty where it does not say."""
        return tuple(getattr(self.features[column], "names", ()))

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

    def _column(self, wanted: str | None, known: tuple[str, ...], problem: str) -> str:
        if wanted and wanted not in self.features:
            told = f"{self.role}: {self.source.given} has no column {wanted!r}."
            raise DataError(told, nearest(wanted, self.features))
        found = [wanted] if wanted else [name for name in known if name in self.features]
        if not found:
            hint = "Use one sub-folder per class, or a parquet file with 'image' and 'label'."
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
        if source.layout == "parquet":
            rows = _parquet_rows(source, role)
        elif source.layout == "tar":
            rows = _tar_rows(source, role)
        elif source.layout == "datasets":
            rows = _dataset_rows(source, role, Dataset.load_from_disk(str(source.root)))
        else:
            rows = _dataset_rows(source, role, _listed(source))
    if len(rows) == 0:
        raise DataError(
            f"{role}: {source.given} holds no images.",
            f"Give a folder with files such as {', '.join(IMAGES[:3])}, or a parquet file with rows.",
        )
    return rows


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
        return [int(text) if text.lstrip("-").isdecimal() else text for text in found]

    def batches(column: str) -> Iterator[list[Encoded | None]]:
        for key, row in places.items():
            yield [{"bytes": read(row, column), "path": f"{key}.{column}"}]

    kinds = {name: Image() if f".{name}" in IMAGES else Value("string") for name in columns}
    return Rows(source, role, Features(kinds), len(places), values, batches)


def _dataset_rows(source: Source, role: str, dataset: "Dataset") -> Rows:
    from datasets import Image

    def batches(column: str) -> Iterator[list[Encoded | None]]:
        encoded = dataset.select_columns(column).cast_column(column, Image(decode=False))
        for start in range(0, len(encoded), _AT_ONCE):
            yield encoded[start : start + _AT_ONCE][column]

    return Rows(source, role, dataset.features, len(dataset), lambda name: dataset[name][:], batches)


def _listed(source: Source) -> "Dataset":
    """List a folder's images; where all lie in sub-folders, the sub-folders in order are the classes."""
    from datasets import ClassLabel, Dataset, Features, Image

    root = source.root
    images = [path.relative_to(root) for path in source.files if root.is_dir()]
    columns: dict[str, list[Any]] = {"image": [str(root / p) for p in images]}
    features: dict[str, Any] = {"image": Image(decode=False)}
    if images and all(len(p.parts) > 1 for p in images):
        classes = sorted(p.name for p in root.iterdir() if p.is_dir() and not is_hidden(p.name))
        columns["label"] = [classes.index(p.parts[0]) for p in images]
        features["label"] = ClassLabel(names=classes)
    return Dataset.from_dict(columns, Features(features))


@contextlib.contextmanager
def _named_problems(given: str, role: str) -> Iterator[None]:
    """Turn what our libraries raise for damaged files into one line."""
    from datasets.exceptions import DatasetsError

    try:
        yield
    except (DatasetsError, OSError, ValueError, tarfile.TarError) as error:
        raise DataError(f"{role}: {given} cannot be read: {error}") from error
