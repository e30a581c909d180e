"""What a classifier's rows mean is read from its own configuration."""

import json
from pathlib import Path
from typing import Any

import pytest

from adamerge.checkpoints import class_names
from adamerge.errors import InputError


def names_of(folder: Path, **settings: Any) -> tuple[str, ...] | None:
    (folder / "config.json").write_text(json.dumps({"model_type": "bert"} | settings))
    return class_names(folder)


@pytest.mark.parametrize(
    "settings",
    [
        {"id2label": {"1": "ham", "0": "spam"}, "label2id": {"ham": 1, "spam": 0}},
        {"id2label": {"0": "spam", "1": "ham"}},
        {"label2id": {"ham": 1, "spam": 0}},
        {"label2id": {"ham": "1", "spam": "0"}},
        {"id2label": {"0": "spam", "1": "ham"}, "label2id": {"LABEL_0": 0, "LABEL_1": 1}},
        {"id2label": {"0": "LABEL_0", "1": "LABEL_1"}, "label2id": {"ham": 1, "spam": 0}},
        {"architecture": "vit_tiny_patch16_224", "label_names": ["spam", "ham"]},
        {"architecture": "vit_tiny_patch16_224", "pretrained_cfg": {"label_names": ["spam", "ham"]}},
        {"architecture": "vit_tiny_patch16_224", "pretrained_cfg": {"labels": {"1": "ham", "0": "spam"}}},
    ],
)
def test_names_stand_in_the_order_of_the_rows(tmp_path: Path, settings: dict[str, Any]) -> None:
    assert names_of(tmp_path, **settings) == ("spam", "ham")


def test_more_than_ten_rows_are_ordered_by_number_and_numbers_are_names(tmp_path: Path) -> None:
    names = [str(11 - row) for row in range(12)]
    mapping = dict(sorted((str(row), name) for row, name in enumerate(names)))

    assert names_of(tmp_path, id2label=mapping) == tuple(names)
    assert names_of(tmp_path, id2label={"0": 7, "1": 3}, label2id={"7": 0, "3": 1}) == ("7", "3")


def test_two_rows_may_have_one_name(tmp_path: Path) -> None:
    assert names_of(tmp_path, id2label={"0": "a", "1": "a"}, label2id={"a": 1}) == ("a", "a")


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"id2label": None, "label2id": None},
        {"num_labels": 3},
        {"id2label": {"0": "LABEL_0", "1": "LABEL_1"}, "label2id": {"LABEL_0": 0, "LABEL_1": 1}},
        {"architecture": "resnet18", "num_classes": 3},
        {"architecture": "resnet18", "label_names": {"0": "a", "2": "c"}},
    ],
)
def test_placeholders_and_absent_names_are_no_names(tmp_path: Path, settings: dict[str, Any]) -> None:
    assert names_of(tmp_path, **settings) is None


def test_files_and_folders_without_configuration_have_no_names(tmp_path: Path) -> None:
    assert class_names(tmp_path) is None
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert class_names(tmp_path / "model.safetensors") is None
    assert class_names(tmp_path / "absent") is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"id2label": {"0": "a", "1": "b"}, "label2id": {"a": 1, "b": 0}}, "contradict.*row 1.*'b'.*'a'"),
        ({"id2label": {"0": "a", "1": "b"}, "label2id": {"a": 0}}, "contradict.*lacks 'b'"),
        ({"id2label": {"0": "a"}, "label2id": {"a": 0, "b": 1}}, "contradict.*row 1"),
        ({"id2label": {"1": "a", "2": "b"}}, r"rows \[1, 2\].*not 0 to 1"),
        ({"id2label": ["a", "b"]}, "id2label.*no mapping"),
        ({"label2id": {"a": "first"}}, "label2id.*no mapping"),
    ],
)
def test_contradictions_are_refused(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        names_of(tmp_path, **settings)
