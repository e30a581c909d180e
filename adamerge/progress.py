"""One progress bar for all long work: on a terminal it draws, elsewhere it stays silent."""

from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import track as _track

Item = TypeVar("Item")
console = Console(stderr=True)


def track(items: Iterable[Item], description: str, total: int | None = None) -> Iterator[Item]:
    """Yield the items while a bar with the remaining time is shown on a terminal's stderr."""
    yield from _track(
        items,
        description,
        total=total,
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
