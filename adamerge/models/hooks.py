"""Hooks of modules that last as long as a `with` block."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def attached(handles: Iterable[Any]) -> Iterator[None]:
    """Remove hooks at the end, whatever happens; ``handles`` are what registering gave."""
    handles = list(handles)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
