"""A row's source to images in memory: embedded tasks, image folders, parquet, `datasets` folders."""

import hashlib
import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Images(Dataset[dict[str, Tensor]]):
    """Decoded images of one task, with or without labels.

    Attributes:
        images: uint8 ``[image, 3, height, width]``.
        labels: ``[image]``, or None where they are absent or were dropped.
    """

    images: UInt8[Tensor, "image 3 height width"]
    labels: Int64[Tensor, " image"] | None = None

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, indices: list[int]) -> list[dict[str, Tensor]]:
        """Give a ready batch in one piece (torch's loaders ask for it)."""
        index = torch.tensor(indices)
        batch = {"images": self.images[index], "index": index}
        return [batch if self.labels is None else batch | {"labels": self.labels[index]}]

    def part(self, index: Int64[Tensor, " image"]) -> "Images":
        """Give the images at these indices."""
        return Images(self.images[index], None if self.labels is None else self.labels[index])

    def digests(self) -> list[bytes]:
        """Hash each decoded image, to tell equal images apart from different ones."""
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
    if labelled and "label" not in rows.column_names:
        raise DataError(
            f"{role}: {source} has columns {rows.column_names}, and no 'label'.",
            "Use one sub-folder per class, or a parquet file with 'image' and 'label'.",
        )
    return _decode(rows, image_column, preprocess, labelled=labelled, role=role)


def _open_rows(source: str, role: str) -> "Rows":
    from datasets import Dataset as Rows
    from datasets import disable_progress_bars, load_dataset
    from datasets.exceptions import DatasetsError

    path = Path(source)
    if not path.exists():
        raise DataError(f"{role}: {source} does not exist.", "Give a folder of images or a parquet file.")
    disable_progress_bars()
    try:
        if (path / "state.json").exists():
            rows = Rows.load_from_disk(str(path))
        elif path.suffix == ".parquet" or any(path.glob("*.parquet")):
            files = [str(p) for p in ([path] if path.is_file() else sorted(path.glob("*.parquet")))]
            rows = load_dataset("parquet", data_files=files, split="train")
        else:
            rows = load_dataset("imagefolder", data_dir=str(path), split="train")
    except (DatasetsError, FileNotFoundError, ValueError) as error:
        raise DataError(f"{role}: {source} holds no images: {error}") from error
    if len(rows) == 0:
        raise DataError(f"{role}: {source} is empty.", "Adaptation needs at least one image.")
    return rows


def _image_column(rows: "Rows", source: str, role: str) -> str:
    for name in ("image", "img", "jpg", "png"):
        if name in rows.column_names:
            return name
    raise DataError(f"{role}: {source} has columns {rows.column_names}, and none named 'image'.")


def _decode(rows: "Rows", column: str, preprocess: Preprocess, *, labelled: bool, role: str) -> Images:
    """Decode every image once; drop a few corrupt ones with a warning, refuse many."""
    from datasets import Image

    encoded = rows.cast_column(column, Image(decode=False))
    images, kept, corrupt = [], [], []
    for index, row in enumerate(track(encoded, f"Decoding {role}", len(encoded))):
        try:
            images.append(preprocess(_open_image(row[column])))
            kept.append(index)
        except (OSError, ValueError, SyntaxError) as error:
            corrupt.append(f"{row[column]['path'] or f'row {index}'} ({error})")
    if len(corrupt) > _CORRUPT_CEILING * len(encoded):
        raise DataError(
            f"{role}: {len(corrupt)} of {len(encoded)} images cannot be decoded: {shortlist(corrupt, 3)}.",
            "Remove or repair them; at most 1 % is skipped.",
        )
    if corrupt:
        warnings.warn(f"{role}: skipped {shortlist(corrupt)}.", AdamergeWarning, stacklevel=2)
    labels = torch.tensor(rows["label"])[kept] if labelled else None
    return Images(torch.stack(images), labels)


def _open_image(value: dict[str, Any]) -> Any:
    """Open one encoded image; 16-bit grey keeps its upper eight bits."""
    from PIL import Image

    image = Image.open(io.BytesIO(value["bytes"]) if value["bytes"] else value["path"])
    image.load()
    if image.mode.startswith("I"):
        image = image.point(lambda level: level / 256).convert("L")
    return image.convert("RGB")
