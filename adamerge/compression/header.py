"""What a compressed expert tells of itself, in its metadata: versioned, and guarded by a checksum."""

import json
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from adamerge.checkpoints import Checkpoint
from adamerge.errors import InputError

FORMAT, VERSION = "adamerge compressed expert", "1"
STREAMS = "streams"  # the tensor of coded bytes
AGAIN = "Download or compress it again."


class Stream(NamedTuple):
    """Where a parameter's code is found: its dtype and shape in the base, its length and its checksum."""

    dtype: str
    shape: tuple[int, ...]
    n_bytes: int
    crc32: int


@dataclass
class Header:
    """What a file tells of itself.

    Attributes:
        base: Digest of the base (`adamerge.state.digest`).
        recipe: How the vector became ternary: options of the compeft edit.
        scale: Magnitude of all entries that are not 0.
        entries: Entries of the whole task vector.
        kept: Those that are not 0.
        aliases: Further names of tensors that several names share, such as tied embeddings.
        streams: The coded parameters, in the order of their bytes; the others are the base's.
    """

    base: str = ""
    recipe: Mapping[str, Any] = field(default_factory=dict)
    scale: float = 0.0
    entries: int = 0
    kept: int = 0
    aliases: Mapping[str, str] = field(default_factory=dict)
    streams: dict[str, Stream] = field(default_factory=dict)

    def metadata(self) -> dict[str, str]:
        """Give what the file's safetensors header carries."""
        text = json.dumps(asdict(self))
        return {"format": FORMAT, "version": VERSION, "header": text, "crc32": _checksum(text)}


def has_header(file: Checkpoint) -> bool:
    """Tell whether a file is a compressed expert, of any version."""
    return file.metadata[file.files[0]].get("format") == FORMAT


def read_header(file: Checkpoint, role: str) -> Header:
    """Read the header of a file that may be anybody's.

    Raises:
        InputError: The file is none of ours, of another version or damaged.
    """
    metadata = file.metadata[file.files[0]]
    if not has_header(file):
        raise InputError(f"{role}: {file.root} is no compressed expert.", "adamerge compress makes them.")
    if metadata.get("version") != VERSION:
        raise InputError(
            f"{role}: {file.root} has format version {metadata.get('version')!r}; {VERSION!r} is known here.",
            "Use the version of adamerge that wrote it, or a later one.",
        )
    try:
        if _checksum(metadata["header"]) != metadata["crc32"]:
            raise ValueError("its checksum differs")
        fields = json.loads(metadata["header"])
        rows = fields["streams"].items()
        streams = {n: Stream(dtype, tuple(shape), *facts) for n, (dtype, shape, *facts) in rows}
        if sum(stream.n_bytes for stream in streams.values()) == file.info(STREAMS).shape[0]:
            return Header(**fields | {"streams": streams})
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{role}: the header of {file.root} is damaged.", AGAIN) from error
    raise InputError(f"{role}: {file.root} has another length than its header says.", AGAIN)


def _checksum(text: str) -> str:
    return f"{zlib.crc32(text.encode()):08x}"
