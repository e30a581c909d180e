"""Reads a tensor span by span into a small buffer: faster than mapping it, and memory stays flat."""

import os
import weakref
from typing import Any

import torch
from torch import Tensor

from adamerge.checkpoints.reading import Checkpoint
from adamerge.errors import InputError


class SpanReader:
    """One tensor of a checkpoint, flattened.

    Args:
        checkpoint: The checkpoint.
        name: The tensor's name.
    """

    def __init__(self, checkpoint: Checkpoint, name: str) -> None:
        self.entry, self.dtype = checkpoint.entry(name), checkpoint.info(name).dtype
        self._descriptor = os.open(self.entry.file, os.O_RDONLY)
        self._close = weakref.finalize(self, os.close, self._descriptor)
        self._buffer = torch.empty(0, dtype=self.dtype)
        self._bytes: Any = None

    def prefetch(self) -> None:
        """Ask the system to read the tensor from disk meanwhile."""
        if hasattr(os, "posix_fadvise"):
            _, _, _, start, stop = self.entry
            os.posix_fadvise(self._descriptor, start, stop - start, os.POSIX_FADV_WILLNEED)

    def __getitem__(self, span: slice) -> Tensor:
        """Give the entries of a span; they live until the next span is asked for.

        Raises:
            InputError: The file ends before the span does.
        """
        length = span.stop - span.start
        if len(self._buffer) < length:
            self._buffer = torch.empty(length, dtype=self.dtype)
            self._bytes = self._buffer.view(torch.uint8).numpy().data
        wanted = length * self.dtype.itemsize
        offset = self.entry.start + span.start * self.dtype.itemsize
        if os.preadv(self._descriptor, [self._bytes[:wanted]], offset) != wanted:
            raise InputError(f"{self.entry.file} was cut off while it was being read.", "Start again.")
        return self._buffer[:length]

    def close(self) -> None:
        """Close the file."""
        self._close()
