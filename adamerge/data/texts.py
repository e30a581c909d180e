"""The texts of a source, as tokens."""

import torch
from jaxtyping import Int64
from torch import Tensor

from adamerge.data.decoding import Preprocess
from adamerge.data.rows import Rows
from adamerge.errors import DataError, shortlist
from adamerge.progress import track

_COLUMNS = ("text", "sentence")


def text_column(rows: Rows, wanted: str | None = None) -> str | None:
    """Name the column that holds texts; None where the source holds images.

    Args:
        rows: The source's rows.
        wanted: The column that was asked for; default: text or sentence, where there is no image.
    """
    names = [wanted] if wanted else [name for name in _COLUMNS if not {"image", "img"} & {*rows.features}]
    kinds = {name: getattr(rows.features.get(name), "dtype", "") for name in names}
    return next((name for name, kind in kinds.items() if kind in ("string", "large_string")), None)


def tokens_of(rows: Rows, column: str, preprocess: Preprocess) -> Int64[Tensor, "text field token"]:
    """Tokenise all texts of a source.

    Raises:
        DataError: The model reads no texts, or rows have none.
    """
    texts = rows.values(column)
    empty = [f"row {index}" for index, text in enumerate(texts) if text is None]
    if empty:
        raise DataError(f"{rows.role}: no text in {shortlist(empty)}.", "Remove these rows.")
    try:
        return torch.stack([preprocess(text) for text in track(texts, f"Reading {rows.role}", len(texts))])
    except (AttributeError, TypeError) as error:
        raise DataError(
            f"{rows.role}: {rows.source.given} holds texts (column {column!r}), the model reads images.",
            "Name the column of the images as `image_column`.",
        ) from error
