"""Dialects of names: the same tensors with prefixes or wrappers more or less, read under the base's names.

Nothing here is a list of known prefixes: names and shapes of both sides tell.
"""

from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

from adamerge.checkpoints.reading import Checkpoint
from adamerge.errors import InputError, shortlist
from adamerge.names import Shape
from adamerge.state import State, info, is_mergeable, is_same

_COUNTERS = "position_ids"  # older versions of transformers saved them; they are 0, 1, 2, ...
_MOST = 8  # places of one ending, and wrappers, that are looked at

Shapes = Mapping[str, Shape]


class Side(NamedTuple):
    """The names of one side, without some wrappers, and what they stand for.

    Attributes:
        shapes: Shapes by full name.
        keys: Full names by name without wrappers.
    """

    shapes: Shapes
    keys: Mapping[str, str]

    @classmethod
    def of(cls, shapes: Shapes, wrappers: Collection[str] = ()) -> "Side":
        """Return a side without some parts of its names."""
        return cls(shapes, _without(shapes, wrappers))

    def shape(self, key: str) -> Shape:
        """Return the shape of the tensor of a key."""
        return self.shapes[self.keys[key]]


@dataclass(frozen=True)
class Way:
    """How an expert's names become the base's.

    Attributes:
        removed: The prefix that the expert's names lose.
        added: The prefix that they get instead.
        wrappers: Parts inside the names that only one side has, such as ``_orig_mod``.
        names: From the expert's own names to the new ones.
        score: How many of the new names the base has, with the same shape.
        moved: How many of these the prefixes have brought there.
    """

    removed: str
    added: str
    wrappers: tuple[str, ...]
    names: Mapping[str, str]
    score: int
    moved: int

    @property
    def is_common(self) -> bool:
        """Whether most names that arrive have the prefix: one of a head alone means nothing."""
        return not (self.removed or self.added) or 2 * self.moved >= self.score

    @property
    def told(self) -> str:
        """How the names are read, for people: ``without the prefix 'module.'``; empty where as they are."""
        texts = [f"without the prefix {self.removed!r}"] if self.removed else []
        texts += [f"with the prefix {self.added!r}"] if self.added else []
        texts += [f"without {wrapper!r} inside them" for wrapper in self.wrappers]
        return ", ".join(texts)


def under_names_of(base: State, expert: Checkpoint, role: str = "expert") -> Checkpoint:
    """Read an expert under the base's names, where prefixes and wrappers of names are all that differs.

    Nothing is loaded, and files, digests and places in them stay known. Counters that the base does not
    store are left out. A tied tensor that the base stores under several names, the expert under one, gets
    all of them. `Checkpoint.dialect` tells the prefix, and `Checkpoint.outside` the names of whole modules
    that only one side has, a head beside a headless model, where such a prefix was found.

    Args:
        base: The base's tensors.
        expert: The expert, whose own names stand where no other way brings more of them into the base.
        role: Who this is ("expert 'cars'"), for error messages.

    Raises:
        InputError: The names fit the base in several places equally well.
    """
    ours, theirs = shapes_of(base), shapes_of(expert)
    way = find_way(ours, theirs, role)
    names = {new: old for old, new in way.names.items() if new in ours or not new.endswith(_COUNTERS)}
    outside = _outside(way, ours, names) if way.removed or way.added else frozenset[str]()
    aliases = {a: names[n] for a, n in _lacking_aliases(base, expert.renamed(names)).items()}
    return expert.renamed(names | aliases, outside - set(aliases), way.told)


def find_way(ours: Shapes, theirs: Shapes, role: str = "expert") -> Way:
    """Find how one side's names become the other's: the way that brings most of them there.

    Args:
        ours: The base's names, with shapes.
        theirs: The expert's.
        role: Who this is, for error messages.

    Raises:
        InputError: Two ways to different places are equally good.
    """
    best = _scored(Side.of(ours), Side.of(theirs), "", "")
    if best.score == min(len(ours), len(theirs)):
        return best
    for _ in range(3):  # wrappers may be nested
        found = _improved(ours, theirs, best, role)
        if found is best:
            break
        best = found
    return best


def prefix_of(module: Collection[str], names: Collection[str]) -> str:
    """Return what stands before a module's tensor names in a checkpoint.

    Args:
        module: Names of the module's parameters.
        names: The checkpoint's tensor names.
    """
    votes = Counter("" for name in module if name in names)
    places = _endings(dict.fromkeys(names, ()))
    for name in module:
        votes.update(place for place, _ in places.get(name, ()) if place)
    return max(["", *sorted(votes)], key=lambda prefix: votes[prefix])


def shapes_of(state: State) -> dict[str, Shape]:
    """Return the shapes of a state's tensors, without reading them; () for what torch cannot hold."""
    shapes: dict[str, Shape] = {}
    for name in state:
        try:
            shapes[name] = info(state, name).shape
        except InputError:
            shapes[name] = ()
    return shapes


def _improved(ours: Shapes, theirs: Shapes, best: Way, role: str) -> Way:
    """Return a better way than this one, with a prefix or one wrapper more, if there is any."""
    found = best
    for wrappers in ((), *_foreign(ours, theirs)):
        removed = {*best.wrappers, *wrappers}
        base, expert = Side.of(ours, removed), Side.of(theirs, removed)
        if len(base.keys) < len(ours) or len(expert.keys) < len(theirs):
            continue  # two names would become one
        ways = [_scored(base, expert, *pair, tuple(removed)) for pair in _prefixes(base, expert)]
        ways = [way for way in ways if way.is_common]
        top = max(ways, key=lambda way: way.score)
        if top.score > found.score and 2 * top.score >= min(len(ours), len(theirs)):
            _refuse_ambiguous(top, ways, ours, role)
            found = top
    return found


def _refuse_ambiguous(top: Way, ways: Collection[Way], ours: Shapes, role: str) -> None:
    """Refuse names that fit in two places; of which one is meant, nothing tells."""
    places = {way.added: way for way in ways if way.score == top.score and way.removed == top.removed}
    if len(places) > 1:
        name = next(iter(sorted(name for name, new in top.names.items() if new in ours)))
        listed = shortlist(repr(way.names.get(name, place)) for place, way in sorted(places.items()))
        raise InputError(
            f"{role}: its names fit the base in several places: {name} may be {listed}.",
            "Rename its tensors so that they have the base's names, and save it again.",
        )


def _scored(ours: Side, theirs: Side, removed: str, added: str, wrappers: tuple[str, ...] = ()) -> Way:
    """Rename, and count what arrives. What would fall together with another name keeps its own."""
    names: dict[str, str] = {}
    taken: set[str] = set()
    rest: list[tuple[str, str]] = []
    moved = 0
    for key, name in theirs.keys.items():
        new = ours.keys.get(added + key.removeprefix(removed)) if key.startswith(removed) else None
        is_moved, new = new is not None, new or ours.keys.get(key)
        if new is None or new in taken:
            rest.append((key, name))
        else:
            names[name] = new
            taken.add(new)
            moved += is_moved and ours.shapes[new] == theirs.shapes[name]
    for key, name in rest:
        bare = name if added or name != key or not name.startswith(removed) else name.removeprefix(removed)
        names[name] = bare if bare and bare not in taken else name
        taken.add(names[name])
    score = sum(ours.shapes.get(new) == theirs.shapes[name] for name, new in names.items())
    return Way(removed, added, wrappers, names, score, moved)


def _prefixes(ours: Side, theirs: Side) -> list[tuple[str, str]]:
    """List the pairs of prefixes, the expert's and the base's, between which most names agree."""
    endings = _endings({key: ours.shape(key) for key in ours.keys})
    votes: Counter[tuple[str, str]] = Counter()
    for key in theirs.keys:
        for start in _starts(key):
            places = endings.get(key[start:], ())
            fitting = [place for place, shape in places if shape == theirs.shape(key)]
            if fitting and len(fitting) <= _MOST:
                votes.update((key[:start], place) for place in fitting)
            if places:
                break
    return [("", ""), *(pair for pair, _ in votes.most_common(_MOST) if pair != ("", ""))]


def _endings(names: Shapes) -> Mapping[str, list[tuple[str, Shape]]]:
    """Map every dotted ending of names to what stands before it, with the tensors' shapes."""
    endings: dict[str, list[tuple[str, Shape]]] = defaultdict(list)
    for name, shape in names.items():
        for start in _starts(name):
            endings[name[start:]].append((name[:start], shape))
    return endings


def _starts(name: str) -> Iterator[int]:
    """List where a name's endings of at least two parts begin, the name itself first."""
    yield 0
    inner = [i + 1 for i, letter in enumerate(name) if letter == "."]
    yield from inner[:-1]
    if len(inner) == 1 and name.count(".") == 1:
        yield inner[0]  # a name of one part, behind a prefix


def _foreign(ours: Collection[str], theirs: Collection[str]) -> list[tuple[str, ...]]:
    """List what stands inside the names of one side and never in the other side's, frequent ones first.

    Returns:
        Single parts (``_orig_mod``), and several that follow one another (``modules_to_save.default``).
    """
    counts: Counter[tuple[str, ...]] = Counter()
    for names, others in ((ours, theirs), (theirs, ours)):
        usual = {part for name in others for part in name.split(".")[:-1]}
        for name in names:
            runs = groupby(name.split(".")[:-1], usual.__contains__)
            groups = [tuple(run) for is_usual, run in runs if not is_usual]
            counts.update({*groups, *((part,) for group in groups for part in group)})
    return [parts for parts, _ in counts.most_common(_MOST)]


def _without(names: Collection[str], wrappers: Collection[str]) -> dict[str, str]:
    """Map names without some of their parts to the names."""
    if not wrappers:
        return {name: name for name in names}
    return {".".join(part for part in name.split(".") if part not in wrappers): name for name in names}


def _outside(way: Way, ours: Collection[str], names: Collection[str]) -> frozenset[str]:
    """Return the names of whole modules that only one side has, where they are the smaller part."""

    def module(name: str) -> str:
        return name.removeprefix(way.added).partition(".")[0]

    common = [name for name in names if name in ours]
    shared = {module(name) for name in common}
    outside = frozenset[str]()
    for side, other in (
        (ours, names),
        (names, ours),
    ):  # each by itself: an expert may be one tower with a head
        lone = [name for name in side if name not in other and module(name) not in shared]
        if 2 * len(lone) <= len(common):
            outside |= frozenset(lone)
    return outside


def _lacking_aliases(base: State, expert: State) -> dict[str, str]:
    """Find matrices that the expert lacks, and the base holds twice: from the name to the one that it has."""
    aliases: dict[str, str] = {}
    held = [name for name in base if name in expert]
    for alias in (name for name in base if name not in expert):
        found = info(base, alias)
        if len(found.shape) < 2 or not is_mergeable(found.dtype):
            continue
        twins = (n for n in held if info(base, n) == found and is_same(base[n], base[alias]))
        twin = next(twins, None)
        if twin is not None:
            aliases[alias] = twin
    return aliases
