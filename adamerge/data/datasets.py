"""A source's images: all in memory, or a few at a time."""

import hashlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Int64, UInt8
from torch import Tensor
from torch.utils.data import Dataset

from adamerge.data.sources import Preprocess, decode, files_of, image_column, layout_of, open_rows
from adamerge.data.tasks import EMBEDDED, embedded_source
from adamerge.errors import AdamergeWarning, DataError, shortlist
from adamerge.progress import track

if TYPE_CHECKING:
    from datasets import Dataset as Rows

CORRUPT_CEILING = 0.01


@dataclass(frozen=True)
class Images(Dataset[dict[str, Tensor]]):
    """Decoded images of one task, with or without labels.

    Attributes:
        images: uint8 ``[image, 3, height, width]``.
        labels: ``[image]``, or None where they are absent or were dropped.
        class_names: What the source calls its labels, in label order; empty where it does not say.
    """

    images: UInt8[Tensor, "image 3 height width"]
    labels: Int64[Tensor, " image"] | None = None
    class_names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, indices: list[int]) -> list[dict[str, Tensor]]:
        """Give a ready batch in one piece (torch's loaders ask for it)."""
        index = torch.tensor(indices)
        batch = {"images": self.images[index], "index": index}
        return [batch if self.labels is None else batch | {"labels": self.labels[index]}]

    def part(self, index: Int64[Tensor, " image"]) -> "Images":
        """Give the images at these indices."""
        labels = None if self.labels is None else self.labels[index]
        return Images(self.images[index], labels, self.class_names)

    def digests(self) -> list[bytes]:
        """Hash each decoded image, once, to tell equal images apart from different ones."""
        return self._digests

    @cached_property
    def _digests(self) -> list[bytes]:
        return [hashlib.sha256(image.numpy().tobytes()).digest() for image in self.images]


def load_images(source: str, preprocess: Preprocess, *, labelled: bool, role: str) -> Images:
    """Load, decode and preprocess all images of a source.

    Args:
        source: ``embedded:TASK/SPLIT``, a folder of images, a parquet file or folder, or a folder
            written by ``Dataset.save_to_disk``.
        preprocess: From a PIL image to uint8 ``[3, height, width]``.
        labelled: Keep labels; otherwise they are dropped here and reach nobody.
        role: Who asks ("task 'cars', test images"), for messages.

    Raises:
        DataError: Nothing is there, labels are wanted and absent, or too many images are corrupt.
    """
    if source.startswith(EMBEDDED):
        from adamerge.data.embedded import load_split

        images, labels = load_split(*embedded_source(source))
        return Images(images, labels if labelled else None)
    rows = open_rows(source, role)
    column = image_column(rows, source, role)
    labels = _labels_of(rows, source, role) if labelled else None
    images, kept = _decode(rows, column, preprocess, role=role)
    if labels is None:
        return Images(images)
    return Images(images, labels[kept], tuple(getattr(rows.features["label"], "names", ())))


class Chunk(NamedTuple):
    """Some consecutive images of a source.

    Attributes:
        paths: Where each lies; None where the source does not tell.
        problems: Why each could not be decoded; None where it was.
        images: Those that were decoded, in order, as the preprocessing gives them.
    """

    paths: list[str | None]
    problems: list[str | None]
    images: list[Tensor]


class ImageStream:
    """A source's images in its own order, decoded a few at a time; labels are not read.

    Nothing is left out silently: an image that cannot be decoded is told in its place; a folder's files
    whose suffix is no image's, and images beside parquet files, are named in a warning. Hidden files do
    not count.

    Args:
        source: As for `load_images`.
        role: Who asks, for messages.

    Raises:
        DataError: Nothing is there.
    """

    def __init__(self, source: str, role: str) -> None:
        self._images: Any
        if source.startswith(EMBEDDED):
            from adamerge.data.embedded import load_split

            self._images = load_split(*embedded_source(source))[0]
            return
        from datasets import Image

        rows = open_rows(source, role)
        column = image_column(rows, source, role)
        self._images = rows.select_columns(column).cast_column(column, Image(decode=False))[column]
        path, layout = Path(source), layout_of(Path(source))
        listed = path.is_dir() and layout != "datasets"
        others = files_of(path, images=layout == "parquet") if listed else []
        if others:
            warnings.warn(f"{role}: these were left out: {shortlist(others)}.", AdamergeWarning, stacklevel=2)

    def __len__(self) -> int:
        return len(self._images)

    def chunks(self, preprocess: Preprocess, size: int) -> Iterator[Chunk]:
        """Decode ``size`` images after another (the last time fewer)."""
        for start in range(0, len(self), size):
            values = list(self._images[start : start + size])
            found = [decode(value, preprocess) for value in values]
            yield Chunk(
                [value.get("path") if isinstance(value, dict) else None for value in values],
                [each if isinstance(each, str) else None for each in found],
                [each for each in found if isinstance(each, Tensor)],
            )


def _labels_of(rows: "Rows", source: str, role: str) -> Int64[Tensor, " image"]:
    if "label" not in rows.column_names:
        raise DataError(
            f"{role}: {source} has columns {rows.column_names}, and no 'label'.",
            "Use one sub-folder per class, or a parquet file with 'image' and 'label'.",
        )
    try:
        return torch.tensor(rows["label"][:], dtype=torch.int64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(
            f"{role}: the labels of {source} are no numbers ({rows.features['label']}).",
            "Store each image's index into the class names.",
        ) from error


def _decode(
    rows: "Rows", column: str, preprocess: Preprocess, *, role: str
) -> tuple[UInt8[Tensor, "image 3 height width"], list[int]]:
    """Decode every image once; drop a few corrupt ones with a warning, refuse many.

    Returns:
        The images, and the rows they came from.
    """
    from datasets import Image

    encoded: Any = rows.cast_column(column, Image(decode=False))
    images, kept, corrupt = [], [], []
    for index, row in enumerate(track(encoded, f"Decoding {role}", len(encoded))):
        found = decode(row[column], preprocess)
        if isinstance(found, Tensor):
            images.append(found)
            kept.append(index)
        else:
            corrupt.append(f"{(row[column] or {}).get('path') or f'row {index}'} ({found})")
    if len(corrupt) > CORRUPT_CEILING * len(encoded):
        raise DataError(
            f"{role}: {len(corrupt)} of {len(encoded)} images cannot be decoded: {shortlist(corrupt, 3)}.",
            "Remove or repair them; at most 1 % is skipped.",
        )
    if corrupt:
        warnings.warn(f"{role}: skipped {shortlist(corrupt)}.", AdamergeWarning, stacklevel=2)
    return torch.stack(images), kept
