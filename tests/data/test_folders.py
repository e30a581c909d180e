"""Folders of images: what counts as a class, what is passed through, each file once, what is left out."""

import json
import os
from pathlib import Path

import pyarrow as pa
import pytest
from conftest import draw
from pyarrow import parquet

from adamerge.data.rows import Rows, open_rows
from adamerge.data.sources import find_source
from adamerge.errors import DataError

ROLE = "task 'cars', test images"


def put(root: Path, *names: str) -> Path:
    for seed, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        draw(seed, 0).save(root / name, format="png")
    return root


def opened(given: object) -> Rows:
    return open_rows(find_source(str(given), ROLE), ROLE)


def labels(given: object) -> list[int]:
    rows = opened(given)
    return rows.labels(rows.label_column()).tolist()


def refused(given: object) -> str:
    with pytest.raises(DataError) as caught:
        labels(given)
    assert str(caught.value).startswith(ROLE)
    return str(caught.value)


class TestSplits:
    @pytest.mark.parametrize("names", [("train", "test"), ("Training", "VAL"), ("dev", "eval", "extra")])
    def test_folders_of_classes_called_like_splits_ask_for_one(
        self, tmp_path: Path, names: tuple[str, ...]
    ) -> None:
        put(tmp_path, *(f"{name}/{kind}/0.png" for name in names for kind in ("cat", "dog")))
        first = sorted(name for name in names if name != "extra")[0]
        assert f"Name one: {tmp_path}@{first}" in refused(tmp_path)
        assert labels(f"{tmp_path}@{first}") == [0, 1]
        assert labels(f"{tmp_path}@{first.swapcase()}") == [0, 1]

    def test_one_beside_classes_is_none_of_them(self, tmp_path: Path) -> None:
        put(tmp_path, "train/cat/0.png", "train/dog/0.png", "cat/1.png", "dog/1.png")
        assert f"has the splits train.\nName one: {tmp_path}@train" in refused(tmp_path)

    def test_flat_ones_are_no_classes_either(self, tmp_path: Path) -> None:
        put(tmp_path, "train/0.png", "test/1.png")
        assert "has the splits test, train" in refused(tmp_path)

    def test_a_single_one_needs_no_name(self, tmp_path: Path) -> None:
        assert labels(put(tmp_path, "test/cat/0.png", "test/dog/0.png")) == [0, 1]


class TestRoots:
    @pytest.mark.parametrize("inner", ["pets", "pets/pets", "train", "data/test"])
    def test_folders_that_only_hold_the_root_are_passed_through(self, tmp_path: Path, inner: str) -> None:
        put(tmp_path, f"{inner}/cat/0.png", f"{inner}/dog/0.png", "__MACOSX/pets/cat/._0.png")
        (tmp_path / inner.partition("/")[0] / "LICENSE").touch()
        rows = opened(tmp_path)
        assert rows.class_names("label") == ("cat", "dog")
        assert [Path(name).name for name in rows.source.left_out] == ["LICENSE"]

    def test_a_split_is_found_below_them(self, tmp_path: Path) -> None:
        put(tmp_path, "data/train/cat/0.png", "data/test/cat/0.png", "data/test/dog/0.png")
        assert labels(f"{tmp_path}@test") == [0, 1]

    def test_one_class_of_direct_images_is_a_class(self, tmp_path: Path) -> None:
        assert opened(put(tmp_path, "cat/0.png", "cat/more/1.png")).class_names("label") == ("cat",)

    def test_folders_that_repeat_the_same_names_are_no_classes(self, tmp_path: Path) -> None:
        put(tmp_path, *(f"{year}/{kind}/0.png" for year in (2019, 2020) for kind in ("cat", "dog")))
        assert "each of 2019, 2020 holds folders of the same names (cat, dog)" in refused(tmp_path)
        assert len(opened(tmp_path)) == 4  # without labels it does not matter

    def test_names_that_differ_in_case_alone_are_refused(self, tmp_path: Path) -> None:
        assert "differ in case alone: Cat, cat" in refused(
            put(tmp_path, "Cat/0.png", "cat/1.png", "dog/2.png")
        )


class TestLinks:
    def test_a_file_counts_once_whatever_leads_to_it(self, tmp_path: Path) -> None:
        put(tmp_path, "a/0.png", "b/1.png")
        os.link(tmp_path / "a/0.png", tmp_path / "a/hard.png")
        (tmp_path / "a" / "00.png").symlink_to("0.png")
        (tmp_path / "a" / "up").symlink_to("..")
        (tmp_path / "loop").symlink_to(".")
        rows = opened(tmp_path)
        assert [path.name for path in rows.source.files] == ["0.png", "1.png"]
        assert rows.class_names("label") == ("a", "b")
        assert len(rows.source.left_out) == 4
        assert "a/00.png (the same as a/0.png)" in rows.source.left_out

    def test_a_file_in_two_classes_has_no_label(self, tmp_path: Path) -> None:
        put(tmp_path, "a/0.png", "b/1.png")
        (tmp_path / "b" / "2.png").symlink_to("../a/0.png")
        assert "a/0.png and b/2.png are one file in two classes" in refused(tmp_path)
        assert len(opened(tmp_path)) == 2

    def test_a_link_to_a_class_is_no_other_class(self, tmp_path: Path) -> None:
        put(tmp_path, "b/0.png", "c/1.png")
        (tmp_path / "a").symlink_to("b")
        assert "b and a are one file in two classes" in refused(tmp_path)

    def test_links_out_of_the_folder_are_followed(self, tmp_path: Path) -> None:
        put(tmp_path, "real/0.png", "real/1.png", "in/b/2.png")
        (tmp_path / "in" / "a").symlink_to("../real")
        assert labels(tmp_path / "in") == [0, 0, 1]


@pytest.mark.parametrize(
    "names",
    [
        ("seg_train/seg_train/{}/0.png", "seg_test/seg_test/{}/0.png"),
        ("training_set/{}/0.png", "test_set/{}/0.png", "single/0.png"),
        ("train_data/{}/0.png", "train_data/bird/0.png", "validation_data/{}/0.png"),
    ],
)
def test_names_with_that_of_a_split_in_them_are_no_classes(tmp_path: Path, names: tuple[str, ...]) -> None:
    put(tmp_path, *(name.format(animal) for name in names for animal in ("cat", "dog")))
    split = names[-1 if "{}" in names[-1] else 1].partition("/")[0]
    assert "has the splits" in refused(tmp_path)
    assert opened(f"{tmp_path}@{split}").class_names("label") == ("cat", "dog")


def test_folders_inside_of_others_that_hold_nothing_else_are_compared(tmp_path: Path) -> None:
    put(tmp_path, *(f"{part}/{part}/{animal}/0.png" for part in ("one", "two") for animal in ("cat", "dog")))
    assert "each of one, two holds folders of the same names (cat, dog)" in refused(tmp_path)


def test_words_of_splits_in_flat_folders_are_classes(tmp_path: Path) -> None:
    names = ("test_tube", "train_station")
    assert opened(put(tmp_path, *(f"{name}/0.png" for name in names))).class_names("label") == names


def test_one_image_is_a_source_without_labels(tmp_path: Path) -> None:
    rows = opened(put(tmp_path, "0.png", "1.png") / "1.png")
    assert [rows.name_of(0, value) for value in rows.images("image")] == ["1.png"]
    assert "and no 'label'" in refused(tmp_path / "1.png")


def test_what_is_left_out_is_listed(tmp_path: Path) -> None:
    put(tmp_path, "a/0.png", "a/1.JFIF", "b/0.jpe", "a/.hidden.png", "b/.ipynb_checkpoints/0.png")
    (tmp_path / "b" / "photo.heic").touch()
    (tmp_path / ".DS_Store").touch()
    rows = opened(tmp_path)
    assert len(rows) == 3
    assert rows.source.left_out == (
        "b/photo.heic",
        "a/.hidden.png (hidden)",
        "b/.ipynb_checkpoints/0.png (hidden)",
    )


def test_names_with_two_lines_in_front_are_classes(tmp_path: Path) -> None:
    assert opened(put(tmp_path, "__unknown__/0.png", "cat/1.png")).class_names("label") == (
        "__unknown__",
        "cat",
    )


class TestMetadata:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        return put(tmp_path, "0.png", "1.png", "more/2.png")

    def test_a_table_says_which_images_and_labels_there_are(self, folder: Path) -> None:
        (folder / "metadata.csv").write_text("file_name,label\n1.png,true\nmore/2.png,cat\n")
        rows = opened(folder)
        assert [path.name for path in rows.source.files] == ["1.png", "2.png"]
        assert (labels(folder), rows.class_names("label")) == ([1, 0], ("cat", "true"))
        assert rows.source.left_out == ("0.png (not in metadata.csv)",)

    def test_other_forms_of_the_table(self, folder: Path) -> None:
        lines = [{"file_name": "1.png", "fine_label": 3}, {"file_name": "0.png", "fine_label": 0}]
        (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
        assert labels(folder) == [3, 0]
        (folder / "metadata.jsonl").unlink()
        table = pa.table({"file_name": ["0.png"], "label": [2]})
        parquet.write_table(table, folder / "metadata.parquet")
        assert labels(folder) == [2]

    def test_each_split_may_have_its_own(self, tmp_path: Path) -> None:
        put(tmp_path, "train/0.png", "test/1.png")
        for split, name in (("train", "0.png"), ("test", "1.png")):
            (tmp_path / split / "metadata.csv").write_text(f"file_name,label\n{name},{name[0]}\n")
        assert "has the splits test, train" in refused(tmp_path)
        assert labels(f"{tmp_path}@test") == [1]

    def test_one_beside_the_splits_serves_them_all(self, tmp_path: Path) -> None:
        put(tmp_path, "train/0.png", "test/1.png", "test/2.png")
        rows = "train/0.png,7\ntest/1.png,1\ntest/../test/2.png,2\n"
        (tmp_path / "metadata.csv").write_text(f"file_name,label\n{rows}")
        assert labels(f"{tmp_path}@test") == [1, 2]
        assert labels(f"{tmp_path}@train") == [7]

    def test_a_file_under_two_names_is_one_row(self, folder: Path) -> None:
        (folder / "link.png").hardlink_to(folder / "0.png")
        table = folder / "metadata.csv"
        table.write_text("file_name,label\n0.png,1\n1.png,0\nlink.png,1\nmore/2.png,0\n")
        assert labels(folder) == [1, 0, 0]
        assert opened(folder).source.left_out == ("link.png (the same as 0.png)",)
        table.write_text("file_name,label\n0.png,1\nlink.png,0\n")
        assert "0.png and link.png in" in refused(folder)

    @pytest.mark.parametrize(("encoding", "separator"), [("utf-16", ","), ("utf-8-sig", ";")])
    def test_tables_of_spreadsheets(self, folder: Path, encoding: str, separator: str) -> None:
        lines = ["file_name,label", "1.png,1.0", "0.png,0.0"]
        text = "\r\n".join(lines).replace(",", separator)
        (folder / "metadata.csv").write_bytes(text.encode(encoding))
        assert labels(folder) == [1, 0]

    @pytest.mark.parametrize(
        ("text", "problem"),
        [
            ("name,label\n0.png,1\n", "has no column 'file_name'; it has name, label"),
            ("file_name,label\n0.png,1\n0.png,2\n", "names '0.png' twice"),
            ("file_name,label\n,1\n", "row 0 of"),
            ("", "metadata.csv is empty"),
            ("file_name,label\n0.png\n", "metadata.csv: line 2 has 1 values, its header 2: file_name, label"),
            ("file_name,label\n0.png,1\n./0.png,2\n", "names './0.png' twice"),
            ("file_name,label\n../0.png,1\n", "row 0 of"),
            ("file_name,label\n/0.png,1\n", "which lies outside of the table's folder"),
            ("file_name,label\n0.png,0.5\n1.png,1\n", "are no whole numbers: row 0 has 0.5"),
            ("file_name,label\n0.png,-1\n", "are negative"),
            ("file_name\n0.png\n", "and no 'label'"),
        ],
    )
    def test_a_table_of_no_use_is_refused(self, folder: Path, text: str, problem: str) -> None:
        (folder / "metadata.csv").write_text(text)
        assert problem in refused(folder)

    def test_several_tables_are_refused(self, folder: Path) -> None:
        for name in ("metadata.csv", "more/metadata.csv"):
            (folder / name).write_text("file_name,label\n2.png,1\n")
        assert "holds several tables of metadata: metadata.csv, more/metadata.csv" in refused(folder)


class TestDamage:
    @pytest.mark.parametrize("text", ["[]", "{", '{"_data_files": 3}', '{"_data_files": [{"x": 1}]}', "{}"])
    def test_a_damaged_state_is_named(self, tmp_path: Path, text: str) -> None:
        (tmp_path / "state.json").write_text(text)
        assert str(tmp_path) in refused(tmp_path)

    @pytest.mark.parametrize("text", ["[]", '{"splits": 3}', '{"splits": []}'])
    def test_a_damaged_list_of_splits_is_named(self, tmp_path: Path, text: str) -> None:
        (tmp_path / "dataset_dict.json").write_text(text)
        assert "dataset_dict.json" in refused(tmp_path)

    @pytest.mark.parametrize(
        "text",
        [
            "{",
            '{"info": null}',
            '{"info": {"features": {"image": 3}}}',
            '{"info": {"features": {"image": {"_type": "Nope"}}}}',
        ],
    )
    def test_damaged_metadata_of_a_table_are_one_message(self, tmp_path: Path, text: str) -> None:
        table = pa.table({"text": ["a"], "label": [0]}).replace_schema_metadata({"huggingface": text})
        parquet.write_table(table, tmp_path / "x.parquet")
        assert len(refused(tmp_path / "x.parquet").splitlines()) == 1

    def test_a_pipe_is_no_table(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "test.parquet")
        assert "is not a file but a pipe" in refused(tmp_path)
        assert "is neither a file nor a folder" in refused(tmp_path / "test.parquet")
        assert "does not exist" in refused(tmp_path / ("x" * 300))
