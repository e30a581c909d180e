"""The header of a safetensors file: eight bytes of length, then JSON that says where every tensor lies."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from adamerge.state import TensorInfo

# In the order in which safetensors lays tensors out: larger items first.
DTYPES = {
    "U64": torch.uint64, "I64": torch.int64, "F64": torch.float64, "C64": torch.complex64,
    "F32": torch.float32, "U32": torch.uint32, "I32": torch.int32,
    "BF16": torch.bfloat16, "F16": torch.float16, "U16": torch.uint16, "I16": torch.int16,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz, "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_RANKS = {dtype: rank for rank, dtype in enumerate(_NAMES)}


class Entry(NamedTuple):
    """Where a tensor lies: bytes ``start`` to ``stop`` of ``file``, in a dtype as safetensors names it."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def read_header(file: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """Read the entries of a valid safetensors file, and its metadata."""
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        rows = json.loads(stream.read(size))
    metadata = rows.pop("__metadata__", None) or {}
    entries = {}
    for name, row in rows.items():
        start, stop = (8 + size + offset for offset in row["data_offsets"])
        entries[name] = Entry(file, row["dtype"], tuple(row["shape"]), start, stop)
    return entries, metadata


def make_header(
    tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, int]]:
    """Lay tensors out as safetensors does: without holes, larger items first, then by name.

    Returns:
        The bytes that the file begins with, and every tensor's offset in the file.
    """
    rows: dict[str, object] = {"__metadata__": dict(metadata)}
    offsets, end = {}, 0
    for name in sorted(tensors, key=lambda n: (_RANKS[tensors[n].dtype], n)):
        offsets[name] = end
        end += tensors[name].n_bytes
        shape, dtype = tensors[name]
        rows[name] = {"dtype": _NAMES[dtype], "shape": shape, "data_offsets": [offsets[name], end]}
    text = json.dumps(rows, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, {n: 8 + len(text) + o for n, o in offsets.items()}
