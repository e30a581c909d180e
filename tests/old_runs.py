"""Runs that adamerge wrote before inputs.json knew of configurations and libraries: a tiny world of models.

`old_runs.tar.xz` holds a Hugging Face image tower, two experts, heads, images, and two finished runs,
`static` and `routed`. Their relative paths start in its folder.
"""

import tarfile
from pathlib import Path

ARCHIVE = Path(__file__).with_suffix(".tar.xz")
TASKS = ("one", "two")


def unpack(folder: Path) -> Path:
    """Unpack the runs into a folder, and give the folder that holds them."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    return folder / "old_runs"
