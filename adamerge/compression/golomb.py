"""Golomb-Rice coding of ternary vectors: gaps between the entries that are not 0, and their signs.

Every segment has an exponent of its own, by its share of such entries. A segment is a head, the signs, the
gaps modulo 2^exponent as bit planes, and the gaps divided by it in unary; each part ends at a full byte.
"""

import math
import struct

import numpy as np
from jaxtyping import Int8, UInt8

_SEGMENT = 2**20
_HEAD = struct.Struct("<IIB")  # kept entries, bits of the unary part, exponent


def encode(signs: Int8[np.ndarray, " entry"]) -> bytes:
    """Code the positions and signs of the entries that are not 0."""
    return b"".join(_encode_segment(signs[i : i + _SEGMENT]) for i in range(0, len(signs), _SEGMENT))


def decode(data: UInt8[np.ndarray, " byte"], size: int) -> Int8[np.ndarray, " entry"]:
    """Give back what was encoded.

    Raises:
        ValueError: The bytes are no code of ``size`` entries.
    """
    signs, bits = np.zeros(size, np.int8), _Bits(data)
    for start in range(0, size, _SEGMENT):
        _decode_segment(bits, signs[start : start + _SEGMENT])
    if bits.position != len(data):
        raise ValueError("bytes are left over")
    return signs


def golomb_exponent(share: float) -> int:
    """Give the exponent of the best Golomb-Rice code for gaps between entries of which a share is kept."""
    if not 0 < share < 1:
        return 0
    golden = (1 + math.sqrt(5)) / 2
    return max(0, 1 + math.floor(math.log2(math.log(golden - 1) / math.log1p(-share))))


def information_bound(entries: int, kept: int) -> float:
    """Give the bits that random positions and signs of the kept entries, and one scale, cannot go below."""
    parts = (entries - kept, kept / 2, kept / 2)
    return 16 - sum(part * math.log2(part / entries) for part in parts if part)


class _Bits:
    """Reads packed bits from a row of bytes."""

    def __init__(self, data: UInt8[np.ndarray, " byte"]) -> None:
        self.data, self.position = data, 0

    def head(self) -> tuple[int, int, int]:
        """Read a segment's head."""
        return _HEAD.unpack(self._next(_HEAD.size).tobytes())

    def take(self, count: int) -> UInt8[np.ndarray, " bit"]:
        """Read bits, which end at a full byte."""
        return np.unpackbits(self._next(-(-count // 8)), count=count)

    def _next(self, n_bytes: int) -> UInt8[np.ndarray, " byte"]:
        piece = self.data[self.position : self.position + n_bytes]
        if len(piece) < n_bytes:
            raise ValueError("bytes are missing")
        self.position += n_bytes
        return piece


def _encode_segment(signs: Int8[np.ndarray, " entry"]) -> bytes:
    positions = np.flatnonzero(signs)
    exponent = golomb_exponent(len(positions) / len(signs))
    gaps = np.diff(positions, prepend=-1) - 1
    ends = np.cumsum((gaps >> exponent) + 1)
    quotients = np.zeros(ends[-1] if len(ends) else 0, bool)
    quotients[ends - 1] = True
    planes = [signs[positions] > 0, *((gaps >> i) & 1 for i in range(exponent)), quotients]
    head = _HEAD.pack(len(positions), len(quotients), exponent)
    return head + b"".join(np.packbits(plane).tobytes() for plane in planes)


def _decode_segment(bits: _Bits, signs: Int8[np.ndarray, " entry"]) -> None:
    kept, length, exponent = bits.head()
    values = bits.take(kept).view(np.int8) * 2 - 1
    gaps = np.zeros(kept, np.int64)
    for i in range(exponent):
        gaps |= bits.take(kept).astype(np.int64) << i
    ends = np.flatnonzero(bits.take(length))
    if len(ends) != kept:
        raise ValueError("its parts contradict one another")
    gaps += (np.diff(ends, prepend=-1) - 1) << exponent
    signs[np.cumsum(gaps + 1) - 1] = values
