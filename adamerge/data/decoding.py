"""One encoded image becomes a tensor, or a reason why not."""

import io
import os
import stat
import struct
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

from torch import Tensor

from adamerge.errors import AdamergeError, DataError

Preprocess = Callable[[Any], Tensor]
_NOT_READ = ("EPS", "MPEG")  # PostScript is a program, of films there is no decoder
_BITS_PER_SAMPLE = 258  # the TIFF tag
_ORIENTATION = 274  # the EXIF tag


@cache
def image_formats() -> tuple[str, ...]:
    """Return the formats that Pillow decodes by itself, in the order in which it tries them."""
    from PIL import Image, ImageFile

    Image.init()
    stubs = ImageFile.StubImageFile  # formats that another program would have to read
    opened = {name: opener for name, (opener, _) in Image.OPEN.items() if name not in _NOT_READ}
    return tuple(n for n in Image.ID if n in opened and not _is_a(opened[n], stubs))


@cache
def image_suffixes() -> frozenset[str]:
    """Return the suffixes, in lower case, of files in these formats."""
    from PIL import Image

    names = set(image_formats())
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in names)


def decode(value: Any, preprocess: Preprocess) -> Tensor | str:
    """Return an image's tensor, or why there is none: whatever is wrong is a problem of this image alone.

    Args:
        value: ``{"bytes": ..., "path": ...}`` of an encoded image, or the pixels of one.
        preprocess: From an RGB image to a tensor; see `to_rgb` for what it is given.
    """
    try:
        image = _open_image(value)
    except AdamergeError:
        raise
    except Exception as error:  # plugins of Pillow stumble over damaged files in every way
        return _reason(error)
    try:
        return preprocess(image)
    except (OSError, ValueError, SyntaxError, EOFError, struct.error) as error:
        return _reason(error)


def content(value: dict[str, Any] | None) -> bytes:
    """Return an image's encoded bytes, whether they lie in the row or in a file of their own.

    Raises:
        ValueError: There is no image.
        OSError: The file cannot be read, or is a pipe, a device or a socket, which might never end.
    """
    if value is not None and value["bytes"] is not None:
        return value["bytes"]
    if value is None or value["path"] is None:
        raise ValueError("no image")
    require_regular(value["path"])
    with open(value["path"], "rb") as file:
        return file.read()


def require_regular(*files: str | os.PathLike[str]) -> None:
    """Check that files are files.

    Raises:
        OSError: One is a pipe, a device, a socket or a folder, or is not there.
    """
    for file in files:
        if not stat.S_ISREG(os.stat(file).st_mode):
            raise OSError(f"{file} is not a file but a pipe, device, socket or folder")


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


def to_rgb(image: Any) -> Any:
    """Return the first frame of an opened image as 8-bit RGB, upright, by one rule for all modes.

    The EXIF orientation is applied, as `datasets` does. Modes of 8 bits and less (1, L, P, LA, PA, RGBA,
    CMYK, YCbCr, LAB, HSV) are converted by Pillow; transparency is dropped, and the colours below it stay.
    Grey levels of more than 8 bits keep the upper eight of 16, or of the 9 to 15 bits that a TIFF file
    declares.

    Raises:
        ValueError: Levels lie outside 16 bits, or pixels are floating-point numbers: no file says which
            of them is white.
    """
    image.load()
    depth = _depth(image)
    image = _upright(image)
    if image.mode == "F":
        raise ValueError("floating-point pixels have no stated range: save it with 8 or 16 bits")
    if image.mode.startswith("I"):
        return _upper_bits(image, depth)
    return (image.convert("RGBA") if "transparency" in image.info else image).convert("RGB")


def _open_image(value: dict[str, Any] | Tensor | None) -> Any:
    """Open one encoded image; what Pillow would only warn of is no reason to stop."""
    from PIL import Image

    if isinstance(value, Tensor):  # an embedded one, which is decoded already
        return Image.fromarray(value.permute(1, 2, 0).numpy())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(io.BytesIO(content(value)), formats=image_formats()) as image:
            return to_rgb(image)


def _upright(image: Any) -> Any:
    """Apply the EXIF orientation; EXIF that cannot be read says none."""
    from PIL import ImageOps

    try:
        orientation = image.getexif().get(_ORIENTATION)
    except Exception:  # its reader stumbles in every way
        return image
    return image if orientation is None else ImageOps.exif_transpose(image)


def _depth(image: Any) -> int:
    """Return how many bits a level has: those that TIFF declares, or 16."""
    bits = getattr(image, "tag_v2", {}).get(_BITS_PER_SAMPLE, (16,))
    return bits[0] if len(bits) == 1 and 8 < bits[0] < 16 else 16


def _upper_bits(image: Any, depth: int) -> Any:
    import numpy as np
    from PIL import Image

    levels = np.asarray(image).astype(np.int64)
    if levels.min() < 0 or levels.max() >= 1 << depth:
        raise ValueError(f"levels from {levels.min()} to {levels.max()} do not fit into {depth} bits")
    return Image.fromarray((levels >> depth - 8).astype(np.uint8)).convert("RGB")


def _is_a(opener: Any, kind: type) -> bool:
    return isinstance(opener, type) and issubclass(opener, kind)


def _reason(error: Exception) -> str:
    told = str(error).partition(" <_io.")[0]  # an address in memory tells nobody anything
    return told.partition("\n")[0] or type(error).__name__
