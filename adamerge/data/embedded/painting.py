"""Turning ink into pictures: colours, shading, noise. All values lie in 0..1 until `finish`."""

import numpy as np
from jaxtyping import Float64, UInt8

from adamerge.data.embedded.warp import SIDE, warp

Ink = Float64[np.ndarray, "image 28 28"]
Picture = Float64[np.ndarray, "image 3 28 28"]
Colour = Float64[np.ndarray, "image 3 1 1"]


def colours(random: np.random.Generator, count: int, low: float, high: float) -> Colour:
    """Random colours, each channel between `low` and `high`."""
    return random.uniform(low, high, (count, 3, 1, 1))


def paint(ink: Ink, front: Colour | Picture, back: Colour | Picture) -> Picture:
    """The front where there is ink, the back elsewhere."""
    covered = ink[:, None]
    return back * (1 - covered) + front * covered


def grain(random: np.random.Generator, count: int, amount: float) -> Picture:
    """Independent noise of each pixel and channel: mean 0, standard deviation `amount`."""
    half = amount * 3**0.5
    return random.uniform(-half, half, (count, 3, SIDE, SIDE))


def clouds(random: np.random.Generator, count: int, cells: int) -> Ink:
    """Smooth random fields in 0..1 that change over about 28 / `cells` pixels."""
    coarse = random.uniform(0, 1, (count, cells + 1, cells + 1))
    maps = np.broadcast_to(np.eye(2) * cells / SIDE, (count, 2, 2))
    return warp(coarse, np.arange(count), maps, np.full((count, 2), cells / 2))


def ramp(random: np.random.Generator, count: int) -> Ink:
    """Light that falls off linearly in a random direction, in 0..1."""
    across = np.linspace(0, 1, SIDE)
    weight = random.uniform(0, 1, (count, 1, 1))
    rising = weight * across[:, None] + (1 - weight) * across
    mirrored = np.where(random.random((count, 1, 1)) < 0.5, rising, rising[:, ::-1])
    return np.where(random.random((count, 1, 1)) < 0.5, mirrored, mirrored[:, :, ::-1])


def blur(picture: Float64[np.ndarray, "*any 28 28"]) -> Float64[np.ndarray, "*any 28 28"]:
    """Smooths with the weights 1 2 1 along both axes; the border repeats."""
    for axis in (-1, -2):
        reach = [(0, 0)] * picture.ndim
        reach[axis] = (1, 1)
        padded = np.moveaxis(np.pad(picture, reach, mode="edge"), axis, 0)
        picture = np.moveaxis((padded[:-2] + 2 * padded[1:-1] + padded[2:]) / 4, 0, axis)
    return picture


def outline(ink: Ink) -> Ink:
    """The rim of the ink: what one pixel more would cover, less what one pixel less would."""
    padded = np.pad(ink, [(0, 0), (1, 1), (1, 1)], mode="edge")
    near = [padded[:, y : y + SIDE, x : x + SIDE] for y, x in ((0, 1), (2, 1), (1, 0), (1, 2))]
    return np.maximum.reduce([ink, *near]) - np.minimum.reduce([ink, *near])


def finish(picture: Picture) -> UInt8[np.ndarray, "image 3 28 28"]:
    """Clips to 0..1 and rounds to 8 bits."""
    return np.rint(picture.clip(0, 1) * 255).astype(np.uint8)
