"""Experts whose text towers were fine-tuned, too: their tasks' zero-shot heads are made with these."""

import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

from adamerge.checkpoints import (
    Checkpoint,
    copy_companions,
    is_adapter,
    open_adapter,
    open_checkpoint,
    write_weights,
)
from adamerge.checkpoints.layout import OPEN_CLIP_CONFIG, SINGLE, weight_file
from adamerge.checkpoints.renaming import under_names_of
from adamerge.state import State, info, is_mergeable

_OPEN_CLIP_WEIGHTS = "open_clip_model.safetensors"


def own_text_towers(
    base: State, vision: Collection[str], experts: Mapping[str, Path]
) -> dict[str, tuple[State, list[str]]]:
    """Find the experts whose tensors beside the image tower are others than the base's.

    Where dtypes differ, a difference that rounding explains is none.

    Args:
        base: The base.
        vision: Names of what the image tower reads.
        experts: The experts by task name.

    Returns:
        Of each such expert, its state under the base's names, and the tensors that differ.
    """
    text = [name for name in base if name not in vision and is_mergeable(info(base, name).dtype)]
    towers: dict[str, tuple[State, list[str]]] = {}
    for task, path in experts.items():
        state = _opened(path, f"expert {task!r}", base) if text else {}
        others = [name for name in text if name in state and _differs(base, state, name)]
        if others:
            towers[task] = state, others
    return towers


@contextmanager
def text_tower_folder(base: Path, expert: Path, state: State) -> Iterator[Path]:
    """Give a folder from which a library reads an expert's text tower, while it is needed.

    What an expert does not bring of configuration and tokenizer is the base's.

    Args:
        base: The base's folder.
        expert: The expert.
        state: The expert under the base's names.
    """
    with tempfile.TemporaryDirectory(prefix="adamerge-") as made:
        folder = Path(made)
        copy_companions(base, folder)
        if expert.is_dir() and not is_adapter(expert):
            copy_companions(expert, folder)
        weights = folder / (_OPEN_CLIP_WEIGHTS if (folder / OPEN_CLIP_CONFIG).exists() else SINGLE)
        original = open_checkpoint(base, role="base")
        if isinstance(state, Checkpoint) and {*original} <= {*open_checkpoint(expert)}:
            _link(expert, state, weights)
        else:
            whole = {name: state[name] if name in state else original[name] for name in original}
            write_weights({name: tensor.contiguous() for name, tensor in whole.items()}, weights)
        yield folder


def _opened(path: Path, role: str, base: State) -> State:
    """Open an expert under the base's names."""
    if is_adapter(path):
        return open_adapter(path, base, role=role)
    return under_names_of(base, open_checkpoint(path, role=role), role)


def _differs(base: State, state: State, name: str) -> bool:
    ours, theirs = base[name], state[name]
    if ours.shape != theirs.shape:
        return True
    if ours.dtype == theirs.dtype:
        return not torch.equal(ours, theirs)
    coarsest = max(torch.finfo(ours.dtype).eps, torch.finfo(theirs.dtype).eps)
    return not torch.allclose(ours.float(), theirs.float(), rtol=2 * coarsest, atol=1e-7)


def _link(expert: Path, state: Checkpoint, weights: Path) -> None:
    """Link an expert's files, in one or several shards."""
    if len(state.files) == 1:
        weights.symlink_to(state.files[0].resolve())
        return
    index = weight_file(expert) if expert.is_dir() else None
    for file in (*state.files, *([index] if index else [])):
        (weights.parent / file.name).symlink_to(file.resolve())
