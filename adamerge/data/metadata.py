"""Tables beside a folder's images that say what they are: metadata.csv, .jsonl or .parquet."""

from pathlib import Path
from typing import Any

from adamerge.data.decoding import require_regular
from adamerge.errors import DataError, shortlist

_FILE = "file_name"  # as `datasets` calls the column


def read_metadata(file: Path, role: str) -> tuple[list[str], dict[str, list[Any]]]:
    """Read the images' names, relative to the table, and its other columns.

    Args:
        file: The table.
        role: Who asks, for messages.

    Raises:
        DataError: The table is damaged, has no column ``file_name``, or a row names no file, or one twice.
    """
    try:
        require_regular(file)
        columns = _columns(file)
    except Exception as error:  # whatever the reader stumbles over, the file is what is wrong
        raise DataError(f"{role}: {file} cannot be read: {str(error).partition(chr(10))[0]}") from error
    if _FILE not in columns:
        raise DataError(
            f"{role}: {file} has no column {_FILE!r}; it has {shortlist(columns)}.",
            f"Name each row's image as {_FILE!r}, relative to the table; or remove the table.",
        )
    names = columns.pop(_FILE)
    seen: set[str] = set()
    for row, name in enumerate(names):
        if not isinstance(name, str) or not name or "\0" in name:
            raise DataError(f"{role}: row {row} of {file} names no image: {name!r}.", "Remove the row.")
        if name in seen:
            raise DataError(f"{role}: {file} names {name!r} twice.", "Remove one of the rows.")
        seen.add(name)
    return names, columns


def _columns(file: Path) -> dict[str, list[Any]]:
    """Read all columns; words in a CSV file stay words, true and false among them."""
    from pyarrow import csv, json, parquet

    if file.suffix == ".parquet":
        return parquet.read_table(file).to_pydict()
    if file.suffix == ".jsonl":
        return json.read_json(file).to_pydict()
    words = csv.ConvertOptions(true_values=[], false_values=[], column_types={_FILE: "string"})
    return csv.read_csv(file, convert_options=words).to_pydict()
