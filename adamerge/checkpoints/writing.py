"""Writes a State in the layout of the checkpoint it came from, whole or not at all."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from adamerge.atomic import atomic_file, atomic_folder, refuse_existing, require_free_space
from adamerge.checkpoints.reading import INDEX, Checkpoint, open_checkpoint
from adamerge.errors import InputError, NumericError, shortlist
from adamerge.state import State, first_nonfinite, is_mergeable


def save(
    state: State,
    out: str | Path,
    *,
    like: str | Path,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    card: str | None = None,
) -> Path:
    """Write a merged state so that the library that loads ``like`` loads it too.

    Args:
        state: All tensors of the model, by the names of ``like``.
        out: The file (where ``like`` is a file) or folder to make.
        like: The checkpoint whose names, shards, dtypes, configuration and tokenizer files are kept.
        dtype: Dtype of floating tensors; default: each tensor's dtype in ``like``.
        overwrite: Replace ``out`` if it exists; the old one stays until the new one is complete.
        card: Text of the folder's README.md (the model card).

    Returns:
        The path written.

    Raises:
        InputError: Names or shapes differ from ``like``, or ``out`` exists and ``overwrite`` is false.
        NumericError: A value is not finite, or does not fit the output dtype.
        EnvironmentProblem: The disk is full or not writable.
    """
    out, layout = Path(out), open_checkpoint(like, role="like")
    refuse_existing(out, overwrite=overwrite)
    _require_same_tensors(state, layout)
    dtypes = {name: _output_dtype(layout.info(name).dtype, dtype) for name in layout}
    n_bytes = sum(state[name].numel() * dtypes[name].itemsize for name in layout)
    require_free_space(out.parent, n_bytes)
    if layout.root.is_file():
        with atomic_file(out) as file:
            _write_shard(state, file, tuple(layout), dtypes)
        return out
    with atomic_folder(out, overwrite=overwrite) as folder:
        _copy_companions(layout, folder)
        for shard in layout.files:
            names = tuple(n for n, file in layout.file_of.items() if file == shard)
            _write_shard(state, folder / shard.name, names, dtypes)
        _write_index(layout, folder, n_bytes)
        if card is not None:
            (folder / "README.md").write_text(card, encoding="utf-8")
    return out


def save_tensors(tensors: Mapping[str, Tensor], out: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write a small safetensors file of our own (coefficients, heads) atomically."""
    with atomic_file(out) as file:
        contiguous = {n: t.detach().cpu().contiguous() for n, t in tensors.items()}
        save_file(contiguous, file, metadata=dict(metadata or {}))


def _write_shard(state: State, file: Path, names: tuple[str, ...], dtypes: Mapping[str, torch.dtype]) -> None:
    tensors: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name in names:
        tensor = _cast(name, state[name], dtypes[name])
        storage = tensor.untyped_storage().data_ptr()
        tensors[name] = tensor.clone() if storage in storages else tensor  # tied: `like` has both names
        storages.add(storage)
    save_file(tensors, file, metadata={"format": "pt"})


def _cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Bring a tensor to its output dtype; never let a finite value overflow unseen."""
    found = first_nonfinite(tensor)
    if found is not None:
        raise NumericError(f"the merged {name}{list(found)} is not finite; nothing was written.")
    cast = tensor.detach().to("cpu", dtype).contiguous()
    if first_nonfinite(cast) is not None:
        largest = tensor.abs().max().item()
        raise NumericError(
            f"the merged {name} reaches {largest:.4g}, which {dtype} cannot hold.",
            "Pass dtype=torch.bfloat16 or torch.float32; nothing was written.",
        )
    return cast


def _output_dtype(stored: torch.dtype, asked: torch.dtype | None) -> torch.dtype:
    return asked if asked is not None and is_mergeable(stored) else stored


def _require_same_tensors(state: State, layout: Checkpoint) -> None:
    missing = [name for name in layout if name not in state]
    extra = [name for name in state if name not in layout]
    if missing or extra:
        raise InputError(
            f"the state lacks {len(missing)} tensors of {layout.root} ({shortlist(missing)}) "
            f"and has {len(extra)} others ({shortlist(extra)}).",
            "Give as `like` the base that the vectors were opened with.",
        )
    misshapen = [name for name in layout if tuple(state[name].shape) != layout.info(name).shape]
    if misshapen:
        raise InputError(
            f"{len(misshapen)} tensors have another shape than in {layout.root}: {shortlist(misshapen)}.",
            "Give as `like` the base that the vectors were opened with.",
        )


def _copy_companions(layout: Checkpoint, folder: Path) -> None:
    """Copy what is not weights: configuration, tokenizer, processor."""
    for path in sorted(layout.root.iterdir()):
        is_weights = path.suffix in (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack")
        if path.is_file() and not is_weights and path.name not in (INDEX, "README.md"):
            shutil.copyfile(path, folder / path.name)


def _write_index(layout: Checkpoint, folder: Path, n_bytes: int) -> None:
    if (layout.root / INDEX).exists():
        index = json.loads((layout.root / INDEX).read_text())
        index.setdefault("metadata", {})["total_size"] = n_bytes
        (folder / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")
