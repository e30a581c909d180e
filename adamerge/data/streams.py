"""A source's inputs a few at a time, of either modality."""

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from adamerge.data.datasets import Chunk, ImageStream, warn_of_left_out
from adamerge.data.decoding import Preprocess
from adamerge.data.rows import open_rows
from adamerge.data.sources import find_source
from adamerge.data.tasks import EMBEDDED
from adamerge.data.texts import CutTexts, require_text_columns, text_columns, text_problem, text_values
from adamerge.errors import DataError


class TextStream:
    """A source's texts in its own order, tokenised a few at a time; labels are not read.

    Attributes:
        names: What the texts' columns are called: ``text``, and ``text_pair`` of a pair.
        cut: Counts the texts that were cut.

    Args:
        source: What `find_source` reads.
        role: Who asks, for messages.
        columns: Columns of the texts; default: see `text_columns`.

    Raises:
        DataError: Nothing is there, or no column holds texts.
    """

    def __init__(self, source: str, role: str, columns: Sequence[str] = ()) -> None:
        if source.startswith(EMBEDDED):
            raise DataError(f"{role}: {source} holds images, the model reads texts.", "Give texts.")
        rows = open_rows(find_source(source, role), role)
        found = text_columns(rows, columns)
        require_text_columns(rows, found)
        warn_of_left_out(rows.source, role)
        self.names, self.cut = ("text", "text_pair")[: len(found)], CutTexts()
        self._values = text_values(rows, found)

    def __len__(self) -> int:
        return len(self._values)

    def chunks(self, preprocess: Preprocess, size: int) -> Iterator[Chunk]:
        """Tokenise ``size`` texts after another (the last time fewer)."""
        for start in range(0, len(self._values), size):
            values = self._values[start : start + size]
            problems = [text_problem(value) for value in values]
            pairs = zip(values, problems, strict=True)
            tokens = [self._tokens(value, preprocess) for value, why in pairs if why is None]
            parts = [value if isinstance(value, tuple) else (value,) for value in values]
            texts = {name: [_shown(part[i]) for part in parts] for i, name in enumerate(self.names)}
            yield Chunk([None] * len(values), problems, tokens, texts)

    def _tokens(self, value: Any, preprocess: Preprocess) -> Tensor:
        tokens = preprocess(value)
        self.cut.count(preprocess, value, tokens)
        return tokens


def open_stream(
    source: str, role: str, modality: str, columns: Sequence[str] = ()
) -> ImageStream | TextStream:
    """Open a source for a model that reads images, or texts.

    Args:
        source: What `find_source` reads.
        role: Who asks, for messages.
        modality: "image" or "text".
        columns: Columns of the texts.

    Raises:
        DataError: Nothing is there, or it is of another kind.
    """
    if modality == "text":
        return TextStream(source, role, columns)
    if columns:
        raise DataError(
            f"{role}: columns {[*columns]} name texts, the model reads images.", "Leave them out."
        )
    return ImageStream(source, role)


def _shown(value: Any) -> str | None:
    """Return a text as a table can hold it."""
    return value.encode(errors="replace").decode() if isinstance(value, str) else None
