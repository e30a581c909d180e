"""`bench run` on a local mirror of the hub: every form of base and experts, and the gate."""

import csv
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import yaml
from builders import method
from datasets import ClassLabel, Dataset
from hub_mirror import CORRUPTED, N_TEST, TASKS, expert_id, write_mirror

from adamerge.benchmarks import Benchmark, Premises, define
from adamerge.cli import main
from adamerge.errors import InputError

METHODS = "zero_shot,individual,task_arithmetic,regmean,adamerging_layer_wise"
REACHED = 87.5


@pytest.fixture(scope="module")
def mirror(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("mirror")
    write_mirror(out)
    return out


@pytest.fixture
def other(mirror: Path, tmp_path: Path) -> Path:
    """A mirror to spoil."""
    return Path(shutil.copytree(mirror, tmp_path / "other"))


def bench(mirror: Path, out: Path, *more: str, name: str = "clip8", methods: str = "task_arithmetic") -> int:
    given = ["--mirror", str(mirror), "--expect", str(mirror / f"expect-{name}.yaml"), "--methods", methods]
    return main(["bench", "run", name, *given, "--out", str(out), "--trainer.max_steps", "2", *more])


def rows_of(out: Path) -> dict[str, dict]:
    """The rows that were computed here."""
    rows = json.loads((out / "results.json").read_text())["rows"]
    return {row["method"]: row for row in rows if not row["source"]}


@pytest.fixture(scope="module")
def table(mirror: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("table")
    assert bench(mirror, out, methods=METHODS) == 0
    return out


def test_every_expert_reaches_what_transformers_says(table: Path) -> None:
    rows = rows_of(table)
    assert list(rows) == METHODS.split(",")
    assert rows["individual"]["accuracy"] == dict.fromkeys(TASKS, REACHED)
    for row in rows.values():
        assert list(row["accuracy"]) == list(TASKS)
        assert row["transductive"] == []
        assert set(row["provenance"]["data"]) >= {f"{task} test" for task in TASKS}


def test_published_rows_of_the_same_checkpoints_stand_beside_ours(table: Path) -> None:
    lines = list(csv.DictReader((table / "results.csv").read_text().splitlines()))
    published = [line for line in lines if line["method"].startswith("published: ")]
    assert {line["source"] for line in lines if line not in published} == {"here"}
    assert all(line["source"].startswith("tanganke/fusion_bench") for line in published)
    [expert] = [line for line in published if line["method"] == "published: Fine-tuned (STL)"]
    assert (expert["sun397"], expert["mean"], expert["normalized"]) == ("75.0", "90.3", "100.0")
    assert (table / "accuracy.png").read_bytes().startswith(b"\x89PNG")


def test_the_report_tells_premises_choices_and_inputs(table: Path) -> None:
    report = (table / "report.md").read_text()
    for line in (
        "| published: Task Arithmetic (lambda=0.3) | 57.1 |",
        f"- dtd: {N_TEST} test images, expert 87.50 %, reached 87.50 %",
        "- activation: quick_gelu",
        "- nothing was waived",
        "- images to adapt on: the train split (disjoint from the test images)",
        "- adamerging_layer_wise: coefficients Learned(grouping=tensor, initial=0.3, clamp=off)",
        "- task_arithmetic: scale=0.3",
        "- weights of base: SHA-256",
    ):
        assert line in report


def test_the_written_configuration_reproduces_a_row(table: Path, tmp_path: Path) -> None:
    files = ["--config", str(table / "benchmark.yaml"), "--config", str(method("adamerging_layer_wise"))]
    run = tmp_path / "run"
    more = ["--trainer.max_steps", "2", "--run_dir", str(run), "--evaluate_experts", "false"]
    assert main(["fit", *files, *more]) == 0
    again = json.loads((run / "result.json").read_text())
    assert again["accuracy"] == rows_of(table)["adamerging_layer_wise"]["accuracy"]


def test_finished_rows_are_not_computed_again(mirror: Path, table: Path) -> None:
    kept = {path: path.stat().st_mtime_ns for path in (table / "methods").rglob("result.json")}
    assert len(kept) == len(METHODS.split(","))
    assert bench(mirror, table, methods=METHODS) == 0
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


def lora(mirror: Path) -> list[str]:
    return [f"--experts.{task}={mirror / 'lora' / task}" for task in TASKS]


@pytest.mark.parametrize("form", [lambda _: ["--form", "open_clip"], lora], ids=["open_clip", "lora"])
def test_other_forms_of_the_same_experts_give_the_same_rows(
    form: Callable[[Path], Sequence[str]], mirror: Path, table: Path, tmp_path: Path
) -> None:
    methods = "zero_shot,individual,task_arithmetic,adamerging_layer_wise"
    assert bench(mirror, tmp_path, *form(mirror), methods=methods) == 0
    expected, found = rows_of(table), rows_of(tmp_path)
    for name in ("zero_shot", "individual", "task_arithmetic"):  # layers have other names in open_clip
        assert found[name]["accuracy"] == expected[name]["accuracy"]
        assert found[name]["unknown"] == expected[name]["unknown"]


def test_a_swapped_expert_is_stopped(
    mirror: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    swapped = [f"--experts.cars={mirror / expert_id('dtd')}", f"--experts.dtd={mirror / expert_id('cars')}"]
    assert bench(mirror, tmp_path, *swapped) == 2
    told = capsys.readouterr().err
    for task in ("cars", "dtd"):
        assert f"{task}: the expert reaches" in told
    assert "87.50 % is expected (tolerance 1)" in told
    assert "--waive cars,dtd" in told
    assert not (tmp_path / "methods" / "task_arithmetic").exists()


def cut(mirror: Path, task: str = "tanganke/dtd") -> None:
    file = mirror / task / "data" / "test-00000-of-00001.parquet"
    Dataset.from_parquet(str(file), keep_in_memory=True).select(range(12)).to_parquet(file)


def change(mirror: Path, file: str, old: str, new: str) -> None:
    for path in mirror.rglob(file):
        path.write_text(path.read_text().replace(old, new))


def test_a_split_that_was_cut_is_stopped(
    other: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cut(other)
    assert bench(other, tmp_path / "out") == 3
    assert "dtd: 12 test images, 16 are expected" in capsys.readouterr().err
    assert not (tmp_path / "out" / "methods").exists()


def test_what_is_waived_by_name_goes_on_and_is_told(other: Path, tmp_path: Path) -> None:
    cut(other)
    assert bench(other, tmp_path / "out", "--waive", "dtd,svhn") == 0
    assert "- waived, dtd: 12 test images, 16 are expected" in (tmp_path / "out" / "report.md").read_text()
    row = rows_of(tmp_path / "out")["task_arithmetic"]
    assert row["normalized_mean"] == pytest.approx(
        row["mean"] / REACHED * 100, rel=0.02
    )  # by the gate's experts


def test_another_activation_is_stopped(
    other: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change(other, "config.json", '"quick_gelu"', '"gelu"')
    assert bench(other, tmp_path / "out") == 2
    assert "model: activation is gelu, the checkpoints need quick_gelu" in capsys.readouterr().err


def test_another_transform_is_stopped_beside_everything_else_that_is_wrong(
    other: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change(other, "preprocessor_config.json", '"resample": 3', '"resample": 2')
    change(other, "preprocessor_config.json", "0.4578275", "0.5")
    cut(other)
    file = other / "tanganke" / "eurosat" / "data" / "test-00000-of-00001.parquet"
    rows = Dataset.from_parquet(str(file), keep_in_memory=True)
    names = list(reversed(rows.features["label"].names))
    names[0] = "another name"  # the gate compares those that both have
    rows.cast_column("label", ClassLabel(names=names)).to_parquet(file)
    assert bench(other, tmp_path / "out") == 2
    told = capsys.readouterr().err
    for problem in (
        "model: preprocessing is not bicubic to 32 and a centre crop",
        "model: mean of pixels is",
        "dtd: 12 test images",
        "eurosat: classes stand in another order: 'annual crop land' is 0 here, 9 in the data",
    ):
        assert problem in told


def test_without_the_mirrors_own_premises_the_real_ones_hold(
    mirror: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--mirror", str(mirror), "--methods", "average", "--out", str(tmp_path)]
    assert main(["bench", "run", "clip8", *given]) == 2
    told = capsys.readouterr().err
    assert "sun397: 16 test images, 19850 are expected" in told
    assert "preprocessing gives [3, 32, 32], the checkpoints need [3, 224, 224]" in told


def test_adapting_on_test_images_is_called_transductive(mirror: Path, tmp_path: Path) -> None:
    methods = "regmean,average,adamerging_task_wise"
    more = ["--adapt_split", "test", "--data.batch_size", "8"]
    assert bench(mirror, tmp_path, *more, methods=methods) == 0
    rows = rows_of(tmp_path)
    assert rows["regmean"]["transductive"] == rows["adamerging_task_wise"]["transductive"] == list(TASKS)
    assert rows["average"]["transductive"] == []
    assert "as published: transductive" in (tmp_path / "report.md").read_text()


def test_unseen_tasks_are_evaluated_and_not_merged(mirror: Path, tmp_path: Path) -> None:
    methods = "individual,task_arithmetic,adamerging_task_wise"
    assert bench(mirror, tmp_path, name="clip8-unseen1", methods=methods) == 0
    rows = rows_of(tmp_path)
    assert set(rows["individual"]["accuracy"]) == set(TASKS) - {"mnist", "eurosat"}
    for name in ("task_arithmetic", "adamerging_task_wise"):
        row = rows[name]
        assert row["unseen"] == ["mnist", "eurosat"]
        assert row["unseen_mean"] == pytest.approx(
            (row["accuracy"]["mnist"] + row["accuracy"]["eurosat"]) / 2
        )
        assert row["normalized_mean"] is not None
    lines = list(csv.DictReader((tmp_path / "results.csv").read_text().splitlines()))
    [published] = [line for line in lines if line["method"] == "published: Layer-wise AdaMerging"]
    assert (published["mean"], published["unseen"], published["mnist"]) == ("80.5", "62.5", "77.7")


def test_corrupted_images_are_the_hubs_own_and_experts_pass_on_clean_ones(
    mirror: Path, tmp_path: Path
) -> None:
    assert bench(mirror, tmp_path, "--corruption", CORRUPTED, name="clip4") == 0
    tasks = yaml.safe_load((tmp_path / "benchmark.yaml").read_text())["data"]["tasks"]
    assert tasks["cars"]["test"] == f"{mirror}/tanganke/stanford_cars@{CORRUPTED}"
    assert (tmp_path / "clean" / "methods" / "individual" / "result.json").exists()
    lines = list(csv.DictReader((tmp_path / "results.csv").read_text().splitlines()))
    [published] = [line for line in lines if line["method"] == "published: Layer-wise AdaMerging"]
    assert (published["eurosat"], published["mean"]) == ("53.3", "71.4")
    report = (tmp_path / "report.md").read_text()
    assert "- experts passed the gate on clean images\n" in report
    assert (
        f"- corruption {CORRUPTED} (the hub's own split): test images only; images to adapt on are" in report
    )


def test_a_waiver_of_the_gate_on_clean_images_is_told(other: Path, tmp_path: Path) -> None:
    change(other, "expect-clip4.yaml", "cars: 87.5", "cars: 99.0")
    assert bench(other, tmp_path / "out", "--corruption", CORRUPTED, "--waive", "cars", name="clip4") == 0
    report = (tmp_path / "out" / "report.md").read_text()
    assert "- experts passed the gate on clean images, but for what is waived\n" in report
    assert "- on clean images: waived, cars: the expert reaches 87.50 %, 99.00 % is expected" in report


def test_a_transform_stated_alone_is_looked_at(mirror: Path, tmp_path: Path) -> None:
    definition = define("clip4", mirror=str(mirror))
    premises = Premises(
        transform={**(definition.premises.transform or {}), "size": 32, "mean": [0.5, 0.5, 0.5]}
    )
    with pytest.raises(InputError, match=r"model: mean of pixels is .*, the checkpoints need \[0.5"):
        Benchmark(definition.document, tmp_path, premises).run(["average"])
