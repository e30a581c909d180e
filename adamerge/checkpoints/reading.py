"""Reads safetensors files, Hugging Face folders (single or sharded) and open_clip folders, lazily."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from adamerge.checkpoints.hub import local_path
from adamerge.errors import InputError, shortlist
from adamerge.state import TensorInfo

INDEX = "model.safetensors.index.json"
SINGLE_FILES = ("model.safetensors", "open_clip_model.safetensors")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


class Checkpoint(Mapping[str, Tensor]):
    """A lazy map from parameter names to tensors, over one or several safetensors files.

    Args:
        root: The file or folder that was opened.
        files: The safetensors files, in the order of their index.
    """

    def __init__(self, root: Path, files: tuple[Path, ...]) -> None:
        self.root, self.files = root, files
        self._handles = {file: _open_file(file) for file in files}
        self.file_of = {n: file for file, h in self._handles.items() for n in h.keys()}  # noqa: SIM118  a handle is no mapping
        if not self.file_of:
            raise InputError(f"checkpoint {root} holds no tensors.", "Was it saved completely?")

    def __getitem__(self, name: str) -> Tensor:
        return self._handles[self.file_of[name]].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.file_of)

    def __len__(self) -> int:
        return len(self.file_of)

    def __contains__(self, name: object) -> bool:
        return name in self.file_of

    def info(self, name: str) -> TensorInfo:
        """Give the shape and dtype of a tensor without reading its values.

        Raises:
            InputError: The file stores a dtype that torch does not have.
        """
        piece = self._handles[self.file_of[name]].get_slice(name)
        dtype = _DTYPES.get(piece.get_dtype())
        if dtype is None:
            raise InputError(
                f"{self.file_of[name]}: tensor {name} has dtype {piece.get_dtype()}.",
                "It looks quantised: dequantise first.",
            )
        return TensorInfo(tuple(piece.get_shape()), dtype)

    def file_digest(self) -> str:
        """Hash the bytes of all files (SHA-256), which stands for this checkpoint in reports."""
        total = hashlib.sha256()
        for file in self.files:
            with file.open("rb") as stream:
                total.update(hashlib.file_digest(stream, "sha256").digest())
        return total.hexdigest()


def open_checkpoint(path: str | Path, *, role: str = "checkpoint") -> Checkpoint:
    """Open a checkpoint without reading its tensors.

    Args:
        path: A ``.safetensors`` file, a folder in Hugging Face or open_clip layout, or a hub id.
        role: Who this is ("base", "expert 'cars'"), for error messages.

    Raises:
        InputError: The path is missing, holds no safetensors, or a file is damaged.
        EnvironmentProblem: A hub id was given and the hub cannot be reached.
    """
    root = local_path(path, role)
    try:
        return Checkpoint(root, _files_of(root))
    except InputError as error:
        raise InputError(f"{role}: {error}") from error


def _files_of(root: Path) -> tuple[Path, ...]:
    if not root.exists():
        raise InputError(f"{root} does not exist.", "Give a safetensors file, a model folder or a hub id.")
    if root.is_file():
        return (root,)
    if (root / INDEX).exists():
        return _shards_of(root)
    for name in SINGLE_FILES:
        if (root / name).exists():
            return (root / name,)
    if (root / "adapter_config.json").exists():
        raise InputError(
            f"{root} is a PEFT adapter.",
            "Merge it into its base first: PeftModel.from_pretrained(...).merge_and_unload().",
        )
    raise InputError(
        f"{root} holds none of {', '.join((INDEX, *SINGLE_FILES))}.",
        f"It holds: {shortlist(sorted(p.name for p in root.iterdir())) or 'nothing'}.",
    )


def _shards_of(root: Path) -> tuple[Path, ...]:
    try:
        weight_map: dict[str, str] = json.loads((root / INDEX).read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{root / INDEX} is damaged or no index.", "Download it again.") from error
    shards = sorted(set(weight_map.values()))
    absent = [shard for shard in shards if not (root / shard).exists()]
    if absent:
        raise InputError(
            f"{root}: {len(absent)} of {len(shards)} shards are missing: {shortlist(absent)}.",
            f"Present: {shortlist(sorted(p.name for p in root.glob('*.safetensors'))) or 'none'}.",
        )
    found = Checkpoint(root, tuple(root / shard for shard in shards))
    lost = [n for n, shard in weight_map.items() if found.file_of.get(n) != root / shard]
    if lost:
        raise InputError(
            f"{root / INDEX} names tensors that its shards lack: {shortlist(lost)}.",
            "The index and the shards come from different saves: download both again.",
        )
    return found.files


def _open_file(file: Path):
    try:
        return safe_open(str(file), framework="pt")
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file} cannot be read: {_diagnose(file)}.") from error


def _diagnose(file: Path) -> str:
    """Tell what a file that safetensors refuses really is, by its first bytes."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        head = stream.read(512)
        if head.startswith(b"version https://git-lfs"):
            return "it is a git-LFS pointer; run `git lfs pull`"
        if head.lstrip().lower().startswith((b"<!doctype", b"<html")):
            return "an HTML page was saved instead of weights; download it again"
        if file.suffix in _PICKLES or head.startswith((b"PK\x03\x04", b"\x80")):
            return "it is a pickle, which can run code; save its state dict as safetensors first"
        return _measure(head, size, stream)


def _measure(head: bytes, size: int, stream: BinaryIO) -> str:
    """Compare the size that the safetensors header promises with the file's."""
    header_size = int.from_bytes(head[:8], "little")
    if size < 8 + header_size:
        return f"it is cut off inside its header (or is no safetensors file): {size} bytes"
    try:
        stream.seek(8)
        header = json.loads(stream.read(header_size))
        end = max(v["data_offsets"][1] for k, v in header.items() if k != "__metadata__")
    except (ValueError, KeyError, TypeError, AttributeError):
        return "its header is damaged; download it again"
    expected = 8 + header_size + end
    if size < expected:
        return f"it is cut off at {size} of {expected} bytes; download it again"
    return f"it holds {size} bytes where its header describes {expected}; download it again"
