"""What lies in a folder of images: each real file once, its classes, and what is left out."""

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from adamerge.data.decoding import image_suffixes

METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")  # as `datasets` names its tables of images
SPLITS = ("train", "training", "test", "testing", "validation", "valid", "val", "dev", "eval")
_JUNK = ("__MACOSX", "__pycache__", "@eaDir")
_TABLES = (".parquet", ".tar")


@dataclass(frozen=True)
class Listing:
    """A folder's files, relative to it and in order.

    Attributes:
        root: The folder.
        images: Files named like images. What several links lead to is one file: the real one where it
            lies in the folder, else the first link.
        others: All other files that are not hidden.
        skipped: Hidden files that are named like images, further links to the same file, and folders that
            cannot be read, with the reason.
        twins: Links that lead from one top-level folder to an image of another, and that image.
    """

    root: Path
    images: tuple[Path, ...]
    others: tuple[Path, ...] = ()
    skipped: tuple[str, ...] = ()
    twins: tuple[tuple[Path, Path], ...] = ()

    @cached_property
    def metadata(self) -> tuple[Path, ...]:
        """Tables that describe images of the folder."""
        return tuple(path for path in self.others if path.name in METADATA) if self.images else ()

    @cached_property
    def tables(self) -> tuple[Path, ...]:
        """Files that hold images themselves."""
        return tuple(p for p in self.others if p.suffix in _TABLES and p not in self.metadata)

    @cached_property
    def folders(self) -> dict[str, list[Path]]:
        """The images of every top-level folder that has some, by its name."""
        found: dict[str, list[Path]] = {}
        for path in self.images:
            if len(path.parts) > 1:
                found.setdefault(path.parts[0], []).append(path)
        return found

    @cached_property
    def splits(self) -> list[str]:
        """Top-level folders that are parts of a data set and no classes.

        Their name is that of a split, and they hold folders of images; or all top-level folders are
        called so. Or the name has that of a split in it (``training_set``), and there are several.
        """
        named = [name for name in self.folders if name.casefold() in SPLITS]
        if named and len(named) == len(self.folders) and all(len(path.parts) > 1 for path in self.images):
            return named
        deep = [name for name, paths in self.folders.items() if any(len(path.parts) > 2 for path in paths)]
        alike = [name for name in deep if not _words(name).isdisjoint(SPLITS)]
        return alike if len(alike) > 1 else [name for name in named if name in deep]

    @cached_property
    def wrapper(self) -> str | None:
        """The one top-level folder that holds the class folders, where there is such a one."""
        if len(self.folders) != 1 or any(len(path.parts) < 3 for path in self.images):
            return None
        return next(iter(self.folders))

    @cached_property
    def fault(self) -> str:
        """Why top-level folders cannot be the classes; empty where they can."""
        names = sorted(self.folders)
        folded = [name.casefold() for name in names]
        below = {_folders_in(self.folders[name]) for name in names}
        if self.twins:
            first, second = self.twins[0]
            return f"{first} and {second} are one file in two classes"
        if len(set(folded)) < len(names):
            alike = [name for name in names if folded.count(name.casefold()) > 1]
            return f"class folders differ in case alone: {', '.join(alike[:3])}"
        if len(names) > 1 and len(below) == 1 and "" not in (parts := next(iter(below))) and len(parts) > 1:
            inner = ", ".join(sorted(parts)[:3])
            return f"each of {', '.join(names[:3])} holds folders of the same names ({inner})"
        return ""


def list_folder(root: Path) -> Listing:
    """List a folder and all below it; links are followed, each folder and file counts once."""
    walk = _Walk(root)
    walk.enter(Path())
    while walk.links:
        links, walk.links = sorted(walk.links), []
        for link in links:
            walk.follow(link)
    return Listing(
        root,
        tuple(sorted(walk.images)),
        tuple(sorted(walk.others)),
        tuple(sorted(walk.skipped)),
        tuple(walk.twins),
    )


def _words(name: str) -> set[str]:
    return set(re.split(r"[^a-z]+", name.casefold()))


def _folders_in(paths: Sequence[Path]) -> frozenset[str]:
    """Return the folders below a top-level one, inside of folders that only hold the next one.

    An empty name stands for images that lie beside them.
    """
    parents = [path.parts[1:-1] for path in paths]
    while all(parents) and len({parts[0] for parts in parents}) == 1:
        parents = [parts[1:] for parts in parents]
    return frozenset(parts[0] if parts else "" for parts in parents)


def is_hidden(name: str) -> bool:
    """Return whether a name is one that no user gave: .ipynb_checkpoints, __MACOSX."""
    return name.startswith(".") or name in _JUNK


def is_image(path: Path) -> bool:
    """Return whether a file is named like an image."""
    return path.suffix.lower() in image_suffixes()


@dataclass
class _Walk:
    """A walk below a folder: real files and folders first, then what links lead to."""

    root: Path
    images: list[Path] = field(default_factory=list)
    others: list[Path] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    twins: list[tuple[Path, Path]] = field(default_factory=list)
    links: list[Path] = field(default_factory=list)
    _places: dict[tuple[int, int], Path] = field(default_factory=dict)

    def enter(self, folder: Path) -> None:
        """Walk a folder; links are kept for later."""
        pending = [folder]
        while pending:
            here = pending.pop()
            try:
                if not self._is_new(here):
                    continue
                entries = sorted(os.scandir(self.root / here), key=lambda entry: entry.name)
            except OSError as error:
                self.skipped.append(f"{here} ({error.strerror})")
                continue
            for entry in entries:
                path = here / entry.name
                if entry.is_symlink():
                    self.links.append(path)
                elif entry.is_dir(follow_symlinks=False):
                    pending.append(path)
                else:
                    self._add(path)

    def follow(self, link: Path) -> None:
        """Walk the folder, or add the file, that a link leads to; one that leads nowhere stays a file."""
        if os.path.isdir(self.root / link) and not any(map(is_hidden, link.parts)):
            self.enter(link)
        else:
            self._add(link)

    def _add(self, path: Path) -> None:
        is_seen = not any(map(is_hidden, path.parts))
        if not is_image(path):
            self.others += [path] if is_seen else []
        elif not is_seen:
            self.skipped += [] if path.name.startswith("._") else [f"{path} (hidden)"]
        elif self._is_new(path, across=True):
            self.images.append(path)

    def _is_new(self, path: Path, *, across: bool = False) -> bool:
        """Note where a file or folder lies on the disk; what was seen there before is told, not listed."""
        try:
            found = os.stat(self.root / path)
        except OSError:
            return True  # a link to nowhere is a problem of that image
        before = self._places.setdefault((found.st_dev, found.st_ino), path)
        if before == path:
            return True
        self.skipped.append(f"{path} (the same as {before})")
        if before.parts[:1] != path.parts[:1] and (across or before.parts):
            self.twins.append((before, path))
        return False


def named_splits(names: Iterable[str], wanted: str) -> Iterator[str]:
    """Return the names that a split may be written for: itself, or the one that differs in case alone."""
    names = list(names)
    yield from [wanted] if wanted in names else [n for n in names if n.casefold() == wanted.casefold()]
