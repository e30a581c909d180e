"""Reads the tensors of pickled checkpoints, whole modules too; nothing of the file is ever executed."""

import contextlib
import io
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adamerge.checkpoints.diagnosis import in_units, looks_pickled, refusal
from adamerge.checkpoints.stored import Problem, Storage, StoredTensor, interpret
from adamerge.checkpoints.unpickling import Refused
from adamerge.errors import InputError

_MAGIC = 0x1950A86A20F9469CFC6C  # what torch.save wrote first, before it wrote zip files
_MOST = 16  # times the file's size: views may overlap, but not without end


@contextlib.contextmanager
def open_pickled(file: Path) -> Iterator[Any]:
    """Read what a pickled checkpoint holds: containers, `StoredTensor` and `Standin`; close it at the end.

    Both formats of ``torch.save``, TorchScript archives and plain ``pickle.dump`` are read. No name of
    the file is imported, and nothing of it is called.

    Raises:
        InputError: The file is damaged, is no pickle, or asks to import or call what no model needs.
    """
    if not file.is_file():
        raise InputError(f"{file} is no file.", "Give one pickled file.")
    with contextlib.ExitStack() as opened:
        stream = opened.enter_context(file.open("rb"))
        head = stream.read(16)
        stream.seek(0)
        with _named_problems(file):
            if head.startswith(b"PK\x03\x04"):
                found = _read_archive(opened.enter_context(zipfile.ZipFile(stream)), file)
            elif looks_pickled(head, file):
                found = _read_stream(stream)
            elif head[8:9] == b"{":
                raise Problem("is no pickle, but looks like safetensors.", "Use it as it is.")
            else:
                raise refusal(file)
        yield found


def read_all(tensors: Mapping[str, StoredTensor], file: Path) -> dict[str, Tensor]:
    """Read tensors of an open file, each into memory of its own.

    Raises:
        InputError: They would take far more memory than the file, or one lies outside its storage.
    """
    with _named_problems(file):
        _require_in_proportion(sum(t.n_bytes for t in tensors.values()), file)
        return {name: tensor.read() for name, tensor in tensors.items()}


@contextlib.contextmanager
def _named_problems(file: Path) -> Iterator[None]:
    """Say of which file something is true; whatever else goes wrong in it is damage."""
    try:
        yield
    except InputError:
        raise
    except Problem as problem:
        told, hint = problem.args
        raise InputError(f"{file} {told}", hint) from problem
    except Refused as error:
        raise InputError(
            f"{file} refused: the file asks to import {error}.",
            "No checkpoint needs that, and nothing of it was run. Ask its author for safetensors.",
        ) from error
    except Exception as error:  # hostile or cut-off pickles raise anything
        told = str(error) or type(error).__name__
        raise InputError(
            f"{file} is cut off, damaged or no checkpoint: {told}.", "Download it again."
        ) from error


def _require_in_proportion(n_bytes: int, file: Path) -> None:
    size = file.stat().st_size
    if n_bytes > _MOST * size + 2**20:
        raise Problem(f"refused: {in_units(size)} would become {in_units(n_bytes)}.", "It is no checkpoint.")


def _read_archive(archive: zipfile.ZipFile, file: Path) -> Any:
    """Read torch's zip format: ``*/data.pkl``, and one entry per storage in ``*/data/``."""
    sizes = {entry.filename: entry.file_size for entry in archive.infolist()}
    _require_in_proportion(sum(sizes.values()), file)
    root = next((name for name in sizes if re.fullmatch(r"([^/]+/)?data\.pkl", name)), None)
    if root is None:
        raise Problem("is an archive without data.pkl, so not of torch.save.", "Unpack it first.")
    folder = root.removesuffix("data.pkl")
    order = archive.read(f"{folder}byteorder") if f"{folder}byteorder" in sizes else b"little"
    _require_little_endian(order == b"little")
    last = {"": b""}  # tensors of one storage follow each other

    def storage(dtype: torch.dtype, key: str, n_bytes: int, _view: Any) -> Storage:
        entry = f"{folder}data/{key}"
        if sizes[entry] != n_bytes:
            raise ValueError(f"{entry} has {sizes[entry]} bytes instead of {n_bytes}")

        def read(start: int, stop: int) -> bytes:
            if entry not in last:
                last.clear()
                last[entry] = archive.read(entry)
            return last[entry][start:stop]

        return Storage(dtype, n_bytes, read)

    with archive.open(root) as stream:
        return interpret(stream, storage, _nested)


def _read_stream(stream: io.BufferedIOBase) -> Any:
    """Read a bare pickle, or torch's old format: four pickles, then the storages one after another."""
    first = _pickle(stream)
    if first != _MAGIC:
        return first
    _pickle(stream)  # the format's version, ever since the same
    _require_little_endian(_pickle(stream).get("little_endian", True))
    sizes: dict[str, int] = {}  # of the storages' elements
    places: dict[str, int] = {}

    def storage(dtype: torch.dtype, key: str, n_bytes: int, view: Any) -> Storage:
        _, first, count = view or ("", 0, n_bytes // dtype.itemsize)
        sizes[key] = dtype.itemsize

        def read(start: int, stop: int) -> bytes:
            stream.seek(places[key] + first * dtype.itemsize + start)
            return stream.read(stop - start)

        return Storage(dtype, count * dtype.itemsize, read)

    found = interpret(stream, storage, _nested)
    for key in _pickle(stream):
        n_bytes = int.from_bytes(stream.read(8), "little") * sizes[key]
        places[key] = stream.tell()
        stream.seek(n_bytes, io.SEEK_CUR)
    needed, size = stream.tell(), stream.seek(0, io.SEEK_END)
    if size < needed:
        raise EOFError(f"cut off at {in_units(size, needed)}")
    return found


def _require_little_endian(little: bool) -> None:
    if not little:
        raise Problem("was written on a big-endian machine.", "Save it again on another one.")


def _pickle(stream: io.BufferedIOBase) -> Any:
    """Read a pickle that has no storages beside it."""

    def refuse(*_: object) -> Storage:
        raise ValueError("storages where there are none")

    return interpret(stream, refuse, _nested)


def _nested(data: bytes) -> Any:
    return _read_stream(io.BytesIO(data))
