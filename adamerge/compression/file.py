"""An expert in one small file: coded positions and signs of its ternary task vector, and one scale.

The file is safetensors: a tensor of coded bytes, and in the metadata a versioned JSON header.
"""

import math
import shutil
import zlib
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from adamerge.atomic import atomic_file, exclusive, refuse_existing
from adamerge.checkpoints import Checkpoint, open_checkpoint
from adamerge.checkpoints.header import make_header
from adamerge.compression.golomb import decode, encode
from adamerge.compression.header import AGAIN, STREAMS, Header, Stream, has_header, read_header
from adamerge.errors import InputError, shortlist
from adamerge.state import State, TensorInfo, digest, info


class CompressedExpert(Mapping[str, Tensor]):
    """A lazy map from the base's names to the tensors of base + ternary vector, which are never all held.

    Args:
        file: The opened file.
        header: Its header.
        base: The state that the vector is added to; its names stand.
    """

    def __init__(self, file: Checkpoint, header: Header, base: State) -> None:
        self.file, self.header, self.base = file, header, base
        self.root, self.files = file.root, file.files
        ends = accumulate(stream.n_bytes for stream in header.streams.values())
        self._ends = dict(zip(header.streams, ends, strict=True))

    def __getitem__(self, name: str) -> Tensor:
        change = self.delta(name)
        return self.base[name] if change is None else self.base[name].detach().cpu().float() + change

    def __iter__(self) -> Iterator[str]:
        return iter(self.base)

    def __len__(self) -> int:
        return len(self.base)

    def __contains__(self, name: object) -> bool:
        return name in self.base

    def info(self, name: str) -> TensorInfo:
        """Give the shape and dtype of a tensor without reading its values; changed ones are fp32."""
        found = info(self.base, name)
        return found._replace(dtype=torch.float32) if self._stands_for(name) in self.header.streams else found

    def delta(self, name: str) -> Float[Tensor, "..."] | None:
        """Give the ternary vector of a tensor in fp32, or None where it is all 0.

        Raises:
            InputError: The tensor's code is damaged.
        """
        name = self._stands_for(name)
        stream = self.header.streams.get(name)
        if stream is None:
            return None
        end = self._ends[name]
        code = self.file[STREAMS][end - stream.n_bytes : end].numpy()
        try:
            if zlib.crc32(code.data) != stream.crc32:
                raise ValueError("its checksum differs")
            signs = decode(code, math.prod(stream.shape))
        except (ValueError, IndexError) as error:
            raise InputError(f"{self.root}: the code of {name} is damaged ({error}).", AGAIN) from error
        return torch.from_numpy(signs).float().mul_(self.header.scale).reshape(stream.shape)

    def file_digest(self) -> str:
        """Hash the file's bytes (SHA-256), which stands for this expert in reports."""
        return self.file.file_digest()

    def _stands_for(self, name: str) -> str:
        return self.header.aliases.get(name, name)


def save_compressed(
    vector: Iterable[tuple[str, Tensor]],
    out: str | Path,
    *,
    base: State,
    recipe: Mapping[str, Any],
    aliases: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> Header:
    """Write a ternary task vector; memory holds one parameter.

    Args:
        vector: Names of the base and fp32 tensors, whose entries are -s, 0 or s with one s for all.
        out: The file to make.
        base: The base, to whose digest the file is bound.
        recipe: How the vector became ternary, for reports.
        aliases: From further names of the base to names of the vector, whose tensors they share.
        overwrite: Replace ``out`` if it exists; the old one stays until the new one is complete.

    Returns:
        The header written.

    Raises:
        InputError: The vector is not ternary or does not fit the base, or ``out`` exists (without
            ``overwrite``).
        EnvironmentProblem: The disk is full or not writable.
    """
    out, header = Path(out), Header(recipe=recipe, aliases=dict(aliases or {}))
    refuse_existing(out, overwrite=overwrite)
    with exclusive(out), ThreadPoolExecutor(1) as hashing, atomic_file(out) as file:
        base_digest = hashing.submit(digest, base)
        streams = file.with_name(STREAMS)
        with streams.open("wb") as sink:
            for name, tensor in vector:
                sink.write(_add(header, name, tensor, base))
        header.base = base_digest.result()
        infos = {STREAMS: TensorInfo((streams.stat().st_size,), torch.uint8)}
        with streams.open("rb") as source, file.open("wb") as target:
            target.write(make_header(infos, header.metadata())[0])
            shutil.copyfileobj(source, target)
    return header


def open_compressed(
    path: str | Path,
    base: State,
    *,
    role: str = "compressed expert",
    base_digest: str | None = None,
    force: bool = False,
) -> CompressedExpert:
    """Open a compressed expert as a state, without decoding it.

    Args:
        path: The file that `adamerge compress` wrote.
        base: The base that it was made with.
        role: Who this is ("expert 'cars'"), for error messages.
        base_digest: The base's `adamerge.state.digest`, where it is known already; else all is hashed.
        force: Accept a base of another digest, if names and shapes fit.

    Raises:
        InputError: The file is damaged or none of ours, its version is another, or the base is.
    """
    file = open_checkpoint(path, role=role)
    header = read_header(file, role)
    shapes = {name: stream.shape for name, stream in header.streams.items()}
    shapes |= {alias: shapes[name] for alias, name in header.aliases.items() if name in shapes}
    misfits = [n for n, shape in shapes.items() if n not in base or info(base, n).shape != shape]
    if misfits:
        raise InputError(
            f"{role}: {len(misfits)} of {len(shapes)} tensors of {path} are missing in the base, or "
            f"have another shape there: {shortlist(misfits)}.",
            "Give the base that it was compressed with.",
        )
    if not force and (base_digest or digest(base)) != header.base:
        raise InputError(
            f"{role}: {path} was compressed with another base, whose digest is {header.base[:12]}...",
            "Give that base, or pass force=True (--force true) to add the vector to this one.",
        )
    return CompressedExpert(file, header, base)


def is_compressed(path: str | Path) -> bool:
    """Tell whether a local file is a compressed expert, of any version."""
    try:
        return Path(path).is_file() and has_header(open_checkpoint(path))
    except InputError:
        return False


def _add(header: Header, name: str, tensor: Tensor, base: State) -> bytes:
    """Enter a parameter in the header, and give its code."""
    if name not in base or info(base, name).shape != tensor.shape:
        raise InputError(f"the base has no {name} of shape {list(tensor.shape)}.")
    header.entries += tensor.numel()
    magnitude = tensor.abs()
    scale = float(magnitude.max()) if tensor.numel() else 0.0
    if scale == 0:
        return b""
    header.scale = header.scale or scale
    if not ((magnitude == header.scale) | (magnitude == 0)).all():
        raise InputError(
            f"the vector is not ternary: {name} has magnitudes other than {header.scale:.4g}.",
            'Edit it by "compeft".',
        )
    signs = tensor.sign().to(torch.int8).flatten().numpy()
    code = encode(signs)
    header.kept += int(np.count_nonzero(signs))
    dtype = str(info(base, name).dtype).removeprefix("torch.")
    header.streams[name] = Stream(dtype, tuple(tensor.shape), len(code), zlib.crc32(code))
    return code
