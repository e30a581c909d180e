"""Several characters at once: writing systems in newsprint, type styles over photographs."""

from functools import cache

import numpy as np
from jaxtyping import Float64, Int64

from adamerge.data.embedded.glyphs import bank, draw, has_glyph
from adamerge.data.embedded.painting import Ink, Picture, blur, clouds, colours, finish, grain, paint
from adamerge.data.embedded.recipes import SIZES, Labelled, balanced_labels
from adamerge.data.embedded.rows import EMBEDDED_TASKS, SCRIPTS, STYLES, in_vocabulary
from adamerge.data.embedded.warp import SIDE, Jitter, warp
from adamerge.data.embedded.wheels import photograph

_WORDS = (  # noqa: SIM905 (a list literal would take 74 lines)
    "ad ag ah am an as at ax be bi bo by da do ed eh em en ex fa go ha he hi ho if in is "
    "it jo ka ki la lo ma me mi mu my na ne no nu od of oh on or os ow ox pa pe pi qi re "
    "sh so ta to uh um un up us we wo xi ya ye yo za"
).split()
TASK_WORDS, OTHER_WORDS = tuple(_WORDS[::2]), tuple(_WORDS[1::2])  # the second half is for pre-training
_SCENES = ("astronaut.png", "coffee.png", "rocket.jpg", "motorcycle_left.png")


@cache
def script_bank(fonts: tuple[str, ...]) -> tuple[Float64[np.ndarray, "glyph 34 34"], list[int]]:
    """Small masks of all letters of all writing systems, and where each system begins."""
    systems = [map(chr, range(first, last + 1)) for first, last in SCRIPTS.values()]
    texts = [[text for text in system if has_glyph(fonts[0], text)] for system in systems]
    starts = np.cumsum([0, *(len(system) * len(fonts) for system in texts)])
    return bank(fonts, [text for system in texts for text in system], 14), starts.tolist()


def four_letters(
    random: np.random.Generator, labels: Int64[np.ndarray, "image"], fonts: tuple[str, ...]
) -> Ink:
    """Two lines of two random letters of each image's writing system."""
    masks, starts = script_bank(fonts)
    first, last = np.array(starts[:-1])[labels], np.array(starts[1:])[labels]
    which = random.integers(first[:, None], last[:, None], size=(len(labels), 4)).reshape(-1)
    jitter = Jitter(turn=6.0, zoom=(0.8, 1.0), shear=0.1, shift=0.5)
    cells = draw(random, masks, which, jitter, side=SIDE // 2)
    tiled = cells.reshape(-1, 2, 2, SIDE // 2, SIDE // 2).transpose(0, 1, 3, 2, 4)
    return tiled.reshape(-1, SIDE, SIDE)


def scripts(split: str, random: np.random.Generator) -> Labelled:
    """Weak ink under a dot screen on grey paper."""
    places = in_vocabulary("scripts")
    labels = balanced_labels(random, SIZES[split], len(places))
    ink = four_letters(random, places[labels], ("DejaVuSans",))
    count = len(labels)
    phase = np.add.outer(np.arange(SIDE), np.arange(SIDE)) % 2
    screened = ink * (0.55 + 0.45 * phase) * (0.65 + 0.35 * clouds(random, count, 4))
    paper = colours(random, count, 0.55, 0.75)
    press = paint(screened, colours(random, count, 0.0, 0.15), paper)
    return Labelled(finish(press + grain(random, count, 0.05)), labels)


def _scenery(random: np.random.Generator, count: int) -> Picture:
    """Random pieces of photographs, darkened to one half."""
    scene = random.integers(len(_SCENES), size=count)
    pieces = np.empty((count, 3, SIDE, SIDE))
    maps, _ = Jitter(turn=180.0, zoom=(0.35, 0.9)).draw(random, count)
    places = random.uniform(0.15, 0.85, (count, 2))
    for index, name in enumerate(_SCENES):
        photo = photograph("skimage", f"data/{name}") / 255
        own = np.flatnonzero(scene == index)
        centres = places[own] * photo.shape[:2]
        for channel in range(3):
            layer = np.full(len(own), channel)
            pieces[own, channel] = warp(photo.transpose(2, 0, 1), layer, maps[own], centres)
    return pieces


def styles(split: str, random: np.random.Generator) -> Labelled:
    """A pale or dark word over a soft photograph."""
    faces = tuple(STYLES[style] for style in EMBEDDED_TASKS["styles"].classes)
    labels = balanced_labels(random, SIZES[split], len(faces))
    masks = bank(faces, TASK_WORDS, 24)
    which = random.integers(len(TASK_WORDS), size=len(labels)) * len(faces) + labels
    ink = draw(random, masks, which, Jitter(turn=4.0, zoom=(0.92, 1.06), shear=0.0, shift=1.5))
    count = len(labels)
    pale = random.random((count, 1, 1, 1)) < 0.5
    back = 0.2 + 0.4 * blur(_scenery(random, count))
    front = np.where(pale, colours(random, count, 0.8, 1.0), colours(random, count, 0.0, 0.1))
    back = np.where(pale, 0.7 * back, 0.35 + 0.7 * back)
    return Labelled(finish(paint(ink, front, back) + grain(random, count, 0.03)), labels)
