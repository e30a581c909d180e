"""Decode once: the images of a source as the model sees them, in a memory-mapped file."""

import hashlib
import json
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import UInt8
from safetensors import SafetensorError, safe_open
from torch import Tensor

from adamerge.atomic import atomic_file, require_free_space
from adamerge.cache import cache_folder, warn_of_damage
from adamerge.digests import remembered
from adamerge.errors import AdamergeWarning, EnvironmentProblem

_FORMAT = 2  # one more whenever the same source would give other pixels
_HEADER = 1024  # bytes; written last, when the number of images is known
_PARTS = ("images", "digests", "skipped", "check")  # the last is the SHA-256 of the two before it
Found = Iterable[Tensor | str]  # each row's image, or why there is none


class Decoded(NamedTuple):
    """Images of a source, without labels.

    Attributes:
        images: ``[image, channel, height, width]``.
        digests: SHA-256 of each image.
        skipped: Why a row could not be decoded, by its place in the source.
    """

    images: UInt8[Tensor, "image channel height width"]
    digests: UInt8[Tensor, "image 32"]
    skipped: dict[int, str]


def decode_all(found: Found) -> Decoded:
    """Collect decoded images in memory."""
    images, skipped = [], {}
    for row, value in enumerate(found):
        if isinstance(value, str):
            skipped[row] = value
        else:
            images.append(value)
    return Decoded(torch.stack(images), digests_of(images), skipped)


def decode_once(decode: Callable[[], Found], key: str, n_rows: int) -> Decoded:
    """Map what an earlier call wrote, or decode into a new file of the cache folder and map that.

    The file appears whole or not at all, so several processes may do this at once; a damaged file is
    replaced. Where nothing can be written, the images are kept in memory.

    Args:
        decode: Gives the rows; what it raises leaves no file.
        key: Names all that the images depend on.
        n_rows: How many rows there are, to know whether the disk has room.
    """
    name = hashlib.sha256(f"{_FORMAT}/{key}".encode()).hexdigest()[:32]
    file = cache_folder() / "images" / f"{name}.safetensors"
    found = _read(file)
    if found is not None:
        return found
    try:
        _write(file, decode(), n_rows)
        found = _read(file)
    except (OSError, EnvironmentProblem) as error:
        told = f"decoded images are not kept, which costs time and memory: {str(error).splitlines()[0]}"
        warnings.warn(told, AdamergeWarning, stacklevel=2)
    return found or decode_all(decode())


def digests_of(images: Iterable[Tensor]) -> UInt8[Tensor, "image 32"]:
    """Hash each image."""
    found = b"".join(hashlib.sha256(image.numpy().tobytes()).digest() for image in images)
    return torch.frombuffer(bytearray(found), dtype=torch.uint8).view(-1, 32)


def _write(file: Path, found: Found, n_rows: int) -> None:
    """Write a safetensors file image by image."""
    skipped: dict[int, str] = {}
    digests, shape = [], ()
    with atomic_file(file) as temporary, temporary.open("wb") as stream:
        stream.write(bytes(_HEADER))
        for row, value in enumerate(found):
            if isinstance(value, str):
                skipped[row] = value
                continue
            if not digests:
                require_free_space(file.parent, n_rows * value.numel())
            shape, pixels = tuple(value.shape), value.numpy().tobytes()
            digests.append(hashlib.sha256(pixels).digest())
            stream.write(pixels)
        notes = json.dumps(skipped).encode()
        rows = b"".join(digests)
        stream.write(rows + notes + _check(rows, notes))
        stream.seek(0)
        stream.write(_header([len(digests), *shape], [len(digests), 32], [len(notes)], [32]))


def _header(*shapes: list[int]) -> bytes:
    """Describe the parts as safetensors does, padded to the place that was left for it."""
    header, start = {}, 0
    for name, shape in zip(_PARTS, shapes, strict=True):
        stop = start + int(torch.tensor(shape).prod())
        header[name] = {"dtype": "U8", "shape": shape, "data_offsets": [start, stop]}
        start = stop
    size = _HEADER - 8
    return size.to_bytes(8, "little") + json.dumps(header).encode().ljust(size)


def _read(file: Path) -> Decoded | None:
    """Map a file whose images are what their digests say; None, after a warning where it is damaged."""
    try:
        found = _mapped(file)
    except (OSError, SafetensorError, ValueError, RuntimeError):
        found = None
    if found is None:
        warn_of_damage(file)
    return found


def _mapped(file: Path) -> Decoded | None:
    with safe_open(str(file), framework="pt") as opened:
        images, digests, notes, check = (opened.get_tensor(name) for name in _PARTS)
    text = bytes(notes.tolist())
    if bytes(check.tolist()) != _check(digests.numpy().tobytes(), text) or images.dtype != torch.uint8:
        return None
    state = remembered("images", [file], lambda: str(torch.equal(digests_of(images), digests)))
    skipped = {int(row): why for row, why in json.loads(text).items()}
    return Decoded(images, digests, skipped) if state == "True" else None


def _check(digests: bytes, notes: bytes) -> bytes:
    return hashlib.sha256(digests + notes).digest()
