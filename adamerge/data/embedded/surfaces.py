"""Pieces of photographed surfaces; every part of the benchmark owns its own cells of a photo."""

from functools import cache

import numpy as np
from jaxtyping import Float64, Int64

from adamerge.data.embedded.painting import Ink, blur, colours, finish, grain, ramp
from adamerge.data.embedded.recipes import SIZES, Labelled, balanced_labels
from adamerge.data.embedded.rows import SURFACES, in_vocabulary
from adamerge.data.embedded.warp import SIDE, Jitter, warp
from adamerge.data.embedded.wheels import photograph

_CELL = 72  # px of a square cell; a piece never leaves its cell
_OWNERS = (  # dealt out over the shuffled cells of a photo, again and again
    "pretraining",
    "train",
    "adapt",
    "train",
    "test",
    "pretraining",
    "train",
    "test",
    "validation",
    "pretraining",
)


@cache
def _grey(surface: str) -> Float64[np.ndarray, "height width"]:
    """Brightness of a photo, stretched to mean 0.5 and a common contrast."""
    grey = photograph(*SURFACES[surface]).mean(axis=2) / 255
    return 0.5 + 0.2 * (grey - grey.mean()) / grey.std()


def _cells(height: int, width: int) -> dict[str, Int64[np.ndarray, "cell 2"]]:
    """Upper left corners (y, x) of the cells of a photo, by the part that owns them."""
    down, across = height // _CELL, width // _CELL
    corners = np.stack(np.divmod(np.arange(down * across), across), axis=-1) * _CELL
    shuffled = np.random.default_rng(down * across).permutation(corners)
    owners = np.resize(_OWNERS, len(corners))
    return {owner: shuffled[owners == owner] for owner in dict.fromkeys(_OWNERS)}


def owned_cells() -> dict[str, dict[str, Int64[np.ndarray, "cell 2"]]]:
    """Which cells of each photo belong to which part of the benchmark."""
    return {surface: _cells(*_grey(surface).shape) for surface in SURFACES}


def pieces(random: np.random.Generator, labels: Int64[np.ndarray, "image"], owner: str) -> Ink:
    """Turned pieces of each label's surface, from the cells of `owner` only."""
    jitter = Jitter(turn=180.0, zoom=(0.62, 0.95), shear=0.0)
    maps, _ = jitter.draw(random, len(labels))
    reach = np.abs(maps).sum(axis=2).max(axis=1) * SIDE / 2  # half side of the turned piece
    spread = random.uniform(-1, 1, (len(labels), 2)) * (_CELL / 2 - reach - 1).clip(0)[:, None]
    drawn = np.empty((len(labels), SIDE, SIDE))
    for label, surface in enumerate(SURFACES):
        own = np.flatnonzero(labels == label)
        grey = _grey(surface)
        cells = _cells(*grey.shape)[owner]
        centres = cells[random.integers(len(cells), size=len(own))] + _CELL / 2 + spread[own]
        drawn[own] = warp(grey[None], np.zeros_like(own), maps[own], centres)
    return drawn


def textures(split: str, random: np.random.Generator) -> Labelled:
    """Surfaces in coloured light that falls off, out of focus, with sensor noise."""
    places = in_vocabulary("textures")
    labels = balanced_labels(random, SIZES[split], len(places))
    count = len(labels)
    grey = blur(pieces(random, places[labels], split))[:, None]
    contrast = random.uniform(0.9, 1.3, (count, 1, 1, 1))
    light = colours(random, count, 0.5, 1.0) * (0.6 + 0.6 * ramp(random, count)[:, None])
    return Labelled(finish((0.5 + contrast * (grey - 0.5)) * light + grain(random, count, 0.04)), labels)
