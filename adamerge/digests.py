"""SHA-256 of files, remembered from one command to the next: hashing costs more than merging."""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from adamerge.atomic import write_text
from adamerge.cache import cache_folder


def sha256(file: Path, *, fresh: bool = False) -> str:
    """Hash a file's bytes.

    Args:
        file: The file.
        fresh: Read the bytes whatever is remembered.

    Returns:
        64 hexadecimal digits.
    """
    return remembered("sha256", [file], lambda: _digest(file).hex(), fresh=fresh)


def sha256_of_all(files: Sequence[Path]) -> str:
    """Hash the bytes of several files, whose order counts and whose names do not."""
    return remembered("sha256 of all", files, lambda: _digest_of_all(files))


def remembered(what: str, files: Sequence[Path], compute: Callable[[], str], *, fresh: bool = False) -> str:
    """Give a text that is computed from files, once for as long as these stay as they are.

    What was computed before stands while size, inode and times of modification and change of every file
    are the same. It lies in the cache folder; where nothing can be written there, nothing is remembered.

    Args:
        what: Names the computation.
        files: All that it reads.
        compute: Gives the text.
        fresh: Compute whatever is remembered.
    """
    identity, note = _identity(files), _note(what, files)
    if not fresh:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
            row = json.loads(note.read_text(encoding="utf-8"))
            if row["identity"] == identity and row["check"] == _check(identity, row["found"]):
                return row["found"]
    found = compute()
    if identity == _identity(files):  # nobody wrote to them meanwhile
        with contextlib.suppress(Exception):
            row = {"identity": identity, "found": found, "check": _check(identity, found)}
            write_text(note, json.dumps(row))
    return found


def seal(folder: Path, note: Path) -> None:
    """Write the SHA-256 of all of a folder's files into a file beside it."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    rows = {path.relative_to(folder).as_posix(): _digest(path).hex() for path in files}
    write_text(note, json.dumps(rows, indent=1) + "\n")


def is_whole(folder: Path, note: Path) -> bool:
    """Tell whether the files of a folder are those that `seal` saw."""
    try:
        rows = json.loads(note.read_text(encoding="utf-8"))
        return bool(rows) and all(sha256(folder / name) == found for name, found in rows.items())
    except (OSError, ValueError, AttributeError, TypeError, RecursionError):
        return False


def file_digest(file: Path) -> str:
    """Hash a file's bytes, whatever is remembered, and remember nothing."""
    return _digest(file).hex()


def _digest(file: Path) -> bytes:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").digest()


def _digest_of_all(files: Sequence[Path]) -> str:
    return hashlib.sha256(b"".join(map(_digest, files))).hexdigest()


def _check(identity: str, found: str) -> str:
    """Hash a note's parts, so that a damaged one is told from a whole one."""
    return hashlib.sha256(f"{identity}\n{found}".encode()).hexdigest()


def _identity(files: Sequence[Path]) -> str:
    facts = [file.stat() for file in files]
    told = [(s.st_size, s.st_ino, s.st_dev, s.st_mtime_ns, s.st_ctime_ns) for s in facts]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def _note(what: str, files: Sequence[Path]) -> Path:
    names = "\n".join([what, *map(os.path.abspath, files)])
    return cache_folder() / "digests" / hashlib.sha256(os.fsencode(names)).hexdigest()[:32]
