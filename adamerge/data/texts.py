"""The texts of a source, alone or in pairs, as tokens."""

import hashlib
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from adamerge.data.decoding import Preprocess
from adamerge.data.rows import Rows
from adamerge.data.tables import PAIRS, SINGLE
from adamerge.errors import AdamergeWarning, DataError, InputError, nearest, shortlist
from adamerge.progress import track

EMPTY = "an empty text"
_STRINGS = ("string", "large_string", "string_view")
_IMAGES = {"image", "img"}


class Tokens(NamedTuple):
    """The texts of a source.

    Attributes:
        tokens: Of all texts, at one length.
        digests: SHA-256 of each text's tokens at the model's length.
    """

    tokens: Int64[Tensor, "text field token"]
    digests: UInt8[Tensor, "text 32"]


def preprocessing_of(backbone: Any, max_length: int | None = None) -> tuple[Preprocess, str]:
    """Return a backbone's preprocessing for many inputs, and the key that names it; empty without one.

    Args:
        backbone: It may have ``preprocessing(max_length)``, as those of texts do.
        max_length: Tokens at which texts are cut; default: the model's own length.

    Raises:
        InputError: The backbone reads no texts, or not so many tokens.
    """
    if hasattr(backbone, "preprocessing"):
        return backbone.preprocessing(max_length)
    if max_length is not None:
        raise InputError(f"max_length={max_length}: this model takes no length.", "Leave it out.")
    return backbone.preprocess, getattr(backbone, "transform_key", None) or ""


def text_columns(rows: Rows, columns: Sequence[str] = (), column: str | None = None) -> tuple[str, ...]:
    """Return the columns that hold texts: one, two of a pair, or none where the source holds images.

    Without names, a pair (text and text_pair, sentence1 and sentence2, premise and hypothesis, question1 and
    question2, question and sentence, question and passage) or ``text`` or ``sentence`` alone is read, where
    there is no image.

    Args:
        rows: The source's rows.
        columns: The columns that were asked for.
        column: One that was asked for, of images or texts.

    Raises:
        DataError: A column is not there or holds no texts, or several readings are possible.
    """
    if columns:
        _require_texts(rows, columns)
        return tuple(columns)
    kinds = {name: getattr(kind, "dtype", "") for name, kind in rows.features.items()}
    texts = {name for name, kind in kinds.items() if kind in _STRINGS}
    if column:
        return (column,) if column in texts else ()
    if not _IMAGES.isdisjoint(kinds):
        return ()
    pairs = [pair for pair in PAIRS if texts.issuperset(pair)]
    paired = {name for pair in pairs for name in pair}
    ways = [*pairs, *((name,) for name in SINGLE if name in texts - paired)]
    if len(ways) > 1:
        told = " or ".join("+".join(way) for way in ways)
        raise DataError(
            f"{rows.role}: {rows.source.given} could be read by its columns {told}.",
            f"Name them by columns: [{', '.join(ways[0])}]",
        )
    return ways[0] if ways else ()


def require_text_columns(rows: Rows, columns: Sequence[str]) -> None:
    """Check that a source has texts for a model of texts.

    Raises:
        DataError: It has none, or it is not clear which column they are.
    """
    if not columns:
        strings = [n for n, kind in rows.features.items() if getattr(kind, "dtype", "") in _STRINGS]
        if not strings and not _IMAGES.isdisjoint(rows.features):
            told = f"{rows.role}: {rows.source.given} holds images, the model reads texts."
            raise DataError(told, "Give a file or folder of texts: .txt, .csv, .jsonl, .parquet.")
        raise DataError(
            f"{rows.role}: {rows.source.given} has columns {list(rows.features)}, and none named 'text'.",
            f"Name one (or two of a pair) by columns: [{', '.join(strings[:2])}]"
            if strings
            else "No column holds texts: write them as one, text.",
        )


def text_values(rows: Rows, columns: Sequence[str]) -> list[Any]:
    """Return each row's text, or its pair of texts; what is no text stays as it is."""
    values = [rows.values(column) for column in columns]
    return values[0] if len(values) == 1 else list(zip(*values, strict=True))


def text_problem(value: Any) -> str | None:
    """Return why a value is no text to be read; None where it is one, or a pair with a text in it."""
    parts = value if isinstance(value, tuple) else (value,)
    for part in parts:
        if part is None:
            return "no text"
        if not isinstance(part, str):
            return f"{type(part).__name__}, no text"
        try:
            part.encode()
        except UnicodeEncodeError:
            return "half a character"
    return None if any(part.strip() for part in parts) else EMPTY


def tokens_of(rows: Rows, columns: Sequence[str], preprocess: Preprocess) -> Tokens:
    """Tokenise all texts of a source; how many of them were cut, or are empty, is told in a warning.

    Raises:
        DataError: The model reads no texts, or rows have none.
    """
    texts = text_values(rows, columns)
    problems = {row: text_problem(text) for row, text in enumerate(texts)}
    empty = [f"row {row}" for row, problem in problems.items() if problem == EMPTY]
    wrong = [row for row, problem in problems.items() if problem not in (None, EMPTY)]
    if wrong:
        told = (f"row {i}" + ("" if problems[i] == "no text" else f" ({problems[i]})") for i in wrong)
        raise DataError(f"{rows.role}: no text in {shortlist(told)}.", "Remove these rows.")
    if empty:
        told = f"{rows.role}: {len(empty)} of {len(texts)} texts are empty: {shortlist(empty)}."
        warnings.warn(told, AdamergeWarning, stacklevel=3)
    shorten, stack = (getattr(preprocess, name, None) for name in ("shorten", "stack"))
    found, digests, cut = [], [], CutTexts()
    try:
        for text in track(texts, f"Reading {rows.role}", len(texts)):
            tokens = preprocess(text)
            digests.append(hashlib.sha256(tokens.numpy().tobytes()).digest())
            cut.count(preprocess, text, tokens)
            found.append(shorten(tokens) if shorten else tokens)
    except (AttributeError, TypeError) as error:
        raise DataError(
            f"{rows.role}: {rows.source.given} holds texts (column {columns[0]!r}), the model reads images.",
            "Name the column of the images as `image_column`.",
        ) from error
    cut.warn(rows.role, len(texts))
    whole = torch.frombuffer(bytearray(b"".join(digests)), dtype=torch.uint8).view(-1, 32)
    return Tokens((stack or torch.stack)(found), whole)


class CutTexts:
    """Counts texts that are longer than what the model reads of them.

    Attributes:
        number: How many were cut.
        longest: Tokens of the longest of them.
        length: Tokens at which they were cut.
    """

    def __init__(self) -> None:
        self.number, self.longest, self.length = 0, 0, 0

    def count(self, preprocess: Any, text: Any, tokens: Tensor) -> None:
        """Take note of a text, if what tokenises texts can tell its length."""
        n_cut = getattr(preprocess, "n_cut", None)
        n_tokens = n_cut(text, tokens) if n_cut else 0
        if n_tokens:
            self.number, self.length = self.number + 1, preprocess.length
            self.longest = max(self.longest, n_tokens)

    def note(self, n_texts: int) -> str:
        """Return the note; empty where no text was cut."""
        if not self.number:
            return ""
        verb = "is" if self.number == 1 else "are"
        return (
            f"{self.number} of {n_texts} texts {verb} cut at {self.length} tokens "
            f"(the longest has {self.longest})"
        )

    def warn(self, role: str, n_texts: int, how: str = "data.max_length") -> None:
        """Warn where texts were cut."""
        if self.number:
            told = f"{role}: {self.note(n_texts)}; {how} sets another length."
            warnings.warn(told, AdamergeWarning, stacklevel=4)


def _require_texts(rows: Rows, columns: Sequence[str]) -> None:
    for name in columns:
        if name not in rows.features:
            told = f"{rows.role}: {rows.source.given} has no column {name!r}."
            raise DataError(told, nearest(name, rows.features))
        kind = getattr(rows.features[name], "dtype", "")
        if kind not in _STRINGS:
            told = f"{rows.role}: the column {name!r} of {rows.source.given} holds {kind}, not texts."
            raise DataError(told, "Name columns of texts.")
