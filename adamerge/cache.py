"""The folder for what can be made again: digests, heads, decoded images."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """Give ``$ADAMERGE_CACHE``, or ``~/.cache/adamerge``; the folder need not exist yet."""
    return Path(os.environ.get("ADAMERGE_CACHE") or Path("~/.cache/adamerge").expanduser())
