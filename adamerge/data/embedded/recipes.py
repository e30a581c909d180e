"""What a recipe for one split is, and the small pieces that all recipes share."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Int64, UInt8

SIZES = {"train": 1500, "adapt": 500, "validation": 300, "test": 500}


class Labelled(NamedTuple):
    """Images and their classes."""

    images: UInt8[np.ndarray, "image 3 28 28"]
    labels: Int64[np.ndarray, "image"]


def balanced_labels(random: np.random.Generator, count: int, classes: int) -> Int64[np.ndarray, "image"]:
    """Classes in random order, each as often as any other, give or take one."""
    return random.permutation(np.arange(count) % classes)
