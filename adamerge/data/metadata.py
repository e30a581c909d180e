"""Tables beside a folder's images that say what they are: metadata.csv, .jsonl or .parquet."""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from adamerge.data.decoding import require_regular
from adamerge.data.tables import FILE_NAME, LABEL_COLUMNS, Columns, read_table
from adamerge.errors import DataError, shortlist


def read_metadata(file: Path, role: str) -> tuple[list[str], Columns]:
    """Read the images' names, relative to the table, and its other columns.

    Args:
        file: The table.
        role: Who asks, for messages.

    Raises:
        DataError: The table is damaged, has no column ``file_name``, or a row names no file, one twice,
            or one outside of the table's folder.
    """
    columns = _columns(file, role)
    if not columns:
        raise DataError(f"{role}: {file} is empty.", "Remove it, or name each row's image there.")
    if FILE_NAME not in columns:
        raise DataError(
            f"{role}: {file} has no column {FILE_NAME!r}; it has {shortlist(columns)}.",
            f"Name each row's image as {FILE_NAME!r}, relative to the table; or remove the table.",
        )
    names: dict[str, None] = {}
    for row, name in enumerate(columns.pop(FILE_NAME)):
        if not isinstance(name, str) or not name or "\0" in name:
            raise DataError(f"{role}: row {row} of {file} names no image: {name!r}.", "Remove the row.")
        path = os.path.normpath(name)
        if os.path.isabs(path) or path.split(os.sep)[0] == os.pardir:
            raise DataError(
                f"{role}: row {row} of {file} names {name!r}, which lies outside of the table's folder.",
                "Names are relative to the table, and lead to images below it.",
            )
        if path in names:
            raise DataError(f"{role}: {file} names {name!r} twice.", "Remove one of the rows.")
        names[path] = None
    return list(names), columns


def repeated_rows(
    file: Path, role: str, names: Sequence[str], columns: Mapping[str, Sequence[Any]]
) -> Iterator[tuple[int, int]]:
    """Return the rows whose image is an earlier row's file under another name, and that earlier row.

    Args:
        file: The table.
        role: Who asks, for messages.
        names: The images' names.
        columns: What the table says of them.

    Raises:
        DataError: Their labels differ.
    """
    places: dict[tuple[int, int], int] = {}
    labels = [columns[name] for name in LABEL_COLUMNS if name in columns]
    for row, name in enumerate(names):
        try:
            status = os.stat(file.parent / name)
        except OSError:
            continue  # a problem of that image
        first = places.setdefault((status.st_dev, status.st_ino), row)
        if first == row:
            continue
        if any(values[first] != values[row] for values in labels):
            raise DataError(
                f"{role}: {names[first]} and {name} in {file} are one file with two labels.",
                "Remove one of the rows.",
            )
        yield row, first


def _columns(file: Path, role: str) -> Columns:
    """Read all columns; words in a CSV file stay words, true and false among them."""
    try:
        require_regular(file)
        if file.suffix != ".parquet":
            return read_table(file, role)
        from pyarrow import parquet

        return parquet.read_table(file).to_pydict()
    except DataError:
        raise
    except Exception as error:  # whatever the reader stumbles over, the file is what is wrong
        raise DataError(f"{role}: {file} cannot be read: {str(error).partition(chr(10))[0]}") from error
