"""`adamerge bench run`, and static merges that measure the experts on images."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from builders import write_benchmark
from conftest import TASKS
from safetensors.torch import load_file

import adamerge
from adamerge.cli import main
from adamerge.errors import AdamergeWarning


@pytest.fixture
def benchmark(tmp_path: Path, clip: Path, rows: dict[str, dict[str, object]]) -> Path:
    return write_benchmark(tmp_path, clip, rows)


def test_one_table_of_bounds_methods_and_oracles(benchmark: Path, tmp_path: Path) -> None:
    names = "zero_shot,individual,average,lines,fisher,regmean,regmean_pp,emr"
    out = tmp_path / "table"
    assert main(["bench", "run", str(benchmark), "--methods", names, "--out", str(out)]) == 0
    rows = json.loads((out / "results.json").read_text())["rows"]
    assert [row["method"] for row in rows] == names.split(",")
    assert all(set(row["accuracy"]) == set(TASKS) for row in rows)
    assert (out / "accuracy.png").exists()
    kept = {path: path.stat().st_mtime_ns for path in (out / "methods").rglob("result.json")}
    assert main(["bench", "run", str(benchmark), "--methods", "average", "regmean", "--out", str(out)]) == 0
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["walk", "embedded"], "there is no action 'walk'"),
        (["run", "embeded"], "Did you mean 'embedded'?"),
        (["run", "embedded", "--methods", "averag"], "Did you mean 'average'?"),
        (["run", "clip8", "--data.foo", "3"], "adamerge: --data.foo is unknown.\nKnown: batch_size,"),
    ],
)
def test_wrong_names(
    given: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *given, "--out", str(tmp_path / "table")]) == 2
    assert message in capsys.readouterr().err


def test_numbers_of_steps_are_of_the_rows_that_learn(benchmark: Path, tmp_path: Path) -> None:
    out, more = tmp_path / "table", ["--trainer.max_steps", "2", "--trainer.accelerator", "cpu"]
    names = "smile,adamerging_task_wise"
    assert main(["bench", "run", str(benchmark), "--methods", names, "--out", str(out), *more]) == 0
    for name, steps in (("smile", 0), ("adamerging_task_wise", 2)):
        trainer = yaml.safe_load((out / "methods" / name / "config.yaml").read_text())["trainer"]
        assert (trainer["max_steps"], trainer["accelerator"]) == (steps, "cpu")


@pytest.mark.parametrize("method", ["regmean", "fisher"])
def test_merge_measures_on_a_benchmarks_images(
    benchmark: Path, clip: Path, tmp_path: Path, method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    experts = [f"--experts={task}={clip / 'experts' / task}.safetensors" for task in TASKS]
    given = ["merge", method, "--base", str(clip / "base"), *experts, "--out", str(tmp_path / "out")]
    assert main(given) == 2
    assert "--data BENCHMARK.yaml" in capsys.readouterr().err
    assert main([*given, "--data", str(tmp_path / "nowhere.yaml")]) == 2
    assert main([*given, "--data", str(benchmark), "--samples", "5"]) == 0
    merged = load_file(tmp_path / "out" / "open_clip_model.safetensors")["visual.proj"]
    paths = {task: clip / "experts" / f"{task}.safetensors" for task in TASKS}
    average = adamerge.merge(adamerge.TaskVectors.open(clip / "base", paths), "average")["visual.proj"]
    assert 0 < (merged - average).norm() < 0.5 * average.norm()
    assert list((tmp_path / "out.statistics").iterdir())


def test_statistics_are_of_the_experts_as_they_are_and_of_the_images_in_use(
    benchmark: Path, clip: Path, tmp_path: Path
) -> None:
    experts = [f"--experts={task}={clip / 'experts' / task}.safetensors" for task in TASKS]

    def merged(out: str, *more: str) -> torch.Tensor:
        given = ["--base", str(clip / "base"), *experts, "--out", str(tmp_path / out), "--overwrite", "true"]
        assert main(["merge", "regmean", *given, "--data", str(benchmark), *more]) == 0
        return load_file(tmp_path / out / "open_clip_model.safetensors")["visual.proj"]

    plain, edited = merged("used"), merged("used", "--edit", "ties_trim")
    assert torch.equal(merged("fresh", "--edit", "ties_trim"), edited)
    assert torch.equal(merged("used"), plain)
    assert not torch.equal(plain, edited)

    document = yaml.safe_load(benchmark.read_text())
    benchmark.write_text(yaml.safe_dump(document | {"data": document["data"] | {"holdout": 0.5}}))
    assert not torch.equal(merged("used"), plain)
    assert torch.equal(merged("used"), merged("other"))


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("base: here", "benchmark"),
        ("model: [a", "YAML"),
        ("model: {base: b, experts: {}}\ndata: {tasks: [1]}", "benchmark"),
    ],
)
def test_a_file_that_is_no_benchmark(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str, what: str
) -> None:
    file = tmp_path / "some.yaml"
    file.write_text(text)
    assert main(["bench", "run", str(file), "--out", str(tmp_path / "out")]) == 2
    assert f"{file} is no {what}" in capsys.readouterr().err


def test_an_unknown_method_is_refused_before_the_first_row(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert main(["bench", "run", "embedded", "--methods", "zero_shot,tiess", "--out", str(out)]) == 2
    assert "Did you mean 'ties'" in capsys.readouterr().err
    assert not out.exists()


def test_a_row_that_fails_is_reported_and_the_others_go_on(
    benchmark: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "unfit.yaml"
    own.write_text(
        "method: unfit\nmodel: {coefficients: {class_path: adamerge.Oracle}}\ntrainer: {max_steps: 3}\n"
    )
    out, names = tmp_path / "table", f"zero_shot,{own},average"
    assert main(["bench", "run", str(benchmark), "--methods", names, "--out", str(out)]) == 2
    rows = json.loads((out / "results.json").read_text())["rows"]
    assert [row["method"] for row in rows] == ["zero_shot", "average"]
    errors = capsys.readouterr().err
    assert "unfit: failed: Oracle has nothing to learn" in errors
    assert "adamerge: 1 of 3 rows failed: unfit." in errors
    assert "unfit failed: Oracle has nothing to learn" in (out / "report.md").read_text()


def test_an_unexpected_failure_of_a_row_names_its_type(
    benchmark: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise KeyError("mnist")

    monkeypatch.setattr("adamerge.benchmarks.opened.Models.merged", fail)
    out = str(tmp_path / "table")
    assert main(["bench", "run", str(benchmark), "--methods", "average,individual", "--out", out]) == 1
    assert "average: failed: KeyError: 'mnist'" in capsys.readouterr().err


def test_force_reaches_every_row(
    clip: Path, rows: dict[str, dict[str, object]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    benchmark = write_benchmark(tmp_path, clip, rows)
    document = yaml.safe_load(benchmark.read_text())
    expert = Path(shutil.copytree(clip / "base", tmp_path / "expert"))
    shutil.copy(clip / "experts" / "dots.safetensors", expert / "open_clip_model.safetensors")
    settings = json.loads((expert / "open_clip_config.json").read_text())
    settings["preprocess_cfg"]["mean"] = [0.1, 0.1, 0.1]
    (expert / "open_clip_config.json").write_text(json.dumps(settings))
    document["model"]["experts"]["dots"] = str(expert)
    benchmark.write_text(yaml.safe_dump(document))
    line = ["bench", "run", str(benchmark), "--methods", "average,adamerging_task_wise"]
    line += ["--out", str(tmp_path / "out"), "--trainer.max_steps", "1"]
    assert main(line) == 2
    assert "--force true" in capsys.readouterr().err
    with pytest.warns(AdamergeWarning, match="mean"):
        assert main([*line, "--force", "true"]) == 0
