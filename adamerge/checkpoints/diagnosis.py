"""Tells what a file that safetensors refuses really is; nothing of it is ever executed."""

import contextlib
import io
import json
import pickletools
import re
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from adamerge.checkpoints.layout import conversion
from adamerge.checkpoints.unpickling import is_refused
from adamerge.errors import InputError, shortlist

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_MOST = 2**26  # bytes of a pickle that are looked at: in torch's files, values stand elsewhere
_HEADER = b"\0\0\0\0{"  # a length below 4 GB, then JSON: bytes 4 to 8 of a safetensors file
_ZIP = b"PK\x03\x04"
_OTHERS = {b"GGUF": "GGUF, llama.cpp's format", b"\x89HDF": "HDF5, as Keras writes it"}
_UNITS = {"GB": 10**9, "MB": 10**6, "kB": 10**3, "bytes": 1}
# What a plain state dict imports. Anything else may run code, or needs the code that wrote it.
_PLAIN = re.compile(
    r"collections\.OrderedDict|_codecs\.encode"
    r"|torch\.(\w+Storage|Size|device|dtype|u?int\d+|b?float\d+\w*|complex\d+|bool)"
    r"|torch\._utils\._rebuild_\w+|torch\._tensor\._rebuild_from_type_v2|torch\.storage\.\w+"
    r"|torch\.nn\.parameter\.Parameter|torch\.serialization\._get_layout"
    r"|numpy(\.\w+)*\.(dtype|ndarray|_reconstruct|scalar)"
    r"|(builtins|__builtin__)\.(set|frozenset|dict|list|tuple|object|bytearray|slice|complex|range)"
)
_FAMILIAR = re.compile(r"(src|open_clip|clip|torch|torchvision|timm|transformers|numpy|collections)\.")
_RESEARCH = re.compile(r"src\..*|.*\bVisualTransformer")  # task_vectors and what descends from it


def refusal(file: Path) -> InputError:
    """Give the error that says why a file cannot be read, judging by its first bytes and its size."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        head = stream.read(512)
        if head.startswith(b"version https://git-lfs"):
            stated = re.search(rb"\nsize (\d+)", head)
            of = f" ({in_units(size)}) to {in_units(int(stated[1]))}" if stated else ""
            problem, hint = f"it is a git-LFS pointer{of}", "Run `git lfs pull`."
        elif head.lstrip().lower().startswith((b"<!doctype", b"<html")):
            problem = f"an HTML page ({in_units(size)}) was saved instead of weights"
            hint = "Download it again."
        elif head.startswith(_ZIP):
            return _refused_archive(file)
        elif head[:4] in _OTHERS:
            problem, hint = f"it is {_OTHERS[head[:4]]}", "Give the same model as safetensors."
        elif looks_pickled(head, file):
            return _refused_pickle(file, imports_of(head + stream.read(_MOST)))
        else:
            is_usual = file.suffix in (".safetensors", *PICKLES)
            problem = _measured(head, size, stream)
            hint = "Download it again." if is_usual else "Give the model as safetensors."
    return InputError(f"{file} cannot be read: {problem}.", hint)


def looks_pickled(head: bytes, file: Path) -> bool:
    """Tell a pickle by its first bytes; those of old protocols are letters."""
    old = file.suffix in PICKLES and head[:1] in (b"(", b"c", b"]", b"}")
    return old or (head.startswith(b"\x80") and head[4:9] != _HEADER)


def is_pickled(file: Path) -> bool:
    """Return whether a file is a pickle or an archive of one, whatever its name."""
    if not file.is_file():
        return False
    with file.open("rb") as stream:
        head = stream.read(512)
    return head.startswith(_ZIP) or looks_pickled(head, file)


def in_units(*sizes: int) -> str:
    """Write sizes for people, in the largest one's unit: ``1.2 of 3.4 GB``."""
    unit = next(unit for unit, n in _UNITS.items() if max(sizes) >= n or n == 1)
    shown = [f"{size / _UNITS[unit]:.1f}" for size in sizes]
    if unit == "bytes" or len(set(shown)) < len(set(sizes)):
        unit, shown = "bytes", [str(size) for size in sizes]
    return f"{' of '.join(shown)} {unit}"


def imports_of(data: bytes) -> list[str]:
    """List the names that pickled data asks to import, without loading it."""
    stream = io.BytesIO(data)
    found: dict[str, None] = {}
    with contextlib.suppress(ValueError):  # cut off, or noise: what was found until then counts
        for _ in range(5):  # an old torch file is five pickles, then bare values
            for name in _imports_of_one(stream):
                found[name] = None
    return list(found)


def _imports_of_one(stream: io.BytesIO) -> Iterator[str]:
    """Follow the strings of a pickle as far as its imports need them."""
    strings: list[str] = []
    memo: dict[int, str | None] = {}
    top: str | None = None  # the stack's top, where it is a string
    for opcode, argument, _ in pickletools.genops(stream):
        if opcode.name in ("GLOBAL", "INST"):
            yield str(argument).replace(" ", ".", 1)
        elif opcode.name == "STACK_GLOBAL":
            yield ".".join(strings[-2:])
        elif opcode.name == "MEMOIZE" or "PUT" in opcode.name:
            memo[len(memo) if argument is None else argument] = top
            continue
        elif "GET" in opcode.name:
            top = memo.get(int(argument or 0))
        else:
            is_string = "UNICODE" in opcode.name or opcode.name.endswith("STRING")
            top = str(argument) if is_string else None
        if top is not None:
            strings.append(top)


def _refused_archive(file: Path) -> InputError:
    """Look into a zip file, as torch writes them."""
    try:
        with zipfile.ZipFile(file) as archive:
            names = [name for name in archive.namelist() if name.endswith(".pkl")]
            imports = [i for name in names for i in imports_of(archive.open(name).read(_MOST))]
    except (zipfile.BadZipFile, zlib.error, OSError, EOFError, RuntimeError) as error:
        problem = f"it is a damaged or cut-off archive ({error})"
        return InputError(f"{file} cannot be read: {problem}.", "Download it again.")
    if any(Path(name).name == "constants.pkl" for name in names):
        problem = "it is a TorchScript archive, which is code"
        return InputError(f"{file} cannot be read: {problem}.", conversion(file))
    if not names:
        problem = "it is an archive of other files than torch.save's"
        return InputError(f"{file} cannot be read: {problem}.", "Unpack it, and give what is inside.")
    return _refused_pickle(file, imports)


def _refused_pickle(file: Path, imports: list[str]) -> InputError:
    """Name what a pickle would import; what is outside the usual libraries first."""
    foreign = [name for name in imports if not _PLAIN.fullmatch(name)]
    if not foreign:
        problem = "it is a pickle, which can run code"
        return InputError(f"{file} cannot be read: {problem}.", conversion(file))
    foreign.sort(key=lambda name: (not is_refused(name), _FAMILIAR.match(name) is not None))
    hint = f"It is a whole model, or more. {conversion(file)}"
    if any(_RESEARCH.fullmatch(name) for name in foreign):
        hint = f"It is a whole model of task-vector research code. {conversion(file)}"
    if is_refused(foreign[0]):
        hint = "Loading it would run that code. Ask its author for safetensors."
    return InputError(f"{file} refused: the file asks to import {shortlist(foreign)}.", hint)


def _measured(head: bytes, size: int, stream: BinaryIO) -> str:
    """Compare the size that the safetensors header promises with the file's."""
    header_size = int.from_bytes(head[:8], "little")
    if size < 8 + header_size:
        return f"it is cut off inside its header (or is no safetensors file): {in_units(size)}"
    try:
        stream.seek(8)
        header = json.loads(stream.read(header_size))
        end = max(v["data_offsets"][1] for k, v in header.items() if k != "__metadata__")
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        return "its header is damaged"
    expected = 8 + header_size + end
    if size < expected:
        return f"it is cut off at {in_units(size, expected)}"
    return f"it holds {size} bytes where its header describes {expected}"
