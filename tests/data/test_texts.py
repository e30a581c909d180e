"""Texts of parquet files and `datasets` folders become tokens beside their labels."""

from pathlib import Path

import pyarrow
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from pyarrow import parquet
from torch import Tensor

from adamerge.data.datasets import load_images
from adamerge.errors import DataError

TEXTS = ["one", "three", "fifteen"]


def letters(text: str) -> Tensor:
    """Tokens of a text: its letters, and which of them there are."""
    if not isinstance(text, str):
        raise ValueError("no text")
    codes = torch.tensor([ord(letter) for letter in text.ljust(8)[:8]])
    return torch.stack([codes, (codes != 32).long()])


def written(folder: Path, **columns: list) -> str:
    parquet.write_table(pyarrow.table(columns), folder / "rows.parquet")
    return str(folder / "rows.parquet")


def load(source: str, labelled: bool = True, **options: str) -> list[dict[str, Tensor]]:
    images = load_images(source, letters, labelled=labelled, role="task 'x'", **options)
    return images.__getitems__([2, 0])


@pytest.mark.parametrize("column", ["text", "sentence"])
def test_texts_are_tokens_in_the_order_asked_for(tmp_path: Path, column: str) -> None:
    (batch,) = load(written(tmp_path, **{column: TEXTS}, label=[4, 5, 6]))
    assert torch.equal(batch["images"], torch.stack([letters("fifteen"), letters("one")]))
    assert batch["labels"].tolist() == [6, 4]


def test_a_column_of_another_name_is_named(tmp_path: Path) -> None:
    source = written(tmp_path, review=TEXTS, stars=[1, 2, 3])
    (batch,) = load(source, image_column="review", label_column="stars")
    assert torch.equal(batch["images"][1], letters("one"))
    with pytest.raises(DataError, match="none named 'image'"):
        load(source)


def test_labels_are_dropped_where_none_are_wanted(tmp_path: Path) -> None:
    assert "labels" not in load(written(tmp_path, text=TEXTS, label=[0, 1, 2]), labelled=False)[0]


def test_class_names_and_equal_texts_are_known(tmp_path: Path) -> None:
    features = Features({"text": Value("string"), "label": ClassLabel(names=["bad", "good"])})
    rows = Dataset.from_dict({"text": ["one", "two", "one"], "label": [0, 1, 0]}, features)
    rows.save_to_disk(str(tmp_path / "rows"))
    texts = load_images(str(tmp_path / "rows"), letters, labelled=True, role="task 'x'")
    assert texts.class_names == ("bad", "good")
    first, second, third = texts.digests()
    assert first == third
    assert first != second


def test_an_image_beside_its_caption_stays_the_input(tmp_path: Path) -> None:
    source = written(tmp_path, text=TEXTS, image=[{"bytes": b"", "path": None}] * 3)
    with pytest.raises(DataError, match="3 of 3 images cannot be decoded"):
        load(source, labelled=False)


def test_a_row_without_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="task 'x': no text in row 1"):
        load(written(tmp_path, text=["one", None, "two"]), labelled=False)


def test_a_model_of_images_refuses_texts(tmp_path: Path) -> None:
    source = written(tmp_path, text=TEXTS)
    with pytest.raises(DataError, match="holds texts \\(column 'text'\\), the model reads images"):
        load_images(source, lambda picture: picture.convert("RGB"), labelled=False, role="task 'x'")
