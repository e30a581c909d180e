"""`adamerge data check`: exit codes, the table, and manifests."""

import json
import shutil
from pathlib import Path

import pyarrow
import pytest
import yaml
from builders import write_benchmark
from conftest import CLASSES, TASKS
from pyarrow import parquet

from adamerge.arguments import parse
from adamerge.commands.data import data
from adamerge.errors import InputError


def run(*words: object) -> int:
    return data(**parse("adamerge data", [data], ["check", *map(str, words)], positional=True))


@pytest.fixture
def benchmark(clip: Path, pictures: Path, tmp_path: Path) -> Path:
    """A benchmark whose images the test may change."""
    root = Path(shutil.copytree(pictures, tmp_path / "pictures"))
    rows = {
        t: {"adapt": str(root / t / "adapt"), "test": str(root / t / "test"), "classes": CLASSES[t]}
        for t in TASKS
    }
    return write_benchmark(tmp_path, clip, rows)


def test_a_written_manifest_holds_until_something_changes(
    benchmark: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = tmp_path / "manifest.yaml"
    assert run("--benchmark", benchmark, "--write", manifest) == 0
    row = yaml.safe_load(manifest.read_text())["bars"]
    assert (row["n_test"], row["n_adapt"], len(row["digest"])) == (9, 12, 64)
    assert row["classes"] == ["0_flat", "1_steep", "2_upright"]
    assert run("--benchmark", benchmark, "--manifest", manifest) == 0
    (tmp_path / "pictures" / "bars" / "test" / "0_flat" / "0.png").unlink()
    capsys.readouterr()
    assert run("--benchmark", benchmark, "--manifest", manifest) == 3
    told = capsys.readouterr().out.splitlines()
    assert "bars, test: 8 images, 9 are expected" in told
    assert len([line for line in told if ": the digest is" in line]) == 1
    with pytest.raises(InputError, match="exists already"):
        run("--benchmark", benchmark, "--write", manifest)


def test_sources_of_the_command_line(pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--sources", f"bars={pictures}/bars@test", f"dots={pictures}/nowhere", "--json") == 3
    bars, dots = json.loads(capsys.readouterr().out)
    assert (bars["task"], bars["part"], bars["images"], bars["per_class"]) == ("bars", "test", 9, [3, 3, 3])
    assert "does not exist" in dots["problems"][0]


def test_texts_of_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parquet.write_table(pyarrow.table({"text": ["bad", "good"], "label": [0, 1]}), tmp_path / "x.parquet")
    assert run("--sources", f"mood={tmp_path / 'x.parquet'}") == 0
    out = capsys.readouterr().out
    assert "texts" in out
    assert "images" not in out


def test_a_clip_benchmark_knows_its_counts(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in (
        "tanganke/sun397",
        "tanganke/stanford_cars",
        "tanganke/resisc45",
        "tanganke/eurosat",
        "tanganke/gtsrb",
    ):
        shutil.copytree(pictures / "bars", tmp_path / name)
    for name in ("ufldl-stanford/svhn/cropped_digits", "ylecun/mnist", "tanganke/dtd"):
        shutil.copytree(pictures / "bars", tmp_path / name)
    for folder in tmp_path.glob("**/adapt"):
        folder.rename(folder.with_name("train"))
    assert run("--benchmark", "clip8", "--mirror", tmp_path) == 3
    told = capsys.readouterr().out
    assert "dtd, test: 9 images, 1880 are expected" in told
    assert "svhn, test: 9 images, 26032 are expected" in told


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "either --benchmark or --sources is needed"),
        (["--benchmark", "embeded"], "there is no benchmark 'embeded'.\nDid you mean 'embedded'"),
        (["--benchmark", "mine.yaml"], "the file mine.yaml does not exist.\nOr name one of: embedded, "),
        (["--benchmark", "my/tasks"], "the file my/tasks does not exist"),
        (["--sources", "images"], "a name is missing"),
        (["--sources", "a=b", "--manifest", "nowhere.yaml"], "--manifest nowhere.yaml cannot be read"),
    ],
)
def test_wrong_words_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        run(*words)
    with pytest.raises(InputError, match="there is no action 'chek'"):
        data("chek")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{a: {n_tests: 3}}", "'n_tests' is unknown.\nDid you mean 'n_test'"),
        ("{b: {}}", "'b', which is no task"),
    ],
)
def test_manifests_with_typing_errors_are_refused(tmp_path: Path, row: str, message: str) -> None:
    (tmp_path / "manifest.yaml").write_text(row)
    with pytest.raises(InputError, match=message):
        run("--sources", "a=b", "--manifest", tmp_path / "manifest.yaml")


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({}, "has no data.tasks.\nWrite data: {tasks: "),
        ({"data": {}}, "no tasks were given"),
        ({"data": {"tasks": {}}}, "no tasks were given"),
    ],
)
def test_a_file_without_tasks_is_refused(tmp_path: Path, document: dict, message: str) -> None:
    (tmp_path / "b.yaml").write_text(yaml.safe_dump(document))
    with pytest.raises(InputError, match=message):
        run("--benchmark", tmp_path / "b.yaml")


@pytest.mark.parametrize("model", [{}, {"model": None}, {"model": {}}, {"model": {"base": "nowhere"}}])
def test_data_are_checked_without_their_models(
    tmp_path: Path, model: dict, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x.csv").write_text("text,label\ngood,1\nbad,3\n")
    tasks = {"mood": {"test": str(tmp_path / "x.csv"), "classes": ["bad", "good", "fine"]}}
    (tmp_path / "b.yaml").write_text(yaml.safe_dump({"data": {"tasks": tasks}, **model}))
    assert run("--benchmark", tmp_path / "b.yaml") == 3
    assert "mood, test: 4 classes, the task has 3 names" in capsys.readouterr().out
