"""What a terminal shows: one progress bar for all long work, and tables that fit the width."""

import os
import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

from rich.console import Console
from rich.measure import Measurement
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

Item = TypeVar("Item")
console = Console(stderr=True)
_LOG_WIDTH = 160  # columns; a file has no width of its own
_bars: "weakref.WeakSet[Progress]" = weakref.WeakSet()


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
    progress = new_bar(*columns, disable=not console.is_terminal)
    with progress:
        bar = progress.add_task(description, total=sum(sizes) if isinstance(sizes, Sequence) else sizes)
        for index, item in enumerate(items):
            yield item
            progress.advance(bar, shares[index] if shares else 1)


def new_bar(*columns: str | ProgressColumn, disable: bool = False) -> Progress:
    """Return a bar on stderr that vanishes when it ends, and that `stop_bars` can end."""
    bar = Progress(*columns, console=console, transient=True, disable=disable)
    _bars.add(bar)
    return bar


def stop_bars() -> None:
    """End all bars, so that a message begins on a line of its own."""
    for bar in list(_bars):
        if bar.live.is_started:
            bar.stop()


def print_line(text: str, style: str | None = None) -> None:
    """Print a line to stderr as it is: not wrapped, no markup, no colour of its own."""
    console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def duration(seconds: float) -> str:
    """Return a duration as people write it: 4.2 s, 3 min 5 s, 2 h 10 min."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def terminal() -> Console:
    """Return the console of standard output; without a terminal, ``COLUMNS`` or 160 columns wide."""
    out = Console()
    is_unbounded = not out.is_terminal and not os.environ.get("COLUMNS", "").isdigit()
    return Console(width=_LOG_WIDTH) if is_unbounded else out


def print_columns(header: Sequence[str], lines: Sequence[Sequence[str]], title: str = "") -> None:
    """Print a table to standard output, every cell whole.

    Columns that do not fit beside the others follow in further blocks, each of which begins with the first
    column.

    Args:
        header: Names of the columns; the first column names the lines.
        lines: The cells of each line.
        title: Stands above.
    """
    out = terminal()
    rest = list(range(1, len(header)))
    while True:
        count = len(rest)
        table = _block(header, lines, rest, title, out.width)
        while count > 1 and _width(out, table) > out.width:
            count -= 1
            table = _block(header, lines, rest[:count], title, out.width)
        out.print(table)
        rest, title = rest[count:], ""
        if not rest:
            return


def _width(out: Console, table: Table) -> int:
    """Return the width of a table that may be as wide as it likes."""
    return Measurement.get(out, out.options.update(max_width=9999), table).maximum


def _block(
    header: Sequence[str], lines: Sequence[Sequence[str]], places: Sequence[int], title: str, width: int
) -> Table:
    """Return a table of the first column and those at ``places``."""
    table = Table(title=Text(title) if title else None)
    table.add_column(Text(header[0]), max_width=max(width // 2 - 4, 8), overflow="fold")
    for place in places:
        table.add_column(Text(header[place]), justify="right", overflow="fold")
    for line in lines:
        table.add_row(*(Text(line[place]) for place in (0, *places)))
    return table
