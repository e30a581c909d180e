"""Single characters: Latin capitals as road signs, Greek in chalk, symbols in neon."""

import numpy as np
from jaxtyping import Float64, Int64

from adamerge.data.embedded.glyphs import bank, draw
from adamerge.data.embedded.painting import blur, clouds, colours, finish, grain, outline, paint, ramp
from adamerge.data.embedded.recipes import SIZES, Labelled, balanced_labels
from adamerge.data.embedded.rows import GREEK, SYMBOLS
from adamerge.data.embedded.warp import Jitter

SANS = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSans-BoldOblique")
MONO = ("DejaVuSansMono", "DejaVuSansMono-Bold", "DejaVuSansMono-Oblique")
SERIF = ("DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic", "DejaVuSerif-BoldItalic")
CAPITALS = tuple(chr(ord("A") + index) for index in range(26))


def _written(
    random: np.random.Generator, split: str, masks: Float64[np.ndarray, "glyph 34 34"], classes: int
) -> tuple[Int64[np.ndarray, "image"], Int64[np.ndarray, "image"]]:
    """Balanced labels, and for each a mask of that class in a random typeface."""
    labels = balanced_labels(random, SIZES[split], classes)
    faces = len(masks) // classes
    return labels, labels * faces + random.integers(faces, size=len(labels))


def letters(split: str, random: np.random.Generator) -> Labelled:
    """Saturated signs seen askew, in falling light."""
    jitter = Jitter(turn=18.0, zoom=(0.75, 1.1), shear=0.25, shift=2.0)
    masks = bank(SANS + MONO, CAPITALS)
    labels, which = _written(random, split, masks, len(CAPITALS))
    ink = draw(random, masks, which, jitter)
    count = len(labels)
    front, back = colours(random, count, 0.0, 1.0), colours(random, count, 0.0, 1.0)
    far = np.abs(front - back).sum(axis=1, keepdims=True) > 1.2
    front = np.where(far, front, 1 - np.rint(back))
    light = 0.4 + 0.6 * ramp(random, count)[:, None]
    return Labelled(finish(paint(ink, front, back) * light + grain(random, count, 0.08)), labels)


def greek(split: str, random: np.random.Generator) -> Labelled:
    """Crumbling pale strokes on a smeared blackboard."""
    jitter = Jitter(turn=15.0, zoom=(0.75, 1.1), shear=0.2, shift=2.0)
    masks = bank(SANS, tuple(GREEK.values()))
    labels, which = _written(random, split, masks, len(GREEK))
    ink = draw(random, masks, which, jitter)
    count = len(labels)
    crumbs = random.random(ink.shape) < 0.5 + 0.5 * clouds(random, count, 5)
    board = np.array([0.10, 0.22, 0.16])[:, None, None] + 0.35 * clouds(random, count, 3)[:, None]
    chalk = colours(random, count, 0.7, 1.0)
    return Labelled(finish(paint(ink * crumbs, chalk, board) + grain(random, count, 0.05)), labels)


def symbols(split: str, random: np.random.Generator) -> Labelled:
    """Glowing outlines at night."""
    jitter = Jitter(turn=20.0, zoom=(0.75, 1.1), shear=0.2, shift=2.0)
    masks = bank(("DejaVuSans", "DejaVuSans-Bold", "DejaVuSansMono"), tuple(SYMBOLS.values()))
    labels, which = _written(random, split, masks, len(SYMBOLS))
    ink = draw(random, masks, which, jitter)
    count = len(labels)
    tube = outline(ink)
    glow = (0.6 * tube + 0.8 * blur(blur(tube))).clip(0, 1)
    night = colours(random, count, 0.0, 0.3) + 0.2 * ramp(random, count)[:, None]
    lit = paint(glow, colours(random, count, 0.35, 1.0), night)
    return Labelled(finish(lit + grain(random, count, 0.06)), labels)
