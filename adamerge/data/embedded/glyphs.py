"""Characters and words as ink masks: rendered once from matplotlib's typefaces, then warped."""

from collections.abc import Sequence
from functools import cache

import numpy as np
from jaxtyping import Float64, Int64
from PIL import Image, ImageDraw, ImageFont

from adamerge.data.embedded.warp import SIDE, Jitter, warp
from adamerge.data.embedded.wheels import font_file

RENDERED = 64  # font size at which a glyph is rasterised before it is scaled down
CANVAS = 34  # side of a mask; the margin keeps turned glyphs off the border


@cache
def _face(font: str) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(font_file(font), RENDERED, layout_engine=ImageFont.Layout.BASIC)


@cache
def mask(font: str, text: str, body: int = 20) -> Float64[np.ndarray, "34 34"]:
    """Ink of a text, scaled so that its longer side has `body` pixels, centred on a canvas."""
    face = _face(font)
    left, top, right, bottom = face.getbbox(text)
    wide, high = max(1, int(right - left)), max(1, int(bottom - top))
    drawn = Image.new("L", (wide, high))
    ImageDraw.Draw(drawn).text((-left, -top), text, fill=255, font=face)
    scale = body / max(wide, high)
    size = max(2, round(wide * scale)), max(2, round(high * scale))
    canvas = Image.new("L", (CANVAS, CANVAS))
    place = (CANVAS - size[0]) // 2, (CANVAS - size[1]) // 2
    canvas.paste(drawn.resize(size, Image.Resampling.BILINEAR), place)
    return np.asarray(canvas, dtype=np.float64) / 255.0


def has_glyph(font: str, text: str) -> bool:
    """Whether a typeface can show a character, and not just its box for missing ones."""
    return not np.array_equal(mask(font, text), mask(font, "\u0378"))  # 0x378 is unassigned


def bank(fonts: Sequence[str], texts: Sequence[str], body: int = 20) -> Float64[np.ndarray, "glyph 34 34"]:
    """Masks of every text in every typeface; index = text * len(fonts) + typeface."""
    return np.stack([mask(font, text, body) for text in texts for font in fonts])


def draw(
    random: np.random.Generator,
    masks: Float64[np.ndarray, "glyph 34 34"],
    which: Int64[np.ndarray, "image"],
    jitter: Jitter,
    side: int = SIDE,
) -> Float64[np.ndarray, "image side side"]:
    """Randomly moved ink of chosen masks, from 0 (paper) to 1 (ink)."""
    maps, shifts = jitter.draw(random, len(which))
    centres = (CANVAS - 1) / 2 + np.einsum("nij,nj->ni", maps, shifts)
    return warp(masks, which, maps, centres, side)
