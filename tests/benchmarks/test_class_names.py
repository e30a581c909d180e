"""An expert's own class names against those of its test data, from the command line to the accuracy."""

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
import yaml
from conftest import draw
from pyarrow import parquet
from safetensors.torch import load_file, save_file
from tiny_networks import write_timm

from adamerge.cli import main
from adamerge.data.module import MultiTaskData
from adamerge.data.tasks import TaskSpec
from adamerge.models import open_backbone, open_heads

NAMES = ["red", "green", "blue"]  # in the order of the head's rows; folders come in another
PICTURES = [draw(seed, seed % 4) for seed in range(30)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[int]]:
    """A base and an expert whose head names its rows, and what the expert says of the pictures."""
    root = tmp_path_factory.mktemp("models")
    base = write_timm(root / "base", "vit", 3)
    write_timm(root / "expert", "vit", 3)
    backbone = open_backbone(root / "base")
    images = torch.stack([backbone.preprocess(picture) for picture in PICTURES])
    with torch.no_grad():
        features = backbone.features(base, images)
    weight = torch.randn(3, features.shape[1], generator=torch.Generator().manual_seed(0))
    bias = -weight @ features.mean(0)
    own = {n: t + 1e-5 * torch.randn(t.shape) for n, t in base.items()}
    save_file(own | {"head.weight": weight, "head.bias": bias}, root / "expert" / "model.safetensors")
    predicted = (features @ weight.T + bias).argmax(1).tolist()
    assert set(predicted) == {0, 1, 2}
    name_rows(root / "expert", NAMES)
    return root, predicted


def name_rows(expert: Path, names: list[str] | None) -> None:
    config = json.loads((expert / "config.json").read_text())
    config.pop("label_names", None)
    (expert / "config.json").write_text(json.dumps(config | ({"label_names": names} if names else {})))


def bench(root: Path, expert: Path, row: dict[str, Any], out: Path) -> tuple[int, float | None]:
    """Run the expert alone; give exit code and accuracy."""
    document = {
        "model": {"base": str(root / "base"), "experts": {"x": str(expert)}},
        "data": {"tasks": {"x": row}},
    }
    out.mkdir(exist_ok=True)
    (out / "bench.yaml").write_text(yaml.safe_dump(document))
    code = main(["bench", "run", str(out / "bench.yaml"), "--methods", "individual", "--out", str(out / "b")])
    file = out / "b" / "methods" / "individual" / "result.json"
    return code, json.loads(file.read_text())["accuracy"]["x"] if file.exists() else None


def write_folders(root: Path, names: list[str]) -> dict[str, Any]:
    for i, name in enumerate(names):
        (root / name).mkdir(parents=True, exist_ok=True)
        PICTURES[i].save(root / name / f"{i}.png")
    return {"test": str(root)}


def encoded(tmp_path: Path) -> list[dict[str, Any]]:
    rows = []
    for i, picture in enumerate(PICTURES):
        picture.save(tmp_path / f"{i}.png")
        rows.append({"bytes": (tmp_path / f"{i}.png").read_bytes(), "path": None})
    return rows


@pytest.mark.parametrize("classes", [[], ["blue", "green", "red"], NAMES], ids=["none", "sorted", "rows"])
def test_folders_are_matched_by_name(
    models: tuple[Path, list[int]], tmp_path: Path, classes: list[str]
) -> None:
    root, predicted = models
    names = ["Red", "green", "BLUE"]
    row = write_folders(tmp_path / "images", [names[row] for row in predicted])
    assert bench(root, root / "expert", row | {"classes": classes}, tmp_path) == (0, 100.0)


def test_classes_name_the_rows_of_a_classifier_that_does_not(
    models: tuple[Path, list[int]], tmp_path: Path
) -> None:
    root, predicted = models
    expert = Path(shutil.copytree(root / "expert", tmp_path / "expert"))
    name_rows(expert, None)
    row = write_folders(tmp_path / "images", [NAMES[row] for row in predicted])
    assert bench(root, expert, row | {"classes": NAMES}, tmp_path) == (0, 100.0)


def test_words_of_ones_own_stand_for_the_rows_one_by_one(
    models: tuple[Path, list[int]], tmp_path: Path
) -> None:
    root, predicted = models
    classes = ["rouge", "vert", "bleu"]
    source = written_words(tmp_path, [classes[row] for row in predicted])
    assert bench(root, root / "expert", {"test": source, "classes": classes}, tmp_path) == (0, 100.0)


def written_words(tmp_path: Path, labels: list[Any]) -> str:
    parquet.write_table(pa.table({"image": encoded(tmp_path), "label": labels}), tmp_path / "x.parquet")
    return str(tmp_path / "x.parquet")


def test_words_of_a_table_are_matched_by_name(models: tuple[Path, list[int]], tmp_path: Path) -> None:
    root, predicted = models
    source = written_words(tmp_path, [NAMES[row].upper() for row in predicted])
    assert bench(root, root / "expert", {"test": source}, tmp_path) == (0, 100.0)


def test_numbers_are_rows_or_classes_where_these_are_given(
    models: tuple[Path, list[int]], tmp_path: Path
) -> None:
    root, predicted = models
    assert bench(root, root / "expert", {"test": written_words(tmp_path, predicted)}, tmp_path / "a") == (
        0,
        100.0,
    )
    classes = ["blue", "red", "green"]
    source = written_words(tmp_path, [classes.index(NAMES[row]) for row in predicted])
    found = bench(root, root / "expert", {"test": source, "classes": classes}, tmp_path / "b")
    assert found == (0, 100.0)


@pytest.mark.parametrize(
    ("names", "classes", "rows", "message"),
    [
        (["red", "green", "violet"], [], NAMES, "the head's classes are [red, green, blue], the data have"),
        (["red", "green"], [], NAMES, "has 3 class names, its test images have 2"),
        (["a", "b"], [], None, "the head has 3 rows, its test images have 2 classes (a, b)"),
        (
            ["red", "green", "blue"],
            ["red", "blue", "violet"],
            NAMES,
            "class 1 is 'blue', which its head calls row 2",
        ),
        (
            ["red", "green", "blue"],
            ["red", "blue"],
            NAMES,
            "has 2 class names, its head has 3 rows (red, green, blue)",
        ),
    ],
)
def test_what_cannot_be_matched_is_refused(
    models: tuple[Path, list[int]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    names: list[str],
    classes: list[str],
    rows: list[str] | None,
    message: str,
) -> None:
    root, predicted = models
    expert = Path(shutil.copytree(root / "expert", tmp_path / "expert"))
    name_rows(expert, rows)
    row = write_folders(tmp_path / "images", [names[row % len(names)] for row in predicted])
    code, accuracy = bench(root, expert, row | {"classes": classes}, tmp_path)
    assert (code in (2, 3), accuracy) == (True, None)
    assert message in capsys.readouterr().err


def test_more_names_than_rows_are_refused(
    models: tuple[Path, list[int]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, predicted = models
    expert = Path(shutil.copytree(root / "expert", tmp_path / "expert"))
    name_rows(expert, [*NAMES, "violet"])
    row = write_folders(tmp_path / "images", [NAMES[row] for row in predicted])
    assert bench(root, expert, row, tmp_path) == (2, None)
    assert "has 3 rows and 4 class names beside them: red, green, blue, violet" in capsys.readouterr().err


def test_a_head_file_may_name_its_rows(models: tuple[Path, list[int]], tmp_path: Path) -> None:
    root, predicted = models
    state = load_file(root / "expert" / "model.safetensors")
    head = {"weight": state["head.weight"], "bias": state["head.bias"]}
    save_file(head, tmp_path / "head.safetensors", metadata={"classes": json.dumps(NAMES)})
    row = write_folders(tmp_path / "images", [NAMES[row] for row in predicted])
    row["head"] = str(tmp_path / "head.safetensors")
    data = MultiTaskData({"x": TaskSpec(**row)})
    data.use(open_backbone(root / "base"))
    data.use_heads(open_heads(root / "base", data.tasks, {}))
    files = sorted(Path(row["test"]).rglob("*.png"))
    by_file = dict(zip((file.stem for file in files), data.test("x").labels.tolist(), strict=True))
    assert [by_file[str(i)] for i in range(len(predicted))] == predicted
    assert data.class_names("x") == NAMES
    save_file(head, tmp_path / "head.safetensors")  # without names, the classes name its rows
    data = MultiTaskData({"x": TaskSpec(**row, classes=NAMES)})
    data.use(open_backbone(root / "base"))
    data.use_heads(open_heads(root / "base", data.tasks, {}))
    assert sorted(data.test("x").labels.tolist()) == sorted(predicted)


def test_the_check_of_the_data_knows_the_experts_names(
    models: tuple[Path, list[int]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, predicted = models
    write_folders(tmp_path / "good", [NAMES[row] for row in predicted])
    write_folders(tmp_path / "bad", [["red", "green", "violet"][row] for row in predicted])
    (tmp_path / "good" / "red" / "photo.heic").touch()
    tasks = {name: {"test": str(tmp_path / name)} for name in ("good", "bad")}
    experts = {name: str(root / "expert") for name in tasks}
    document = {"model": {"base": str(root / "base"), "experts": experts}, "data": {"tasks": tasks}}
    (tmp_path / "bench.yaml").write_text(yaml.safe_dump(document))
    assert main(["data", "check", "--benchmark", str(tmp_path / "bench.yaml")]) == 3
    told = capsys.readouterr().out.splitlines()
    assert [line for line in told if line.startswith("good, ")] == [
        "good, test: these were left out: red/photo.heic"
    ]
    (line,) = [line for line in told if line.startswith("bad, ")]
    assert "the head's classes are [red, green, blue], the data have [green, red, violet]." in line
