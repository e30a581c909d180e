"""One progress bar for all long work: on a terminal it draws, elsewhere it stays silent."""

from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

Item = TypeVar("Item")
console = Console(stderr=True)


def track(
    items: Iterable[Item], description: str, sizes: int | Sequence[int] | None = None
) -> Iterator[Item]:
    """Yield the items while a bar with the remaining time is shown on a terminal's stderr.

    Args:
        items: What is worked on.
        description: What is done.
        sizes: Number of items, or the share of work that each one is; default: their length.
    """
    if sizes is None:
        sizes = len(items) if isinstance(items, Sequence) else None
    shares = sizes if isinstance(sizes, Sequence) else None
    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn()
    progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    with progress:
        bar = progress.add_task(description, total=sum(sizes) if isinstance(sizes, Sequence) else sizes)
        for index, item in enumerate(items):
            yield item
            progress.advance(bar, shares[index] if shares else 1)
