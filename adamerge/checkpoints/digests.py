"""SHA-256 of weight files, remembered from one command to the next: hashing costs more than merging."""

import contextlib
import hashlib
import json
import os
from pathlib import Path

from adamerge.atomic import write_text


def sha256(file: Path, *, fresh: bool = False) -> str:
    """Hash a file's bytes.

    A digest that was computed before stands while the file's size, inode and times of modification and
    change are the same. Digests lie under ``$ADAMERGE_CACHE``, by default ``~/.cache/adamerge``; where
    nothing can be written there, nothing is remembered.

    Args:
        file: The file.
        fresh: Read the bytes whatever is remembered.

    Returns:
        64 hexadecimal digits.
    """
    identity, note = _identity(file), _note(file)
    if not fresh:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            known = json.loads(note.read_text(encoding="utf-8"))
            if known["identity"] == identity:
                return known["sha256"]
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if identity == _identity(file):  # nobody wrote to it meanwhile
        with contextlib.suppress(Exception):
            write_text(note, json.dumps({"identity": identity, "sha256": digest}))
    return digest


def _identity(file: Path) -> list[int]:
    facts = file.stat()
    return [facts.st_size, facts.st_ino, facts.st_dev, facts.st_mtime_ns, facts.st_ctime_ns]


def _note(file: Path) -> Path:
    default = Path("~/.cache/adamerge").expanduser()
    folder = Path(os.environ.get("ADAMERGE_CACHE", default)) / "digests"
    return folder / hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:32]
