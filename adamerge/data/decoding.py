"""One encoded image becomes a tensor, or a reason why not."""

import io
import struct
from collections.abc import Callable
from typing import Any

from torch import Tensor

from adamerge.errors import DataError

Preprocess = Callable[[Any], Tensor]


def decode(value: Any, preprocess: Preprocess) -> Tensor | str:
    """Give an image's tensor, or why there is none."""
    from PIL.Image import DecompressionBombError

    try:
        return preprocess(_open_image(value))
    except (OSError, ValueError, SyntaxError, EOFError, struct.error, DecompressionBombError) as error:
        told = str(error).partition(" <_io.")[0]  # an address in memory tells nobody anything
        return told or type(error).__name__


def content(value: dict[str, Any] | None) -> bytes:
    """Give an image's encoded bytes, whether they lie in the row or in a file of their own."""
    if value is not None and value["bytes"] is not None:
        return value["bytes"]
    if value is None or value["path"] is None:
        raise ValueError("no image")
    with open(value["path"], "rb") as file:
        return file.read()


def require_same_size(role: str, *images: tuple[str, Tensor]) -> None:
    """Compare named images as the preprocessing gives them.

    Raises:
        DataError: Shapes or types differ.
    """
    if len({(image.shape, image.dtype) for _, image in images}) > 1:
        told = " and ".join(f"{name} {list(image.shape)} {image.dtype}" for name, image in images)
        raise DataError(
            f"{role}: the preprocessing gives images of different sizes: {told}.",
            "It must give one size for all images: let it resize or crop both height and width.",
        )


def _open_image(value: dict[str, Any] | Tensor | None) -> Any:
    """Open one encoded image; 16-bit grey keeps its upper eight bits, transparency is dropped."""
    from PIL import Image

    if isinstance(value, Tensor):  # an embedded one, which is decoded already
        return Image.fromarray(value.permute(1, 2, 0).numpy())
    with Image.open(io.BytesIO(content(value))) as image:
        if image.mode.startswith("I"):
            return image.point(lambda level: level / 256).convert("L").convert("RGB")
        return (image.convert("RGBA") if "transparency" in image.info else image).convert("RGB")
