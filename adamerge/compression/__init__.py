"""Experts as ternary task vectors in small files."""

from adamerge.compression.file import (
    CompressedExpert,
    is_compressed,
    open_compressed,
    save_compressed,
)
from adamerge.compression.golomb import information_bound
from adamerge.compression.header import Header

__all__ = [
    "CompressedExpert",
    "Header",
    "information_bound",
    "is_compressed",
    "open_compressed",
    "save_compressed",
]
