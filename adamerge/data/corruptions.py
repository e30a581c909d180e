"""The seven corruptions of robustness tables (Hendrycks and Dietterich, arXiv:1903.12261)."""

import hashlib
from collections.abc import Callable
from importlib.metadata import distributions
from typing import Any

from adamerge.errors import EnvironmentProblem, InputError, nearest

CORRUPTIONS = (
    "contrast",
    "gaussian_noise",
    "impulse_noise",
    "jpeg_compression",
    "motion_blur",
    "pixelate",
    "spatter",
)
Corrupt = Callable[[Any, int], Any]
_SMALLEST = 32  # the library refuses smaller images


def parse_corruption(text: str) -> tuple[str, int]:
    """Read ``NAME`` (severity 5) or ``NAME/SEVERITY``.

    Raises:
        InputError: There is no such corruption, or the severity is not 1 to 5.
    """
    name, _, severity = text.partition("/")
    if name not in CORRUPTIONS:
        raise InputError(f"corruption {name!r} is unknown.", nearest(name, CORRUPTIONS))
    if severity not in ("", *"12345"):
        raise InputError(f"corruption {text!r}: the severity must be 1 to 5.", f"Write {name}/5")
    return name, int(severity or 5)


def library_versions() -> list[str]:
    """Give the version of what corrupts images, for cache keys; the library goes by two names."""
    names = ("imagecorruptions-imaug", "imagecorruptions")
    return [found.version for name in names for found in distributions(name=name)]


def make_corruption(text: str) -> Corrupt:
    """Give a function from an RGB image and its place in the source to the corrupted image.

    The same image at the same place is corrupted in the same way each time. The corruptions' noise and
    blur have fixed sizes in pixels, so they belong before resizing; images below 32 pixels are enlarged
    to that.

    Raises:
        InputError: The text names no corruption.
        EnvironmentProblem: The optional library is absent.
    """
    name, severity = parse_corruption(text)
    try:
        from imagecorruptions import corrupt
    except ImportError as error:
        raise EnvironmentProblem(
            f"corruption {name!r} needs imagecorruptions-imaug ({error}).",
            "Install it: pip install imagecorruptions-imaug",
        ) from error

    def apply(image: Any, index: int) -> Any:
        import numpy as np
        from PIL import Image

        seed = int.from_bytes(hashlib.sha256(f"{name}/{severity}/{index}".encode()).digest()[:4], "little")
        options = {"seed": seed} if name == "impulse_noise" else {}  # scikit-image has a generator of its own
        pixels = np.asarray(_enlarged(image))
        before = np.random.get_state()  # the other corruptions draw from the global generator
        np.random.seed(seed)
        try:
            return Image.fromarray(corrupt(pixels, severity=severity, corruption_name=name, **options))
        finally:
            np.random.set_state(before)

    return apply


def _enlarged(image: Any) -> Any:
    scale = _SMALLEST / min(image.size)
    if scale <= 1:
        return image
    width, height = (max(_SMALLEST, round(scale * side)) for side in image.size)
    return image.resize((width, height))
