"""Tensors that can be made again, in files that know whether they are whole: a damaged one counts as none."""

import contextlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from adamerge.cache import warn_of_damage, warn_of_no_room
from adamerge.checkpoints.writing import save_tensors
from adamerge.digests import remembered
from adamerge.errors import EnvironmentProblem
from adamerge.state import digest

_CHECK = "digest"  # the tensor that holds the SHA-256 of all others


def read_kept(file: Path) -> dict[str, Tensor] | None:
    """Map the tensors of a file that `keep` wrote.

    Returns:
        The tensors; None where there is no such file, and, after a warning, where it is damaged.
    """
    found = None
    with contextlib.suppress(OSError, SafetensorError, ValueError, KeyError, RuntimeError):
        with safe_open(str(file), framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  no mapping
        check = bytes(tensors.pop(_CHECK).tolist()).hex()
        if remembered("kept tensors", [file], lambda: digest(tensors)) == check:
            found = tensors
    if found is None:
        warn_of_damage(file)
    return found


def keep(tensors: Mapping[str, Tensor], file: Path) -> dict[str, Tensor]:
    """Write tensors for another time, whole or not at all.

    Returns:
        The tensors, mapped from the file; as they were, after a warning, where nothing can be written.
    """
    check = torch.tensor([*bytes.fromhex(digest(tensors))], dtype=torch.uint8)
    try:
        save_tensors({**tensors, _CHECK: check}, file)
        return read_kept(file) or dict(tensors)
    except (OSError, EnvironmentProblem) as error:
        warn_of_no_room(file, error)
        return dict(tensors)
