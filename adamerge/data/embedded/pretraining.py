"""An endless stream of captioned drawings for contrastive pre-training, apart from all tasks.

Other typefaces (STIX, Computer Modern, and cuts of DejaVu that the tasks leave out), other words,
other cells of the photographs, milder distortions and other seeds than the tasks' images.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
from jaxtyping import Bool, Float64, Int64, Shaped

from adamerge.data.embedded.characters import CAPITALS, SERIF
from adamerge.data.embedded.glyphs import CANVAS, bank, draw
from adamerge.data.embedded.painting import (
    Ink,
    Picture,
    blur,
    clouds,
    colours,
    finish,
    grain,
    outline,
    paint,
    ramp,
)
from adamerge.data.embedded.recipes import Labelled
from adamerge.data.embedded.rows import EMBEDDED_TASKS, GREEK, SCRIPTS, STYLES, SYMBOLS, VOCABULARY
from adamerge.data.embedded.surfaces import pieces
from adamerge.data.embedded.warp import SIDE, Jitter
from adamerge.data.embedded.words import OTHER_WORDS, four_letters

_STIX = ("STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "STIXGeneralBolIta")
_MODERN = ("cmr10", "cmb10", "cmti10", "cmss10", "cmtt10")
_PICTORIAL = ("STIXGeneral", "DejaVuSans-Oblique", "DejaVuSans-BoldOblique")
_MORE_STYLES = {  # typefaces besides those of the task
    "serif": ("STIXGeneral", "cmr10"),
    "bold serif": ("STIXGeneralBol", "cmb10"),
    "italic serif": ("STIXGeneralItalic", "cmti10"),
    "sans": ("cmss10",),
    "typewriter": ("cmtt10",),
}
# Share of each kind of picture; MNIST and the UCI scans have one kind of drawn digit in common.
_SHARES = {
    "mnist": 0.14,
    "letters": 0.20,
    "greek": 0.18,
    "symbols": 0.14,
    "scripts": 0.10,
    "styles": 0.10,
    "textures": 0.14,
}


@dataclass(frozen=True)
class Concept:
    """What a caption names: `words` put into one of the `templates`."""

    words: str
    templates: tuple[str, ...]


CONCEPTS = tuple(
    Concept(words, EMBEDDED_TASKS[task].templates) for task in _SHARES for words in VOCABULARY[task]
)


def _style_masks(style: str) -> Float64[np.ndarray, "glyph 34 34"]:
    """Words that the task does not show, in typefaces of the style, small and in capitals."""
    both_cases = [*OTHER_WORDS, *(word.upper() for word in OTHER_WORDS)]
    return bank((STYLES[style], *_MORE_STYLES.get(style, ())), both_cases, 24)


@cache
def _masks() -> tuple[Float64[np.ndarray, "glyph 34 34"], Int64[np.ndarray, "concept"]]:
    """Masks of all concepts that are one drawing, and where each concept's masks begin."""
    digits = [bank(_STIX + _MODERN + SERIF, (str(digit),)) for digit in range(10)]
    capitals = [bank(_STIX + _MODERN + SERIF, (letter,)) for letter in CAPITALS]
    greek = [bank(_STIX + SERIF, (letter,)) for letter in GREEK.values()]
    symbols = [bank(_PICTORIAL, (symbol,)) for symbol in SYMBOLS.values()]
    none = [np.zeros((0, CANVAS, CANVAS))] * len(SCRIPTS)
    groups = [*digits, *capitals, *greek, *symbols, *none, *map(_style_masks, STYLES)]
    return np.concatenate(groups), np.cumsum([0, *map(len, groups)])


# The kind of each concept, where each kind begins, and how often a concept is drawn.
_SIZES = [len(VOCABULARY[kind]) for kind in _SHARES]
_KINDS = np.repeat(list(_SHARES), _SIZES)
_FIRST = dict(zip(_SHARES, np.cumsum([0, *_SIZES]), strict=False))
_OFTEN = np.repeat(np.array(list(_SHARES.values())) / _SIZES, _SIZES)


def _some(random: np.random.Generator, count: int, share: float) -> Bool[np.ndarray, "image 1 1"]:
    return random.random((count, 1, 1)) < share


def _paper(random: np.random.Generator, ink: Ink, outlined: Bool[np.ndarray, "image 1 1"]) -> Picture:
    """Ink of any colour on a ground of any other; some is blurred, some `outlined` ink hollow."""
    count = len(ink)
    ink = np.where(outlined & _some(random, count, 0.2), outline(ink), ink)
    ink = np.where(_some(random, count, 0.2), blur(ink), ink)
    dark, pale = colours(random, count, 0.0, 0.45), colours(random, count, 0.45, 1.0)
    swap = _some(random, count, 0.5)[:, None]
    front, back = np.where(swap, pale, dark), np.where(swap, dark, pale)
    hue = colours(random, count, 0.0, 1.0)
    vivid = _some(random, count, 0.3)[:, None]  # contrast of hue, not of brightness
    front, back = np.where(vivid, hue, front), np.where(vivid, (hue + 0.5) % 1, back)
    return paint(ink, front, back + 0.2 * (clouds(random, count, 4)[:, None] - 0.5))


def _ink(
    random: np.random.Generator, labels: Int64[np.ndarray, "image"], kinds: Shaped[np.ndarray, "image"]
) -> Ink:
    """Ink of the labels' glyphs, words or writing systems; none for surfaces."""
    masks, starts = _masks()
    ink = np.zeros((len(labels), SIDE, SIDE))
    several = kinds == "scripts"
    single = ~several & (kinds != "textures")
    which = random.integers(starts[labels[single]], starts[labels[single] + 1])
    jitter = Jitter(turn=15.0, zoom=(0.75, 1.1), shear=0.2, shift=2.0)
    ink[single] = draw(random, masks, which, jitter)
    ink[several] = four_letters(random, labels[several] - _FIRST["scripts"], ("DejaVuSans-Bold",))
    return ink


def draw_batch(random: np.random.Generator, count: int) -> Labelled:
    """Random drawings with the indices of their concepts in `CONCEPTS` as labels."""
    labels = random.choice(len(CONCEPTS), size=count, p=_OFTEN / _OFTEN.sum())
    kinds = _KINDS[labels]
    ink = _ink(random, labels, kinds)
    picture = _paper(random, ink, outlined=(kinds != "styles")[:, None, None])
    shown = kinds == "textures"
    surface = pieces(random, labels[shown] - _FIRST["textures"], "pretraining")[:, None]
    picture[shown] = surface * colours(random, len(surface), 0.5, 1.2)
    light = np.where(_some(random, count, 0.3), 0.6 + 0.4 * ramp(random, count), 1.0)[:, None]
    noise = grain(random, count, 0.07) * random.uniform(0, 1, (count, 1, 1, 1))
    return Labelled(finish(picture * light + noise), labels)
