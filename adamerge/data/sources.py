"""Where images come from: a path or a hub id, with configuration and split, and the files behind it."""

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from adamerge.data.decoding import require_regular
from adamerge.data.folders import SPLITS, Listing, is_image, list_folder, named_splits
from adamerge.data.metadata import read_metadata, repeated_rows
from adamerge.data.tables import IN_FOLDERS, SUFFIXES
from adamerge.errors import DataError, nearest, shortlist
from adamerge.hub import nowhere, snapshot

Layout = Literal["datasets", "parquet", "tar", "text", "folder"]
_WORD = re.compile(r"[\w.-]+")
_TABLES: tuple[Layout, ...] = ("parquet", "tar")  # and the suffixes of their files


@dataclass(frozen=True)
class Source:
    """A source that was found on disk.

    Attributes:
        given: What the user wrote.
        root: The file or folder that holds the images.
        layout: "datasets" (written by `save_to_disk`), "parquet", "tar" (of web data sets), "text" (.txt,
            .csv, .tsv, .jsonl, .json), or "folder" of image files.
        files: What must be read, in the order of the images.
        columns: What a table beside a folder's images (metadata.csv) says of each.
        left_out: Files below the source that are not read, with the reason where the name does not tell.
        fault: Why a folder's sub-folders cannot be the classes; empty where they can.
    """

    given: str
    root: Path
    layout: Layout
    files: tuple[Path, ...]
    columns: Mapping[str, list[Any]] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    fault: str = ""


def find_source(given: str, role: str) -> Source:
    """Find the files of ``PATH``, ``owner/name``, each with ``#CONFIG`` and ``@SPLIT`` where needed.

    A path that exists as it was written is that path, whatever characters it has. In a local folder a
    split is the parquet or tar files ``SPLIT-*``, ``SPLIT`` or ``SPLIT/0000`` anywhere below it, the part
    SPLIT of a folder that `DatasetDict.save_to_disk` wrote, or else the sub-folder SPLIT. In a folder of
    images, sub-folders named like splits are no classes: one must be named. A folder that does nothing but
    hold the folder of the classes, as unpacked archives have it, is passed through. ``metadata.csv``,
    ``.jsonl`` or ``.parquet`` beside the images says what they are, as `datasets` reads it. Texts are also
    read from .txt (one a line), .csv, .tsv, .jsonl and .json files, and from folders of the three in the
    middle.

    Args:
        given: The source.
        role: Who asks ("task 'cars', test images"), for messages.

    Raises:
        DataError: There is no such file, configuration or split, or several could be meant.
        EnvironmentProblem: A hub id was given and the hub cannot be reached.
    """
    readings = list(_readings(given))
    for name, config, split in readings:
        if os.path.exists(Path(name)):
            return _Finder(given, role, name).find(Path(name), config, split)
    name, config, split = readings[-1]
    mistyped = nowhere(name)
    if mistyped:
        problem, hint = mistyped
        raise DataError(f"{role}: {problem}", hint or "Give a folder of images or a file of texts.")
    root = snapshot(name, role, _patterns(config, split), "dataset")
    return _Finder(given, role, name).find(root, config, split)


@dataclass(frozen=True)
class _Finder:
    """Looks for one source; keeps what messages tell."""

    given: str
    role: str
    name: str

    def find(self, root: Path, config: str | None, split: str | None) -> Source:
        if root.is_file():
            return self._file(root, config, split)
        if not root.is_dir():
            raise self._error(f"{self.name} is neither a file nor a folder")
        folder = root / config if config else root
        if not folder.is_dir():
            known = [path.name for path in root.glob("[!._]*") if path.is_dir()]
            raise self._error(f"{self.name} has no folder {config or '.'!r}", nearest(config or "", known))
        saved = self._saved(folder, split)
        if saved:
            return Source(self.given, saved, "datasets", tuple(self._arrow_files(saved)))
        listing = list_folder(folder)
        return self._tables_in(listing, split) or self._folder(listing, split)

    def _file(self, root: Path, config: str | None, split: str | None) -> Source:
        """Read one file by its suffix."""
        if config or split:
            raise self._error(f"{self.name} is one file, which has no configurations and splits")
        if is_image(root):
            return Source(self.given, root.parent, "folder", (root,))
        layout: Layout = "folder"
        for table in _TABLES:
            layout = table if root.suffix == f".{table}" else layout
        layout = "text" if root.suffix.lower() in SUFFIXES else layout
        return Source(self.given, root, layout, (root,))

    def _tables_in(self, listing: Listing, split: str | None) -> Source | None:
        """Read a folder's tables, those of images first; None where it has none of the split."""
        folder = listing.root
        for layout in _TABLES:
            here = [path for path in listing.tables if path.suffix == f".{layout}"]
            tables = self._tables(folder, split, listing, here)
            if tables:
                left = tuple(map(str, listing.images))
                files = tuple(folder / path for path in tables)
                return Source(self.given, folder, layout, files, left_out=left)
        texts = () if listing.images else IN_FOLDERS
        for suffix in texts:
            here = [path for path in listing.others if path.suffix.lower() == suffix]
            tables = self._tables(folder, split, listing, here)
            if tables:
                left = tuple(str(path) for path in listing.others if path not in here)
                files = tuple(folder / path for path in tables)
                return Source(self.given, folder, "text", files, left_out=left)
        return None

    def _saved(self, folder: Path, split: str | None) -> Path | None:
        """Give the folder that `save_to_disk` wrote, if there is one."""
        if (folder / "state.json").exists() and split is None:
            return folder
        if (folder / "dataset_dict.json").exists():
            splits = self._json(folder / "dataset_dict.json").get("splits")
            if not isinstance(splits, list) or not splits:
                raise self._error(f"{folder / 'dataset_dict.json'} names no splits", "Save it again.")
            split = self._choose(split, list(map(str, splits)))
        return folder / split if split and (folder / split / "state.json").exists() else None

    def _arrow_files(self, folder: Path) -> Iterator[Path]:
        rows = self._json(folder / "state.json").get("_data_files") or []
        for row in rows if isinstance(rows, list) else [None]:
            if not isinstance(row, dict) or not isinstance(row.get("filename"), str):
                raise self._error(f"{folder / 'state.json'} names no data files", "Save it again.")
            yield folder / row["filename"]

    def _tables(self, folder: Path, split: str | None, listing: Listing, here: list[Path]) -> list[Path]:
        """Choose among files of tables: those of the split, or all where no splits can be told apart."""
        direct = [path for path in here if len(path.parts) == 1]
        if split is None and direct:
            stems = set(map(_split_of, direct))
            if len(stems) == 1 or stems.isdisjoint(SPLITS):
                return direct
            here = direct
        if not here or (split is None and listing.images):
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

    def _folder(self, listing: Listing, split: str | None) -> Source:
        """Read a folder of images, or the part of it that holds them."""
        root = listing.root
        if split is not None:
            names = [path.name for path in root.iterdir() if path.is_dir()]
            parts = list(named_splits(names, split))
            if not parts and listing.wrapper:
                return self._inside(listing, listing.wrapper, split)
            if len(parts) != 1:
                known = sorted(path.name for path in root.glob("[!._]*"))
                raise self._error(f"{self.name} has no split {split!r}", f"It holds: {shortlist(known)}.")
            return self._part(listing, parts[0], beside=False)
        if listing.metadata and not listing.splits:
            return self._described(listing)
        if listing.splits:
            inside = len(listing.splits) == len(listing.folders)
            return self._part(listing, self._choose(None, listing.splits, alone=inside))
        if listing.wrapper:
            return self._inside(listing, listing.wrapper, None)
        files = tuple(root / path for path in listing.images)
        left = (*map(str, listing.others), *listing.skipped)
        return Source(self.given, root, "folder", files, left_out=left, fault=listing.fault)

    def _part(self, listing: Listing, name: str, *, beside: bool = True) -> Source:
        """Read the sub-folder of a split; a table of metadata may lie beside the splits."""
        tables = [path for path in listing.metadata if path.parts[0] == name or len(path.parts) == 1]
        if tables and all(len(path.parts) == 1 for path in tables):
            return self._described(listing, name)
        return self._inside(listing if beside else replace(listing, others=(), skipped=()), name, None)

    def _inside(self, listing: Listing, name: str, split: str | None) -> Source:
        """Read a sub-folder; what lies beside it is left out."""
        root = listing.root / name
        inner = root if split is None else f"{root}@{split}"
        found = replace(self, given=str(inner), name=str(root)).find(root, None, split)
        beside = [path for path in listing.others if path.parts[0] != name]
        return replace(found, left_out=(*map(str, beside), *found.left_out))

    def _described(self, listing: Listing, part: str = "") -> Source:
        """Read the images that a table of metadata names: all of them, or those of a part."""
        tables = [path for path in listing.metadata if not part or len(path.parts) == 1]
        if len(tables) > 1:
            told = f"{self.name} holds several tables of metadata: {shortlist(tables)}"
            raise self._error(told, "Name the folder of one of them, or remove the others.")
        root, table = listing.root, listing.root / tables[0]
        names, columns = read_metadata(table, self.role)
        repeated = dict(repeated_rows(table, self.role, names, columns))
        inside = [row for row, name in enumerate(names) if not part or Path(name).parts[0] == part]
        kept = [row for row in inside if row not in repeated]
        files = tuple(table.parent / names[row] for row in kept)
        columns = {name: [values[row] for row in kept] for name, values in columns.items()}
        left = [str(path) for path in listing.others if path not in tables and not part]
        left += [f"{names[row]} (the same as {names[first]})" for row, first in repeated.items()]
        seen = {table.parent / name for name in names}
        images = [path for path in listing.images if not part or path.parts[0] == part]
        left += [f"{path} (not in {table.name})" for path in images if root / path not in seen]
        skipped = [] if part else [told for told in listing.skipped if told not in left]
        return Source(self.given, root, "folder", files, columns, (*left, *skipped))

    def _choose(self, split: str | None, known: list[str], *, alone: bool = True) -> str:
        if split is None and len(known) == 1 and alone:
            return known[0]
        if split is None:
            hint = f"Name one: {self.given}@{known[0]}"
            raise self._error(f"{self.name} has the splits {shortlist(known)}", hint)
        if split not in known:
            raise self._error(f"{self.name} has no split {split!r}", nearest(split, known))
        return split

    def _json(self, file: Path) -> dict[str, Any]:
        try:
            require_regular(file)
            found = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise DataError(f"{self.role}: {file} cannot be read: {error}") from error
        if not isinstance(found, dict):
            raise DataError(f"{self.role}: {file} cannot be read: it holds no JSON object.")
        return found

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
