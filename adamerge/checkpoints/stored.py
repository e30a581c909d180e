"""Tensors as a pickle describes them: views into storages that are read when they are asked for."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from adamerge.checkpoints.header import DTYPES
from adamerge.checkpoints.unpickling import Interpreter, Name

_STORAGES = {
    "Double": torch.float64, "Float": torch.float32, "Half": torch.float16, "BFloat16": torch.bfloat16,
    "Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8,
    "Byte": torch.uint8, "Bool": torch.bool, "ComplexFloat": torch.complex64, "Untyped": torch.uint8,
}  # fmt: skip
_DTYPES = {str(dtype): dtype for dtype in DTYPES.values()}


class Problem(Exception):  # it becomes an InputError that names the file
    """What is true of the file, and what to do about it."""


@dataclass(frozen=True)
class Storage:
    """A block of values in a file.

    Attributes:
        dtype: What it holds; uint8 where it does not say.
        n_bytes: Its size.
        read: Gives the bytes from one place to another.
    """

    dtype: torch.dtype
    n_bytes: int
    read: Callable[[int, int], bytes]


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that has not been read: a view into a storage, in elements of its dtype."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype

    @property
    def n_bytes(self) -> int:
        """Size of a contiguous copy."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> Tensor:
        """Read a contiguous copy of the values."""
        if 0 in self.shape:
            return torch.empty(self.shape, dtype=self.dtype)
        last = self.offset + sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))
        start, stop = self.offset * self.dtype.itemsize, (last + 1) * self.dtype.itemsize
        if stop > self.storage.n_bytes:
            raise ValueError("a tensor reaches beyond its storage")
        flat = torch.frombuffer(bytearray(self.storage.read(start, stop)), dtype=self.dtype)
        return flat.as_strided(self.shape, self.strides).clone(memory_format=torch.contiguous_format)


def interpret(
    stream: Any,
    storage: Callable[[torch.dtype, str, int, Any], Storage],
    nested: Callable[[bytes], Any],
) -> Any:
    """Read one pickle.

    Args:
        stream: A binary stream.
        storage: Notes a storage: dtype, key, size in bytes, and which part of another one it is, if any.
        nested: Reads a file of torch's old format inside this one, as ``pickle.dump`` keeps each tensor.

    Raises:
        Refused: It names what no model needs.
        Problem: It holds tensors that cannot be read.
        Exception: Anything, where the pickle is damaged.
    """

    def persistent(what: Any) -> Any:
        kind, name, *rest = what
        if kind == "module":  # how old files keep a module's class, with its source
            return name
        key, _device, count, *view = rest
        dtype = _dtype_of(name)
        return storage(dtype, str(key), int(count) * dtype.itemsize, view[0] if view else None)

    builders = _BUILDERS | {"torch.storage._load_from_bytes": cache(nested)}  # what is read once is enough
    return Interpreter(stream, builders, persistent).load()


def _dtype_of(name: Name) -> torch.dtype:
    kind = name.text.rpartition(".")[2].removesuffix("Storage")
    if kind not in _STORAGES:
        raise _unreadable(name.text)
    return _STORAGES[kind]


def _unreadable(kind: str) -> Problem:
    hint = "Load it with torch, make them dense and not quantised, and save that."
    return Problem(f"holds tensors of a kind that safetensors does not have ({kind}).", hint)


def _rebuild(storage: Storage, offset: int, shape: Any, strides: Any, *rest: Any) -> StoredTensor:
    """Note a tensor.

    Further arguments are those of torch's function: whether it needs a gradient, hooks, then in the
    second version {"conj": True} and the like, in the third a dtype.
    """
    numbers = (offset, *shape, *strides)
    if not isinstance(storage, Storage) or not all(isinstance(n, int) and n >= 0 for n in numbers):
        raise ValueError("a tensor that is nowhere")
    flags = rest[2:3]
    if flags and isinstance(flags[0], dict) and flags[0]:
        raise _unreadable(", ".join(map(str, flags[0])))
    dtypes = [_DTYPES[part.text] for part in rest if isinstance(part, Name)]
    return StoredTensor(storage, offset, tuple(shape), tuple(strides), *(dtypes or [storage.dtype]))


def _refuse_kind(name: str) -> Callable[..., Any]:
    def refuse(*_: object) -> Any:
        raise _unreadable(name)

    return refuse


_KINDS = ("qtensor", "sparse_tensor", "sparse_csr_tensor", "nested_tensor", "meta_tensor_no_storage")
_BUILDERS: dict[str, Callable[..., Any]] = {
    **{f"torch._utils._rebuild_{kind}": _refuse_kind(kind) for kind in _KINDS},
    **{f"torch._utils._rebuild_tensor{version}": _rebuild for version in ("", "_v2", "_v3")},
    "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
    "torch._utils._rebuild_parameter_with_state": lambda tensor, *_: tensor,
    "torch._tensor._rebuild_from_type_v2": lambda function, _type, arguments, _state: _BUILDERS[
        function.text
    ](*arguments),
}
