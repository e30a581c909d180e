"""Writes tensors in the layout of the checkpoint they came from, one at a time, whole or not at all."""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

import adamerge
from adamerge.atomic import atomic_file, atomic_folder, exclusive, refuse_existing, require_free_space
from adamerge.checkpoints.companions import copy_companions
from adamerge.checkpoints.header import make_header
from adamerge.checkpoints.reading import Checkpoint, open_checkpoint
from adamerge.errors import InputError, NumericError, shortlist
from adamerge.state import State, TensorInfo, as_bytes, first_nonfinite, info, is_mergeable, is_quantised

_LIKE = "Give as `like` the base that the vectors were opened with."


def save(
    state: State,
    out: str | Path,
    *,
    like: str | Path,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    card: str | Callable[[], str] | None = None,
    companions: Callable[[Path], None] | None = None,
) -> Path:
    """Write a merged state so that the library that loads ``like`` loads it too.

    Args:
        state: All tensors of the model, by the names of ``like``.
        out: The file (where ``like`` is a file) or folder to make.
        like: The checkpoint whose names, shards, dtypes, configuration and tokenizer files are kept.
        dtype: Dtype of floating tensors; default: each tensor's dtype in ``like``.
        overwrite: Replace ``out`` if it exists; the old one stays until the new one is complete.
        card: Text of the folder's README.md (the model card), or what gives it after the last tensor.
        companions: Writes further files into the folder before it becomes visible.

    Returns:
        The path written.

    Raises:
        InputError: Names or shapes differ from ``like``, or ``out`` exists and ``overwrite`` is false.
        NumericError: A value is not finite, or does not fit the output dtype.
        EnvironmentProblem: The disk is full or not writable.
    """
    _require_same_tensors(state, open_checkpoint(like, role="like"))
    options: dict[str, Any] = {"dtype": dtype, "overwrite": overwrite, "card": card, "companions": companions}
    options |= {"metadata": {"adamerge": adamerge.__version__}}  # by which a file is ours to replace
    return save_stream(state.items(), out, like=like, **options)


def save_stream(
    tensors: Iterable[tuple[str, Tensor]],
    out: str | Path,
    *,
    like: str | Path,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    card: str | Callable[[], str] | None = None,
    companions: Callable[[Path], None] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write a model whose tensors come one at a time, in any order; memory holds one of them.

    Args:
        tensors: Every tensor of ``like`` once, with its name.
        out: The file (where ``like`` is a file) or folder to make.
        like: The checkpoint whose names, shards, dtypes, configuration and tokenizer files are kept.
        dtype: Dtype of floating tensors; default: each tensor's dtype in ``like``.
        overwrite: Replace ``out`` if it exists; the old one stays until the new one is complete.
        card: Text of the folder's README.md (the model card), or what gives it after the last tensor.
        companions: Writes further files into the folder before it becomes visible.
        metadata: Added to the metadata that the files of ``like`` carry.

    Returns:
        The path written.

    Raises:
        InputError: A tensor is missing, unknown, repeated or of another shape, or ``out`` exists and
            ``overwrite`` is false.
        NumericError: A value is not finite, or does not fit the output dtype.
        EnvironmentProblem: The disk is full or not writable.
    """
    out, layout = Path(out), open_checkpoint(like, role="like")
    refuse_existing(out, overwrite=overwrite)
    infos = {name: _output_info(layout.info(name), dtype) for name in layout}
    n_bytes = sum(info.n_bytes for info in infos.values())
    require_free_space(out.parent, n_bytes)
    if layout.root.is_file():
        with exclusive(out), atomic_file(out) as file:
            _Shards(layout, infos, {layout.root: file}, metadata).fill(tensors)
        return out
    with atomic_folder(out, overwrite=overwrite) as folder:
        copy_companions(layout.root, folder, dtype)
        files = {file: folder / file.relative_to(layout.root) for file in layout.files}
        for file in files.values():
            file.parent.mkdir(parents=True, exist_ok=True)
        _Shards(layout, infos, files, metadata).fill(tensors)
        _write_index(layout, folder, n_bytes)
        if card is not None:
            text = card if isinstance(card, str) else card()
            (folder / "README.md").write_text(text, encoding="utf-8")
        if companions is not None:
            companions(folder)
    return out


def save_tensors(tensors: Mapping[str, Tensor], out: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write a small safetensors file of our own (coefficients, heads) atomically."""
    with atomic_file(out) as file:
        contiguous = {n: t.detach().cpu().contiguous() for n, t in tensors.items()}
        save_file(contiguous, file, metadata=dict(metadata or {}))


def write_weights(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Write a model's tensors into a new safetensors file, one at a time, each in its own dtype."""
    infos = {name: info(tensors, name) for name in tensors}
    header, offsets = make_header(infos, {"format": "pt"})
    file.write_bytes(header)
    for name, tensor in tensors.items():
        _write_at(file, offsets[name], _cast(name, tensor, tensor.dtype))


class _Shards:
    """Safetensors files whose headers stand, and whose tensors come in any order.

    Args:
        layout: The checkpoint whose names and files are kept.
        infos: Every tensor's shape and output dtype.
        paths: From each of the layout's files to the one to write.
        metadata: Added to the metadata of every file.
    """

    def __init__(
        self,
        layout: Checkpoint,
        infos: Mapping[str, TensorInfo],
        paths: Mapping[Path, Path],
        metadata: Mapping[str, str] | None,
    ) -> None:
        self.root, self.infos = layout.root, infos
        self.places: dict[str, tuple[Path, int]] = {}
        for source, path in paths.items():
            own = {name: infos[name] for name in layout if layout.entry(name).file == source}
            added = {"format": "pt"} | dict(metadata or {})
            header, offsets = make_header(own, layout.metadata[source] | added)
            path.write_bytes(header)
            self.places |= {name: (path, offset) for name, offset in offsets.items()}

    def fill(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Write every tensor to its place."""
        waiting = set(self.places)
        for name, tensor in tensors:
            if name not in waiting:
                what = "was given twice" if name in self.places else f"is not in {self.root}"
                raise InputError(f"tensor {name} {what}; nothing was written.", _LIKE)
            waiting.remove(name)
            found, expected = tuple(tensor.shape), self.infos[name].shape
            if found != expected:
                raise InputError(
                    f"tensor {name} has shape {list(found)}, but {list(expected)} in {self.root}; "
                    "nothing was written.",
                    _LIKE,
                )
            _write_at(*self.places[name], _cast(name, tensor, self.infos[name].dtype))
        if waiting:
            raise InputError(
                f"{len(waiting)} tensors of {self.root} did not come: {shortlist(sorted(waiting))}; "
                "nothing was written.",
                _LIKE,
            )


def _write_at(file: Path, offset: int, tensor: Tensor) -> None:
    with file.open("r+b") as stream:
        stream.seek(offset)
        stream.write(as_bytes(tensor).numpy().data)


def _cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Bring a tensor to its output dtype; never let a value change unseen."""
    if tensor.is_meta:
        raise InputError(f"tensor {name} is on the meta device and has no values.", "Load it first.")
    cast = tensor.detach().to("cpu", dtype).contiguous()
    if not is_mergeable(dtype):
        if tensor.dtype != dtype and not torch.equal(cast.to(tensor.dtype), tensor.cpu()):
            raise InputError(f"tensor {name} ({tensor.dtype}) has values that {dtype} cannot hold.", _LIKE)
    elif first_nonfinite(cast) is not None:
        raise _numeric_error(name, tensor, cast)
    return cast


def _numeric_error(name: str, tensor: Tensor, cast: Tensor) -> NumericError:
    """Tell a value that was never finite from one that the output dtype cannot hold."""
    found = first_nonfinite(tensor)
    overflowed_before = tensor.dtype == cast.dtype == torch.float16 and not tensor.isnan().any()
    if found is not None and not overflowed_before:
        return NumericError(f"the merged {name}{list(found)} is not finite; nothing was written.")
    limits, wider = torch.finfo(cast.dtype), "bfloat16"
    if limits.max >= torch.finfo(torch.bfloat16).max:
        wider = "float32" if cast.dtype == torch.bfloat16 else "float64"
    count, largest = int((~torch.isfinite(cast.float())).sum()), tensor.abs().max().item()
    how = f"reaches {largest:.4g}" if found is None else "overflows"
    return NumericError(
        f"the merged {name} {how}: {count} of its {cast.numel()} values are beyond {limits.max:.6g}, "
        f"the most that {cast.dtype} can hold.",
        f"Nothing was written; use --dtype {wider} (dtype=torch.{wider}).",
    )


def _output_info(stored: TensorInfo, asked: torch.dtype | None) -> TensorInfo:
    """Keep the stored dtype of integers, and of quantised tensors, whose scales stand elsewhere."""
    if asked is None or not is_mergeable(stored.dtype) or is_quantised(stored.dtype):
        return stored
    return TensorInfo(stored.shape, asked)


def _require_same_tensors(state: State, layout: Checkpoint) -> None:
    missing = [name for name in layout if name not in state]
    extra = [name for name in state if name not in layout]
    if missing or extra:
        raise InputError(
            f"the state lacks {len(missing)} tensors of {layout.root} ({shortlist(missing)}) "
            f"and has {len(extra)} others ({shortlist(extra)}).",
            _LIKE,
        )
    misshapen = [name for name in layout if info(state, name).shape != layout.info(name).shape]
    if misshapen:
        raise InputError(
            f"{len(misshapen)} tensors have another shape than in {layout.root}: {shortlist(misshapen)}.",
            _LIKE,
        )


def _write_index(layout: Checkpoint, folder: Path, n_bytes: int) -> None:
    if layout.index is not None:
        index = json.loads(layout.index.read_text(encoding="utf-8"))
        index.setdefault("metadata", {})["total_size"] = n_bytes
        (folder / layout.index.relative_to(layout.root)).write_text(
            json.dumps(index, indent=2), encoding="utf-8"
        )
