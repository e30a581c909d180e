"""Tables in files of text: .txt with one text a line, .csv, .tsv, .jsonl and .json."""

import codecs
import csv
import io
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from adamerge.errors import DataError, shortlist

Columns = dict[str, list[Any]]
_MARKS = (  # the longer ones first: UTF-32's begins like UTF-16's
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
PAIRS = (  # columns of two texts that are read together
    ("text", "text_pair"),
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("question", "passage"),
)
SINGLE = ("text", "sentence")
FILE_NAME = "file_name"  # as `datasets` calls the column of images in a table beside them
LABEL_COLUMNS = ("label", "fine_label", "cls", "labels")
_TEXT_NAMES = {FILE_NAME, *SINGLE, *(name for pair in PAIRS for name in pair)}
_NUMBER = re.compile(r"-?(0|[1-9]\d{0,17})(\.\d{1,17})?", re.ASCII)
_KINDS = {bool: "bool", int: "int64", float: "float64", str: "string"}


def read_table(file: Path, role: str) -> Columns:
    """Read a file's columns, all of the same length; a value that a row lacks is None.

    UTF-8, and UTF-16 and UTF-32 that say so by a mark at their beginning, are read.

    Args:
        file: The file; its suffix tells what it is. A .txt has one column, ``text``.
        role: Who asks, for messages.

    Raises:
        DataError: It is damaged, or in another encoding.
    """
    try:
        return _READERS[file.suffix.lower()](_text_of(file), file)
    except OSError as error:
        raise DataError(f"{role}: {file} cannot be read: {error.strerror or error}.") from error
    except _DamageError as error:
        raise DataError(f"{role}: {file}: {error}.", error.hint) from error


def kind_of(values: Sequence[Any]) -> str:
    """Return what a column holds, as `datasets.Value` calls it; "null" where that is no single kind."""
    kinds = {type(value) for value in values if value is not None}
    if str in kinds:
        return "string"
    return _KINDS.get(kinds.pop(), "null") if len(kinds) == 1 else "null"


class _DamageError(Exception):
    def __init__(self, problem: str, hint: str = "") -> None:
        super().__init__(problem)
        self.hint = hint


def _text_of(file: Path) -> str:
    content = file.read_bytes()
    encoding = next((name for mark, name in _MARKS if content.startswith(mark)), "utf-8")
    if encoding.startswith("utf-8") and b"\0" in content:
        line = content.count(b"\n", 0, content.index(b"\0")) + 1
        raise _DamageError(f"line {line} holds a NUL character", "Is it UTF-16 or no text? Save it as UTF-8.")
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise _DamageError(
            f"line {line} is no {encoding.upper().removesuffix('-SIG')} (byte 0x{content[error.start]:02x})",
            f"Save it as UTF-8, from Latin-1: iconv -f latin1 -t utf-8 {file.name} > new{file.suffix}",
        ) from error


def _lines(text: str, _file: Path) -> Columns:
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return {"text": lines[:-1] if lines[-1] == "" else lines}


def _separated(text: str, file: Path) -> Columns:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # a text may have more than its 131072 characters
    separator = "\t" if file.suffix.lower() == ".tsv" else _separator(text.partition("\n")[0])
    try:
        rows = list(_rows(text, delimiter=separator, strict=True))
    except _DamageError:  # texts that begin with a quote: tables of GLUE have no quoting
        rows = list(_rows(text, delimiter=separator, quoting=csv.QUOTE_NONE))
        if separator != "\t" or len({len(row) for _, row in rows}) > 1:
            raise
    (_, header), *rows = rows or [(1, [])]
    header = [name.strip() for name in header]
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise _DamageError(f"the column {twice[0]!r} stands there twice", "Rename one.")
    for line, row in rows:
        if len(row) != len(header):
            raise _DamageError(
                f"line {line} has {len(row)} values, its header {len(header)}: {shortlist(header)}",
                "The first line names the columns; texts that hold the separator stand in quotes.",
            )
    return {name: _numbers([row[i] for _, row in rows], name) for i, name in enumerate(header)}


def _rows(text: str, **form: Any) -> Iterator[tuple[int, list[str]]]:
    """Read rows that are not empty, with the number of their last line."""
    reader = csv.reader(io.StringIO(text, newline=""), **form)
    try:
        yield from ((reader.line_num, row) for row in reader if row)
    except csv.Error as error:
        raise _DamageError(
            f"line {reader.line_num} is damaged: {error}", "Texts with quotes stand in quotes, those doubled."
        ) from error


def _separator(header: str) -> str:
    """Return what parts the columns: commas, unless the header has none and has semicolons or tabs."""
    return next((mark for mark in ",;\t" if mark in header), ",")


def _numbers(values: list[str], name: str) -> list[Any]:
    """Turn a column of numbers into numbers, unless it is named like texts; empty places become None."""
    filled = [value for value in values if value.strip()]
    is_number = name not in _TEXT_NAMES and filled and all(map(_NUMBER.fullmatch, filled))
    if not is_number:
        return list(values)
    number = float if any("." in value for value in filled) else int
    return [number(value) if value.strip() else None for value in values]


def _json_lines(text: str, _file: Path) -> Columns:
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            row = _json(line, f"line {number} is no JSON object")
            rows.append(row)
    return _by_column(rows)


def _json_array(text: str, _file: Path) -> Columns:
    problem = "it is no JSON list of objects"
    rows = _json(text, problem, list)
    if not all(isinstance(row, dict) for row in rows):
        raise _DamageError(problem, "Write [{...}, {...}], or one object a line as .jsonl.")
    return _by_column(rows)


def _json(text: str, problem: str, kind: type = dict) -> Any:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _DamageError(f"{problem} ({str(error) or type(error).__name__})") from error
    if not isinstance(value, kind):
        raise _DamageError(problem)
    return value


def _by_column(rows: Sequence[Mapping[str, Any]]) -> Columns:
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


_READERS: dict[str, Callable[[str, Path], Columns]] = {
    ".txt": _lines,
    ".csv": _separated,
    ".tsv": _separated,
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json_array,
}
SUFFIXES = tuple(_READERS)
IN_FOLDERS = (".csv", ".tsv", ".jsonl", ".ndjson")  # the others are as often something else
