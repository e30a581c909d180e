"""Texts of parquet files and `datasets` folders become tokens beside their labels."""

from pathlib import Path
from typing import Any

import pyarrow
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from pyarrow import parquet
from torch import Tensor

from adamerge.data.datasets import load_images
from adamerge.data.labels import match_labels
from adamerge.data.rows import open_rows
from adamerge.data.sources import find_source
from adamerge.data.texts import text_columns
from adamerge.errors import AdamergeWarning, DataError

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


class TestColumns:
    """Which columns are read is a stated rule, and asked for where that does not tell."""

    def columns(self, tmp_path: Path, *names: str, **options: Any) -> tuple[str, ...]:
        source = written(tmp_path, **dict.fromkeys(names, TEXTS), label=[0, 1, 2])
        return text_columns(open_rows(find_source(source, "x"), "task 'x'"), **options)

    @pytest.mark.parametrize(
        "pair",
        [
            ("text", "text_pair"),
            ("sentence1", "sentence2"),
            ("premise", "hypothesis"),
            ("question1", "question2"),
            ("question", "sentence"),
            ("question", "passage"),
        ],
    )
    def test_known_pairs_are_pairs(self, tmp_path: Path, pair: tuple[str, str]) -> None:
        assert self.columns(tmp_path, *pair, "idx") == pair

    def test_named_columns_win(self, tmp_path: Path) -> None:
        assert self.columns(tmp_path, "text", "title", columns=["title", "text"]) == ("title", "text")
        assert self.columns(tmp_path, "text", "title", columns=["title"]) == ("title",)
        assert self.columns(tmp_path, "text", "title") == ("text",)

    @pytest.mark.parametrize(
        ("names", "message"),
        [
            (("text", "sentence"), "its columns text or sentence.\nName them .* columns: \\[text\\]"),
            (
                ("premise", "hypothesis", "text"),
                r"columns premise\+hypothesis or text.\nName .* columns: \[premise, hypothesis\]",
            ),
        ],
    )
    def test_several_readings_are_asked_for(
        self, tmp_path: Path, names: tuple[str, ...], message: str
    ) -> None:
        with pytest.raises(DataError, match=message):
            self.columns(tmp_path, *names)

    def test_wrong_names_are_told(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="has no column 'txt'.\nDid you mean 'text'"):
            self.columns(tmp_path, "text", columns=["txt"])
        with pytest.raises(DataError, match="the column 'label' .* holds int64, not texts"):
            self.columns(tmp_path, "text", columns=["label"])

    def test_a_model_of_texts_refuses_images(self, tmp_path: Path) -> None:
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / "0.png").write_bytes(b"")
        with pytest.raises(DataError, match="holds images, the model reads texts.\nGive a file"):
            load(str(tmp_path), modality="text")

    def test_a_model_of_texts_asks_for_a_column(self, tmp_path: Path) -> None:
        source = written(tmp_path, review=TEXTS, label=[0, 1, 2])
        with pytest.raises(DataError, match="none named 'text'.\nName one .* columns: \\[review\\]"):
            load(source, modality="text")


def test_rows_that_are_no_texts_are_named_and_empty_ones_counted(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "one"}\n{"text": 7}\n{"text": null}\n{"text": "\\ud800"}\n')
    with pytest.raises(DataError, match=r"no text in row 1 \(int, no text\), row 2, row 3 \(half a char"):
        load(str(file), labelled=False)
    file.write_text('{"text": "one"}\n{"text": " "}\n{"text": ""}\n')
    with pytest.warns(AdamergeWarning, match="task 'x': 2 of 3 texts are empty: row 1, row 2"):
        load(str(file), labelled=False)


def test_labels_of_a_csv_file_stand_beside_its_texts(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("sentence,label\none,1\nthree,0\nfifteen,1\n")
    (batch,) = load(str(tmp_path / "rows.csv"))
    assert batch["labels"].tolist() == [1, 1]
    assert torch.equal(batch["images"][1], letters("one"))


def test_messages_of_labels_speak_of_texts(tmp_path: Path) -> None:
    source = written(tmp_path, text=TEXTS, label=[0, 1, 5])
    texts = load_images(source, letters, labelled=True, role="task 'x'")
    with pytest.raises(DataError, match="task 'x': test texts have label 5, there are 2 class names"):
        match_labels("x", texts, ["bad", "good"])
