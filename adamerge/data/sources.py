"""Where images come from: a path or a hub id, with configuration and split, and the files behind it."""

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from adamerge.errors import DataError, nearest, shortlist
from adamerge.hub import nowhere, snapshot

Layout = Literal["datasets", "parquet", "tar", "folder"]
IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
_WORD = re.compile(r"[\w.-]+")
_TABLES: tuple[Layout, ...] = ("parquet", "tar")  # and the suffixes of their files
_SPLITS = ("train", "training", "test", "testing", "validation", "valid", "val", "dev")


@dataclass(frozen=True)
class Source:
    """A source that was found on disk.

    Attributes:
        given: What the user wrote.
        root: The file or folder that holds the images.
        layout: "datasets" (written by `save_to_disk`), "parquet", "tar" (of web data sets), or "folder" of
            image files.
        files: What must be read, in the order of the images.
    """

    given: str
    root: Path
    layout: Layout
    files: tuple[Path, ...]


def find_source(given: str, role: str) -> Source:
    """Find the files of ``PATH``, ``owner/name``, each with ``#CONFIG`` and ``@SPLIT`` where needed.

    A path that exists as it was written is that path, whatever characters it has. In a local folder a
    split is the parquet or tar files ``SPLIT-*``, ``SPLIT`` or ``SPLIT/0000`` anywhere below it, the part
    SPLIT of a folder that `DatasetDict.save_to_disk` wrote, or else the sub-folder SPLIT.

    Args:
        given: The source.
        role: Who asks ("task 'cars', test images"), for messages.

    Raises:
        DataError: There is no such file, configuration or split, or several could be meant.
        EnvironmentProblem: A hub id was given and the hub cannot be reached.
    """
    readings = list(_readings(given))
    for name, config, split in readings:
        if Path(name).exists():
            return _Finder(given, role, name).find(Path(name), config, split)
    name, config, split = readings[-1]
    mistyped = nowhere(name)
    if mistyped:
        problem, hint = mistyped
        raise DataError(f"{role}: {problem}", hint or "Give a folder of images or a parquet file.")
    root = snapshot(name, role, _patterns(config, split), "dataset")
    return _Finder(given, role, name).find(root, config, split)


def image_files(root: Path, *, others: bool = False) -> list[Path]:
    """List a folder's files relative to it: those named like images, or the others."""
    return [path for path in _walk(root) if (path.suffix.lower() in IMAGES) != others]


def is_hidden(name: str) -> bool:
    """Tell what no user put there: .ipynb_checkpoints, __MACOSX."""
    return name.startswith((".", "__"))


@dataclass(frozen=True)
class _Finder:
    """Looks for one source; keeps what messages tell."""

    given: str
    role: str
    name: str

    def find(self, root: Path, config: str | None, split: str | None) -> Source:
        if root.is_file():
            if config or split:
                raise self._error(f"{self.name} is one file, which has no configurations and splits")
            layout: Layout = "folder"
            for table in _TABLES:
                layout = table if root.suffix == f".{table}" else layout
            return Source(self.given, root, layout, (root,))
        folder = root / config if config else root
        if not folder.is_dir():
            known = [path.name for path in root.glob("[!._]*") if path.is_dir()]
            raise self._error(f"{self.name} has no folder {config or '.'!r}", nearest(config or "", known))
        saved = self._saved(folder, split)
        if saved:
            return Source(self.given, saved, "datasets", tuple(self._arrow_files(saved)))
        files = _walk(folder)
        for layout in _TABLES:
            tables = self._tables(folder, split, [path for path in files if path.suffix == f".{layout}"])
            if tables:
                return Source(self.given, folder, layout, tuple(folder / path for path in tables))
        return self._folder(folder, split)

    def _saved(self, folder: Path, split: str | None) -> Path | None:
        """Give the folder that `save_to_disk` wrote, if there is one."""
        if (folder / "state.json").exists() and split is None:
            return folder
        if (folder / "dataset_dict.json").exists():
            split = self._choose(split, self._json(folder / "dataset_dict.json")["splits"])
        return folder / split if split and (folder / split / "state.json").exists() else None

    def _arrow_files(self, folder: Path) -> Iterator[Path]:
        for row in self._json(folder / "state.json").get("_data_files", ()):
            yield folder / row["filename"]

    def _tables(self, folder: Path, split: str | None, here: list[Path]) -> list[Path]:
        """Choose among files of tables: those of the split, or all where no splits can be told apart."""
        direct = [path for path in here if len(path.parts) == 1]
        if split is None and direct:
            stems = set(map(_split_of, direct))
            if len(stems) == 1 or stems.isdisjoint(_SPLITS):
                return direct
            here = direct
        if not here or (split is None and image_files(folder)):
            return []  # single tables below a folder of images are not its images
        if split is not None and (folder / split).is_dir() and split not in map(_split_of, here):
            return []  # that folder is the split
        split = self._choose(split, sorted(set(map(_split_of, here))))
        found = [path for path in here if _split_of(path) == split]
        parents = sorted({str(path.parent) for path in found})
        if len(parents) > 1:
            problem = f"{split!r} is in several folders of {self.name}: {shortlist(parents)}"
            raise self._error(problem, f"Name one: {self.name}#{parents[0]}@{split}")
        return found

    def _folder(self, folder: Path, split: str | None) -> Source:
        if split is None:
            return Source(self.given, folder, "folder", tuple(folder / path for path in image_files(folder)))
        root = folder / split
        if not root.is_dir():
            known = sorted(path.name for path in folder.glob("[!._]*"))
            raise self._error(f"{self.name} has no split {split!r}", f"It holds: {shortlist(known)}.")
        return replace(self, given=str(root), name=str(root)).find(root, None, None)

    def _choose(self, split: str | None, known: list[str]) -> str:
        if split is None and len(known) == 1:
            return known[0]
        if split is None:
            hint = f"Name one: {self.given}@{known[0]}"
            raise self._error(f"{self.name} has the splits {shortlist(known)}", hint)
        if split not in known:
            raise self._error(f"{self.name} has no split {split!r}", nearest(split, known))
        return split

    def _json(self, file: Path) -> dict[str, Any]:
        try:
            return json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(f"{self.role}: {file} cannot be read: {error}") from error

    def _error(self, problem: str, hint: str = "") -> DataError:
        return DataError(f"{self.role}: {problem}.", hint)


def _readings(given: str) -> Iterator[tuple[str, str | None, str | None]]:
    """Read a source as path, configuration and split in every way, the most literal first."""
    yield given, None, None
    head, at, split = given.rpartition("@")
    ways = [(given, None), (head, split)] if at and _WORD.fullmatch(split) else [(given, None)]
    for name, part in ways:
        if part:
            yield name, None, part
        root, mark, config = name.rpartition("#")
        if mark and _WORD.fullmatch(config):
            yield root, config, part


def _patterns(config: str | None, split: str | None) -> list[str]:
    """Name the files of a hub repository that a split needs; a star stands for folders too."""
    inside = f"{config}/" if config else ""
    names = [f"{split}-*.parquet", f"{split}.parquet", f"{split}-*.tar", f"{split}/*"] if split else ["*"]
    return [f"{inside}{start}{name}" for name in names for start in ("", "*/")]


def _split_of(path: Path) -> str:
    """Tell a table's split: ``test-00000-of-00002.parquet``, ``test.parquet``, ``test/0000.parquet``."""
    return path.parent.name if path.stem.isdigit() else path.stem.partition("-")[0]


def _walk(root: Path) -> list[Path]:
    """List all files below a folder relative to it, hidden ones left out."""
    walk = os.walk(root, followlinks=True)
    found = sorted(Path(folder, name).relative_to(root) for folder, _, names in walk for name in names)
    return [path for path in found if not any(map(is_hidden, path.parts))]
