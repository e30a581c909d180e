"""The folder for what can be made again: digests, heads, decoded images."""

import os
import warnings
from pathlib import Path

from adamerge.errors import AdamergeWarning

_NO_ROOM: set[Path] = set()  # folders of which a warning was given


def cache_folder() -> Path:
    """Give ``$ADAMERGE_CACHE``, or ``~/.cache/adamerge``; the folder need not exist yet."""
    return Path(os.environ.get("ADAMERGE_CACHE") or Path("~/.cache/adamerge").expanduser())


def warn_of_damage(file: Path) -> None:
    """Warn that what was kept in a file, if there is one, is damaged and is made again."""
    if file.is_file() or (file.is_symlink() and not file.exists()):
        warnings.warn(f"{file} is damaged: it is made again.", AdamergeWarning, stacklevel=3)


def warn_of_no_room(file: Path, error: Exception) -> None:
    """Warn, once for a folder, that nothing can be kept there for another time."""
    if file.parent not in _NO_ROOM:
        _NO_ROOM.add(file.parent)
        reason = str(error).splitlines()[0]
        told = f"nothing is kept in {file.parent}, which costs time: {reason}"
        warnings.warn(told, AdamergeWarning, stacklevel=3)
