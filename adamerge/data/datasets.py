"""A row's source to images in memory: embedded tasks, image folders, parquet, `datasets` folders."""

import hashlib
import io
import os
import struct
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int64, UInt8
from torch import Tensor
from torch.utils.data import Dataset

from adamerge.data.tasks import EMBEDDED, embedded_source
from adamerge.errors import AdamergeWarning, DataError, shortlist
from adamerge.progress import track

if TYPE_CHECKING:
    from datasets import Dataset as Rows

Preprocess = Callable[[Any], Tensor]
_CORRUPT_CEILING = 0.01
_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")


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
    rows = _open_rows(source, role)
    image_column = _image_column(rows, source, role)
    labels = _labels_of(rows, source, role) if labelled else None
    images, kept = _decode(rows, image_column, preprocess, role=role)
    if labels is None:
        return Images(images)
    return Images(images, labels[kept], tuple(getattr(rows.features["label"], "names", ())))


def _open_rows(source: str, role: str) -> "Rows":
    """Open a source in memory: nothing is copied to a cache."""
    from datasets import Dataset as Rows
    from datasets.exceptions import DatasetsError
    from pyarrow import parquet

    path = Path(source)
    if not path.exists():
        raise DataError(f"{role}: {source} does not exist.", "Give a folder of images or a parquet file.")
    try:
        if (path / "state.json").exists():
            rows = Rows.load_from_disk(str(path))
        elif path.suffix == ".parquet" or any(path.glob("*.parquet")):
            files = [str(p) for p in ([path] if path.is_file() else sorted(path.glob("*.parquet")))]
            rows = Rows(parquet.read_table(files))
        else:
            rows = _folder_rows(path)
    except (DatasetsError, OSError, ValueError) as error:
        raise DataError(f"{role}: {source} cannot be read: {error}") from error
    if len(rows) == 0:
        raise DataError(
            f"{role}: {source} holds no images.",
            f"Give a folder with files such as {', '.join(_SUFFIXES[:3])}, or a parquet file with rows.",
        )
    return rows


def _folder_rows(root: Path) -> "Rows":
    """List a folder's images; where all lie in sub-folders, the sub-folders in order are the classes."""
    from datasets import ClassLabel, Features, Image
    from datasets import Dataset as Rows

    walk = os.walk(root, followlinks=True)
    found = sorted(Path(folder, name).relative_to(root) for folder, _, names in walk for name in names)
    images = [p for p in found if p.suffix.lower() in _SUFFIXES and not any(map(_is_hidden, p.parts))]
    columns: dict[str, list[Any]] = {"image": [str(root / p) for p in images]}
    features: dict[str, Any] = {"image": Image(decode=False)}
    if images and all(len(p.parts) > 1 for p in images):
        classes = sorted(p.name for p in root.iterdir() if p.is_dir() and not _is_hidden(p.name))
        columns["label"] = [classes.index(p.parts[0]) for p in images]
        features["label"] = ClassLabel(names=classes)
    return Rows.from_dict(columns, Features(features))


def _is_hidden(name: str) -> bool:
    return name.startswith((".", "__"))  # .ipynb_checkpoints, __MACOSX


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


def _image_column(rows: "Rows", source: str, role: str) -> str:
    for name in ("image", "img", "jpg", "png"):
        if name in rows.column_names:
            return name
    raise DataError(f"{role}: {source} has columns {rows.column_names}, and none named 'image'.")


def _decode(
    rows: "Rows", column: str, preprocess: Preprocess, *, role: str
) -> tuple[UInt8[Tensor, "image 3 height width"], list[int]]:
    """Decode every image once; drop a few corrupt ones with a warning, refuse many.

    Returns:
        The images, and the rows they came from.
    """
    from datasets import Image
    from PIL.Image import DecompressionBombError

    encoded: Any = rows.cast_column(column, Image(decode=False))
    images, kept, corrupt = [], [], []
    for index, row in enumerate(track(encoded, f"Decoding {role}", len(encoded))):
        try:
            images.append(preprocess(_open_image(row[column])))
            kept.append(index)
        except (OSError, ValueError, SyntaxError, EOFError, struct.error, DecompressionBombError) as error:
            corrupt.append(f"{(row[column] or {}).get('path') or f'row {index}'} ({error})")
    if len(corrupt) > _CORRUPT_CEILING * len(encoded):
        raise DataError(
            f"{role}: {len(corrupt)} of {len(encoded)} images cannot be decoded: {shortlist(corrupt, 3)}.",
            "Remove or repair them; at most 1 % is skipped.",
        )
    if corrupt:
        warnings.warn(f"{role}: skipped {shortlist(corrupt)}.", AdamergeWarning, stacklevel=2)
    return torch.stack(images), kept


def _open_image(value: dict[str, Any] | None) -> Any:
    """Open one encoded image; 16-bit grey keeps its upper eight bits, transparency is dropped."""
    from PIL import Image

    if value is None:
        raise ValueError("no image")
    with Image.open(value["path"] if value["bytes"] is None else io.BytesIO(value["bytes"])) as image:
        if image.mode.startswith("I"):
            return image.point(lambda level: level / 256).convert("L").convert("RGB")
        return (image.convert("RGBA") if "transparency" in image.info else image).convert("RGB")
