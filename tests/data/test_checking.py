"""What a source holds, and what differs from what was expected."""

import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from conftest import CLASSES, draw
from datasets import Dataset, Features, Image, Value
from pyarrow import parquet

from adamerge.data.checking import Report, check_source
from adamerge.data.tasks import TaskSpec


@pytest.fixture
def folder(pictures: Path, tmp_path: Path) -> Path:
    """Nine images of three classes."""
    return Path(shutil.copytree(pictures / "bars" / "test", tmp_path / "bars"))


def check(folder: Path, expected: dict[str, Any] | None = None, **row: Any) -> Report:
    return check_source(TaskSpec(test=str(folder), **row), "task 'bars', test images", expected)


def test_files_images_and_classes_are_counted(folder: Path) -> None:
    report = check(folder)
    assert (report.files, report.images, report.per_class) == (9, 9, (3, 3, 3))
    assert report.classes == ("0_flat", "1_steep", "2_upright")
    assert report.problems == report.undecodable == ()


def test_labels_of_adaptation_images_are_not_read(folder: Path) -> None:
    report = check_source(TaskSpec(adapt=str(folder)), "x", part="adapt")
    assert (report.images, report.classes, report.per_class) == (9, (), ())


def test_the_digest_is_of_the_images_and_labels_and_nothing_else(folder: Path, tmp_path: Path) -> None:
    files = sorted(folder.rglob("*.png"), reverse=True)
    columns = {
        "image": [{"bytes": file.read_bytes(), "path": None} for file in files],
        "label": [int(file.parent.name[0]) for file in files],
    }
    features = Features({"image": Image(), "label": Value("int64")})
    digests = []
    for label in (columns["label"][0], 0):
        columns["label"][0] = label
        Dataset.from_dict(columns, features).to_parquet(tmp_path / "x.parquet")
        digests.append(check(tmp_path / "x.parquet").digest)
    assert digests[0] == check(folder).digest != digests[1]


@pytest.mark.parametrize(
    ("expected", "problem"),
    [
        ({"images": 10}, "9 images, 10 are expected"),
        ({"classes": 4}, "3 classes, 4 are expected"),
        (
            {"classes": ["0_flat", "2_upright", "1 Steep"]},
            "at index 1: '2_upright' is expected, found '1_steep'",
        ),
        ({"classes": ["0_flat"]}, "3 classes, 1 are expected"),
        ({"digest": "0" * 64}, "000000000000... is expected"),
    ],
)
def test_every_difference_is_named(folder: Path, expected: dict[str, Any], problem: str) -> None:
    assert any(problem in found for found in check(folder, expected).problems)


def test_what_is_as_expected_is_no_problem(folder: Path) -> None:
    report = check(folder)
    known = {"images": 9, "classes": ["0 Flat", "1-steep", "2_upright"], "digest": report.digest}
    assert check(folder, known, classes=CLASSES["bars"]) == report


def test_faults_need_no_expectation(folder: Path, tmp_path: Path) -> None:
    (folder / "0_flat" / "0.png").write_bytes(b"")
    report = check(folder, classes=["flat"])
    assert "1 of 9 images cannot be decoded: 0_flat/0.png (" in report.problems[0]
    assert report.problems[1] == "3 classes, the task has 1 names"
    columns = {"image": [draw(0, 0), draw(1, 0)], "label": [-1, 0]}
    features = Features({"image": Image(), "label": Value("int64")})
    Dataset.from_dict(columns, features).to_parquet(tmp_path / "x.parquet")
    assert check(tmp_path / "x.parquet").problems == ("1 images have a negative label",)


def test_classes_in_another_order_than_the_folders_are_a_problem(folder: Path) -> None:
    (problem,) = check(folder, classes=["steep", "flat", "upright"]).problems
    assert problem.startswith("classes are [steep, flat, upright], the data have, in order, [0_flat, ")


def test_what_cannot_be_decoded_is_not_read_again(folder: Path, tmp_path: Path) -> None:
    (folder / "0_flat" / "9.png").symlink_to(tmp_path / "nowhere")
    report = check(folder)
    assert (report.images, len(report.undecodable)) == (10, 1)
    assert "1 of 10 images cannot be decoded: 0_flat/9.png (" in report.problems[0]
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    image = pa.array([{"bytes": None, "path": None}], kind)
    parquet.write_table(pa.table({"image": image, "label": [0]}), tmp_path / "x.parquet")
    assert check(tmp_path / "x.parquet").undecodable == ("row 0 (no image)",)


def test_texts_are_counted_and_hashed(tmp_path: Path) -> None:
    def report(**columns: list[Any]) -> Report:
        parquet.write_table(pa.table(columns), tmp_path / "x.parquet")
        return check(tmp_path / "x.parquet", {"images": 3})

    good = report(text=["bad", "good", "fine"], label=[0, 1, 1])
    assert (good.images, good.per_class, good.problems, good.kind) == (3, (1, 2), (), "texts")
    assert report(sentence=["fine", "bad", "good"], label=[1, 0, 1]).digest == good.digest
    assert report(text=["bad", "good", "fin"], label=[0, 1, 1]).digest != good.digest
    problems = report(text=["bad", None], label=[0, 1]).problems
    assert problems == ("1 of 2 texts cannot be decoded: row 1 (no text)", "2 texts, 3 are expected")


def test_what_cannot_be_read_is_a_problem(tmp_path: Path) -> None:
    assert "nowhere does not exist" in check(tmp_path / "nowhere").problems[0]
    assert check_source(TaskSpec("x"), "x").problems == ("no data were given",)


def test_embedded_tasks(tmp_path: Path) -> None:
    report = check(Path("embedded:mnist/test"), classes=[str(i) for i in range(10)])
    assert report.images == sum(report.per_class) > 0
    assert report.problems == ()
