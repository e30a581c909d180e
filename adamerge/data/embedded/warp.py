"""Affine sampling of small images, in plain float64 so that every machine draws the same pixels."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int64, Num

SIDE = 28  # pixels of every embedded image


@dataclass(frozen=True)
class Jitter:
    """How far a drawing may be moved: each value bounds a uniform draw.

    Attributes:
        turn: Largest rotation, in degrees.
        zoom: Smallest and largest magnification.
        shear: Largest horizontal shear.
        shift: Largest displacement, in pixels of the result.
    """

    turn: float = 5.0
    zoom: tuple[float, float] = (0.9, 1.1)
    shear: float = 0.05
    shift: float = 1.5

    def draw(
        self, random: np.random.Generator, count: int
    ) -> tuple[Float64[np.ndarray, "image 2 2"], Float64[np.ndarray, "image 2"]]:
        """Random maps from offsets in the result (y, x) to offsets in the source."""
        angle = np.radians(random.uniform(-self.turn, self.turn, count))
        shrink = 1.0 / random.uniform(*self.zoom, count)
        lean = random.uniform(-self.shear, self.shear, count)
        cosine, sine = np.cos(angle), np.sin(angle)
        rows = [cosine, -sine, sine + lean * cosine, cosine - lean * sine]
        maps = (np.stack(rows, axis=-1) * shrink[:, None]).reshape(count, 2, 2)
        # Rounded: sine and cosine may differ in their last bit between processors.
        return maps.round(9), random.uniform(-self.shift, self.shift, (count, 2))


def warp(
    sources: Num[np.ndarray, "source height width"],
    which: Int64[np.ndarray, "image"],
    maps: Float64[np.ndarray, "image 2 2"],
    centres: Float64[np.ndarray, "image 2"],
    side: int = SIDE,
) -> Float64[np.ndarray, "image side side"]:
    """Samples sources bilinearly on turned square grids; border pixels continue outwards.

    Args:
        sources: Images to sample from.
        which: Index of the source of each result.
        maps: From an offset in the result to an offset in the source, both (y, x) in pixels.
        centres: The point (y, x) of the source that comes to lie in the middle of the result.
        side: Pixels of a side of the results.
    """
    height, width = sources.shape[1:]
    steps = np.arange(side) - (side - 1) / 2
    offsets = np.stack(np.meshgrid(steps, steps, indexing="ij"), axis=-1)
    across = maps[:, None, None, :, 0] * offsets[..., :1] + maps[:, None, None, :, 1] * offsets[..., 1:]
    points = across + centres[:, None, None, :]
    y = points[..., 0].clip(0, height - 1.001)
    x = points[..., 1].clip(0, width - 1.001)
    top, left = y.astype(np.int64), x.astype(np.int64)
    down, right = y - top, x - left
    flat = sources.reshape(-1)
    corner = which[:, None, None] * (height * width) + top * width + left
    upper = flat[corner] * (1 - right) + flat[corner + 1] * right
    lower = flat[corner + width] * (1 - right) + flat[corner + width + 1] * right
    return upper * (1 - down) + lower * down
