"""Where images come from: rows of folders, parquet files or `datasets` folders, and one image decoded."""

import io
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from adamerge.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset as Rows

Preprocess = Callable[[Any], Tensor]
_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")


def open_rows(source: str, role: str) -> "Rows":
    """Open a source in memory: nothing is copied to a cache."""
    from datasets import Dataset as Rows
    from datasets.exceptions import DatasetsError
    from pyarrow import parquet

    path = Path(source)
    if not path.exists():
        raise DataError(f"{role}: {source} does not exist.", "Give a folder of images or a parquet file.")
    try:
        layout = layout_of(path)
        if layout == "datasets":
            rows = Rows.load_from_disk(str(path))
        elif layout == "parquet":
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


def image_column(rows: "Rows", source: str, role: str) -> str:
    """Name the column that holds the images."""
    for name in ("image", "img", "jpg", "png"):
        if name in rows.column_names:
            return name
    raise DataError(f"{role}: {source} has columns {rows.column_names}, and none named 'image'.")


def layout_of(path: Path) -> str:
    """Tell what lies there: "datasets", "parquet", or else a "folder" of images."""
    if (path / "state.json").exists():
        return "datasets"
    return "parquet" if path.suffix == ".parquet" or any(path.glob("*.parquet")) else "folder"


def files_of(root: Path, *, images: bool) -> list[Path]:
    """List a folder's files, hidden ones left out: those named like images, or the others."""
    walk = os.walk(root, followlinks=True)
    found = sorted(Path(folder, name).relative_to(root) for folder, _, names in walk for name in names)
    seen = (p for p in found if not any(map(_is_hidden, p.parts)))
    return [p for p in seen if (p.suffix.lower() in _SUFFIXES) == images]


def decode(value: Any, preprocess: Preprocess) -> Tensor | str:
    """Give an image's tensor, or why there is none."""
    from PIL.Image import DecompressionBombError

    try:
        return preprocess(_open_image(value))
    except (OSError, ValueError, SyntaxError, EOFError, struct.error, DecompressionBombError) as error:
        told = str(error).partition(" <_io.")[0]  # an address in memory tells nobody anything
        return told or type(error).__name__


def _folder_rows(root: Path) -> "Rows":
    """List a folder's images; where all lie in sub-folders, the sub-folders in order are the classes."""
    from datasets import ClassLabel, Features, Image
    from datasets import Dataset as Rows

    images = files_of(root, images=True)
    columns: dict[str, list[Any]] = {"image": [str(root / p) for p in images]}
    features: dict[str, Any] = {"image": Image(decode=False)}
    if images and all(len(p.parts) > 1 for p in images):
        classes = sorted(p.name for p in root.iterdir() if p.is_dir() and not _is_hidden(p.name))
        columns["label"] = [classes.index(p.parts[0]) for p in images]
        features["label"] = ClassLabel(names=classes)
    return Rows.from_dict(columns, Features(features))


def _is_hidden(name: str) -> bool:
    return name.startswith((".", "__"))  # .ipynb_checkpoints, __MACOSX


def _open_image(value: dict[str, Any] | Tensor | None) -> Any:
    """Open one encoded image; 16-bit grey keeps its upper eight bits, transparency is dropped."""
    from PIL import Image

    if isinstance(value, Tensor):  # an embedded one, which is decoded already
        return Image.fromarray(value.permute(1, 2, 0).numpy())
    if value is None:
        raise ValueError("no image")
    with Image.open(value["path"] if value["bytes"] is None else io.BytesIO(value["bytes"])) as image:
        if image.mode.startswith("I"):
            return image.point(lambda level: level / 256).convert("L").convert("RGB")
        return (image.convert("RGBA") if "transparency" in image.info else image).convert("RGB")
