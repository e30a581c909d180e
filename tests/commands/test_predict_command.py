"""`adamerge predict --model FOLDER`: one row per image, equal to what the model says, nothing left out."""

import io
import json
import shutil
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import pytest
from builders import make_task
from conftest import CLASSES, TASKS, draw
from datasets import Dataset, Features, Image
from pyarrow import parquet
from safetensors.torch import load_file, save_file

import adamerge
from adamerge import Oracle, Router
from adamerge.checkpoints import save
from adamerge.cli import main
from adamerge.coefficients import Routing
from adamerge.data.embedded import load_split
from adamerge.errors import AdamergeWarning
from adamerge.mixture import Mixture, save_mixture, write_companions
from adamerge.vectors import rebase


def write_model(clip: Path, folder: Path, routing: Routing | None) -> Path:
    """Write a routed model, or the static one that it shares."""
    task = make_task(clip)
    shared = task.vectors.merge(task.vectors.uniform(0.3))
    if routing is None:
        state = task.vectors.base_state() | shared
        companions = partial(write_companions, heads=task.heads, classes=CLASSES)
        return Path(save(state, folder, like=clip / "base", companions=companions))
    vectors = rebase(task.vectors, shared, "low_rank")
    mixture = Mixture(vectors, task.backbone, task.heads, routing, CLASSES)
    return save_mixture(mixture, folder, like=clip / "base")


@pytest.fixture(scope="module")
def routed(clip: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(clip, tmp_path_factory.mktemp("routed") / "model", Router("linear"))


@pytest.fixture(scope="module")
def static(clip: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(clip, tmp_path_factory.mktemp("static") / "model", None)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "predictions.parquet"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five images, of which the third lies deeper."""
    root = tmp_path / "images"
    (root / "c").mkdir(parents=True)
    for i, name in enumerate(("a.png", "b.png", "c/0.png", "d.png", "e.png")):
        draw(i, i % 3).save(root / name)
    return root


def predict(model: Path, data: object, out: Path, *more: str) -> int:
    return main(["predict", "--model", str(model), "--data", str(data), "--out", str(out), *more])


def rows_of(out: Path) -> dict[str, list]:
    return parquet.read_table(out).to_pydict()


def expected(model: Path, images: Iterable[object], size: int, task: str | None = None) -> dict[str, list]:
    """Ask the loaded model itself, batch by batch."""
    mixture, given = adamerge.load(model), list(images)
    names = ["task", "class", "class_name", "probability"]
    names += [] if mixture.routing is None else [f"weight_{t}" for t in TASKS]
    columns: dict[str, list] = {name: [] for name in names}
    for start in range(0, len(given), size):
        found = mixture.predict(given[start : start + size], task)
        weights = [] if found.weights is None else found.weights.T.tolist()
        parts = [found.task, found.label.tolist(), found.class_name, found.probability.tolist(), *weights]
        for name, part in zip(names, parts, strict=True):
            columns[name] += part
    return columns


@pytest.mark.parametrize("task", [None, "bars"])
@pytest.mark.parametrize("kind", ["routed", "static"])
def test_rows_are_what_the_model_says_bit_for_bit(
    kind: str, task: str | None, folder: Path, out: Path, request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue(kind)
    assert predict(model, folder, out, "--batch_size", "2", *(["--task", task] if task else [])) == 0
    rows = rows_of(out)
    images = [draw(i, i % 3) for i in range(5)]
    assert {name: rows.pop(name) for name in ("index", "path", "problem")} == {
        "index": [0, 1, 2, 3, 4],
        "path": [str(folder / name) for name in ("a.png", "b.png", "c/0.png", "d.png", "e.png")],
        "problem": [None] * 5,
    }
    assert rows == expected(model, images, 2, task)


def test_the_file_names_types_and_weights(routed: Path, static: Path, folder: Path, out: Path) -> None:
    predict(routed, folder, out)
    kinds = {field.name: str(field.type) for field in parquet.read_schema(out)}
    weights = {f"weight_{task}": "float" for task in TASKS}
    assert kinds == {
        **{"index": "int64", "path": "string", "task": "string", "class": "int64", "class_name": "string"},
        **{"probability": "float", **weights, "problem": "string"},
    }
    rows = rows_of(out)
    assert [sum(shares) for shares in zip(*(rows[name] for name in weights), strict=True)] == pytest.approx(
        [1] * 5
    )
    predict(static, folder, out, "--overwrite")
    assert not weights.keys() & set(parquet.read_schema(out).names)


class TestSources:
    def test_parquet_rows_and_datasets_folders(
        self, routed: Path, folder: Path, tmp_path: Path, out: Path
    ) -> None:
        pictures = Dataset.from_dict({"image": [draw(0, 0), draw(1, 1)], "label": [1, 0]})
        pictures.to_parquet(tmp_path / "rows.parquet")
        pictures.save_to_disk(tmp_path / "saved")
        want = expected(routed, [draw(0, 0), draw(1, 1)], 2)
        for source in ("rows.parquet", "saved"):
            assert predict(routed, tmp_path / source, out, "--overwrite") == 0
            rows = rows_of(out)
            assert rows["path"] == [None, None]
            assert {name: rows[name] for name in want} == want

    def test_embedded_images(self, routed: Path, out: Path) -> None:
        assert predict(routed, "embedded:digits/test", out) == 0
        images = load_split("digits", "test")[0]
        assert rows_of(out)["index"] == list(range(len(images)))

    def test_files_that_are_left_out_are_named(self, routed: Path, folder: Path, out: Path) -> None:
        (folder / "c" / "photo.heic").touch()
        (folder / ".DS_Store").touch()
        with pytest.warns(AdamergeWarning, match=r"--data: these were left out: c/photo\.heic\.$"):
            assert predict(routed, folder, out) == 0
        assert len(rows_of(out)["index"]) == 5
        Dataset.from_dict({"image": [draw(0, 0)]}).to_parquet(folder / "rows.parquet")
        with pytest.warns(AdamergeWarning, match=r"left out: a\.png, b\.png, c/0\.png, d\.png, e\.png\.$"):
            assert predict(routed, folder, out, "--overwrite") == 0
        assert len(rows_of(out)["index"]) == 1

    def test_nothing_is_there(
        self, routed: Path, tmp_path: Path, out: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "empty").mkdir()
        for source, told in (("empty", "holds no images"), ("nowhere", "does not exist")):
            assert predict(routed, tmp_path / source, out) == 3
            assert f"--data: {tmp_path / source} {told}" in capsys.readouterr().err
        assert not out.exists()


class TestDamage:
    def test_an_image_that_cannot_be_decoded_keeps_its_row(
        self, routed: Path, folder: Path, out: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        whole = expected(routed, [draw(i, i % 3) for i in (0, 2, 3, 4)], 9)
        (folder / "b.png").write_bytes(b"<html>not found</html>")
        assert predict(routed, folder, out) == 3
        complaint = capsys.readouterr().err
        assert "1 of 5 images cannot be decoded" in complaint
        assert f"{folder / 'b.png'} (cannot identify image file" in complaint
        assert "predictions.parquet is complete" in complaint
        rows = rows_of(out)
        assert rows["index"] == [0, 1, 2, 3, 4]
        assert [why is None for why in rows["problem"]] == [True, False, True, True, True]
        for name, values in whole.items():
            assert rows[name] == [values[0], None, *values[1:]]

    def test_one_in_a_hundred_is_a_warning(self, static: Path, tmp_path: Path, out: Path) -> None:
        stream = io.BytesIO()
        draw(0, 0).save(stream, format="png")
        images = [{"bytes": stream.getvalue(), "path": None}] * 99 + [{"bytes": b"", "path": None}]
        rows = Dataset.from_dict({"image": images}, Features({"image": Image()}))
        rows.to_parquet(tmp_path / "rows.parquet")
        with pytest.warns(AdamergeWarning, match=r"1 of 100 images cannot be decoded: row 99 \("):
            assert predict(static, tmp_path / "rows.parquet", out, "--batch_size", "33") == 0
        assert rows_of(out)["class"][97:] == [rows_of(out)["class"][0]] * 2 + [None]
        assert rows_of(out)["problem"][99] == "cannot identify image file"

    def test_where_none_can_be_decoded_nothing_is_written(
        self, routed: Path, tmp_path: Path, out: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "images").mkdir()
        (tmp_path / "images" / "a.png").touch()
        assert predict(routed, tmp_path / "images", out) == 3
        assert "none of 1 images can be decoded" in capsys.readouterr().err
        assert not out.exists()

    def test_probabilities_that_are_not_finite_are_refused(
        self, static: Path, folder: Path, tmp_path: Path, out: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        copy = Path(shutil.copytree(static, tmp_path / "copy"))
        weights = load_file(copy / "open_clip_model.safetensors")
        weights["visual.proj"][0, 0] = float("nan")
        save_file(weights, copy / "open_clip_model.safetensors")
        assert predict(copy, folder, out, "--task", "bars") == 2  # not as written
        document = json.loads((copy / "adamerge.json").read_text())
        (copy / "adamerge.json").write_text(json.dumps(document | {"files": {}}))
        assert predict(copy, folder, out, "--task", "bars") == 4
        assert (
            "of images 0 to 4, the model gives probabilities that are not finite" in capsys.readouterr().err
        )


REFUSED = [
    (["--task", "barz"], 2, "there is no task 'barz'.\nDid you mean 'bars'?"),
    (["--batch_size", "0"], 2, "batch_size=0."),
    (["--out", "predictions.csv"], 2, "--out predictions.csv does not end in .parquet."),
    (["--device", "gpu"], 2, "there is no device 'gpu'.\nUse cpu, cuda or cuda:NUMBER."),
    (["--device", "meta"], 5, "device 'meta' cannot be used: "),
    (["--model", "nowhere"], 2, "nowhere"),
    (["--data", "embedded:digits/tset"], 2, "Did you mean 'test'?"),
    (["--batches", "3"], 2, "unknown key batches.\nDid you mean 'batch_size'?"),
]


@pytest.mark.parametrize(("wrong", "code", "told"), REFUSED, ids=lambda value: str(value)[:30])
def test_what_is_wrong_is_told_in_three_lines_at_most(
    wrong: list[str],
    code: int,
    told: str,
    routed: Path,
    folder: Path,
    out: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert predict(routed, folder, out, *wrong) == code
    complaint = capsys.readouterr().err
    assert told in complaint
    assert len(complaint.strip().splitlines()) <= 3
    assert list(out.parent.iterdir()) == [folder]


def test_texts_are_no_images(
    static: Path, tmp_path: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "new.txt"
    file.write_text("a sentence\n")
    assert predict(static, file, out, "--task", "bars") == 3
    assert "new.txt holds texts, the model reads images." in capsys.readouterr().err


def test_an_output_is_replaced_only_when_asked(static: Path, folder: Path, out: Path) -> None:
    out.write_text("mine")
    assert predict(static, folder, out) == 2
    assert out.read_text() == "mine"
    assert predict(static, folder, out, "--overwrite") == 2  # nobody but its writer can replace that
    assert out.read_text() == "mine"
    out.unlink()
    for more in ((), ("--overwrite",)):
        assert predict(static, folder, out, *more) == 0
        assert len(rows_of(out)["class"]) == 5


def test_an_oracle_must_be_told_the_task(
    clip: Path, folder: Path, tmp_path: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_model(clip, tmp_path / "oracle", Oracle())
    assert predict(model, folder, out) == 2
    assert "it needs the true task" in capsys.readouterr().err
    assert predict(model, folder, out, "--task", "bars") == 0
    assert rows_of(out)["weight_bars"] == [1.0] * 5


def test_both_forms_of_the_command_are_found(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for line in ([], ["--model=x"], ["--data", "x"], ["--out=x"], ["--config", "none.yaml", "--out", "x"]):
        assert main(["predict", *line]) == 2
        assert "data.tasks" not in capsys.readouterr().err
    (tmp_path / "file.yaml").write_text("method: x\n")
    for line in (["--run_dir", "x"], ["--config", str(tmp_path / "file.yaml")], ["--model.base", "x"]):
        assert main(["predict", *line]) == 2
        assert "data.tasks is missing" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="0"):
        main(["predict", "--help"])
    shown = capsys.readouterr().out
    assert "--model MODEL" in shown
    assert "adamerge predict --config FILES" in shown
