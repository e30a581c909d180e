"""The gate on a small benchmark: what it is told, what it refuses."""

from pathlib import Path

import pytest
import torch
import yaml
from builders import write_benchmark
from conftest import TASKS
from torch import nn

from adamerge.benchmarks import Benchmark, Premises
from adamerge.benchmarks.gate import Finding, check_accuracy, check_backbone, judge
from adamerge.benchmarks.opened import Models
from adamerge.cli import main
from adamerge.errors import DataError, InputError
from adamerge.models import ModuleBackbone


def with_gate(file: Path, gate: dict[str, float]) -> Path:
    document = yaml.safe_load(file.read_text())
    file.write_text(yaml.safe_dump({**document, "gate": gate}, sort_keys=False))
    return file


@pytest.fixture
def benchmark(tmp_path: Path, clip: Path, rows: dict) -> Path:
    return write_benchmark(tmp_path, clip, rows)


def reached(benchmark: Path, out: Path) -> dict[str, float]:
    return Benchmark(benchmark, out).run(["individual"])[0].accuracy


def test_a_benchmark_file_may_state_its_own_gate(
    benchmark: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    accuracy = reached(benchmark, tmp_path / "before")
    run = ["bench", "run", str(benchmark), "--methods", "average", "--out"]
    with_gate(benchmark, accuracy)
    assert main([*run, str(tmp_path / "right")]) == 0
    with_gate(benchmark, {**accuracy, "dots": accuracy["dots"] + 3})
    assert main([*run, str(tmp_path / "wrong")]) == 2
    assert "dots: the expert reaches" in capsys.readouterr().err
    assert main([*run, str(tmp_path / "wide"), "--gate.tolerance", "3.5"]) == 0
    assert main([*run, str(tmp_path / "waived"), "--waive", "dots"]) == 0
    assert "waived, dots: the expert reaches" in (tmp_path / "waived" / "report.md").read_text()


def test_the_gate_computes_the_individual_row_once(
    benchmark: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_gate(benchmark, reached(benchmark, tmp_path / "table"))
    monkeypatch.setattr(Models, "evaluate", lambda *_: pytest.fail("computed again"))
    assert Benchmark(benchmark, tmp_path / "table").run(["individual"])[0].accuracy


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--waive", "dot"], "Did you mean 'dots'?"),
        (["--gate.tolerence", "2"], "--gate.tolerence is unknown"),
        (["--expect", "nowhere.yaml"], "--expect nowhere.yaml cannot be read"),
        (["--data.batchsize", "2"], "--data.batchsize is unknown.\nDid you mean 'batch_size'"),
        (["--backbone", "ViT-B-32"], "--backbone is an option of the CLIP benchmarks"),
    ],
)
def test_wrong_premises(
    more: list[str], message: str, benchmark: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "table")
    assert main(["bench", "run", str(benchmark), "--methods", "average", "--out", out, *more]) == 2
    assert message in capsys.readouterr().err


def test_a_gate_of_an_unknown_task(benchmark: Path, tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match="the gate names task 'dot', and there is none.\nDid you mean 'dots'"
    ):
        Benchmark(with_gate(benchmark, {"dot": 1.0}), tmp_path)


def test_a_file_of_premises_has_known_keys(tmp_path: Path) -> None:
    file = tmp_path / "expect.yaml"
    file.write_text("accuracy: {dots: 50}\nimages: {dots: 9}\ntolerance: 2")
    found = Premises(accuracy={"bars": 40.0}, waived=("bars",)).expecting(file)
    assert (found.accuracy, found.images) == ({"bars": 40.0, "dots": 50}, {"dots": 9})
    assert (found.tolerance, found.waived, found.source) == (2, ("bars",), str(file))
    file.write_text("acuracy: {dots: 50}")
    with pytest.raises(InputError, match="unknown key 'acuracy'.\nDid you mean 'accuracy'"):
        found.expecting(file)


CLIP = {"size": 224, "interpolation": "bicubic", "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}


def test_a_part_of_the_preprocessing_may_be_stated(tmp_path: Path) -> None:
    file = tmp_path / "expect.yaml"
    file.write_text("transform: {size: 32}")
    assert Premises(transform=CLIP).expecting(file).transform == CLIP | {"size": 32}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("transform: {size: 32}", "transform lacks interpolation, mean, std"),
        ("transform: {sise: 32}", "unknown key 'sise'.\nDid you mean 'size'"),
        ("transform: {interpolation: cubic}", "interpolation 'cubic' is unknown.\nDid you mean 'bicubic'"),
        ("transform: {size: [32, 32]}", r"transform has size \[32, 32\]"),
        ("transform: {mean: 0.5}", "transform has mean 0.5"),
        ("transform: bicubic", "cannot be read"),
        ("images: {dots: many}", "cannot be read"),
        ("waived: [dots]", "unknown key 'waived'"),
    ],
)
def test_wrong_files_of_premises(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "expect.yaml"
    file.write_text(text)
    ours = Premises() if "lacks" in message else Premises(transform=CLIP)
    with pytest.raises(InputError, match=message):
        ours.expecting(file)


@pytest.mark.parametrize("part", ["accuracy: {dot: 50}", "images: {dot: 9}"])
def test_a_file_of_premises_names_known_tasks(
    part: str, benchmark: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "expect.yaml").write_text(part)
    more = ["--methods", "average", "--out", str(tmp_path / "out"), "--expect", str(tmp_path / "expect.yaml")]
    assert main(["bench", "run", str(benchmark), *more]) == 2
    assert "the gate names task 'dot', and there is none" in capsys.readouterr().err


@pytest.mark.parametrize(("value", "is_stopped"), [(50.0, False), (51.0, False), (51.1, True), (48.9, True)])
def test_an_expert_may_miss_its_accuracy_by_the_tolerance(value: float, is_stopped: bool) -> None:
    assert bool(check_accuracy(Premises(accuracy={"dots": 50.0}), {"dots": value})) == is_stopped


def test_an_accuracy_that_was_not_measured_is_found() -> None:
    [finding] = check_accuracy(Premises(accuracy={"dots": 50.0}), {"bars": 50.0})
    assert finding.task == "dots"
    assert finding.problem.startswith("accuracy was not measured")


def test_an_activation_stated_alone_is_looked_at(benchmark: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="model: activation is gelu, the checkpoints need quick_gelu"):
        Benchmark(benchmark, tmp_path / "out", Premises(activation="quick_gelu")).run(["average"])


def test_all_failures_come_in_one_message_and_tell_whose_they_are() -> None:
    data, model = Finding("dots", "9 test images"), Finding(None, "activation is gelu", InputError)
    with pytest.raises(DataError, match="dots: 9 test images"):
        judge([data], Premises())
    with pytest.raises(InputError, match="model: activation is gelu\n  dots: 9 test images"):
        judge([model, data], Premises())
    assert judge([data], Premises(waived=("dots",))) == ["waived, dots: 9 test images"]


class QuickGELU(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(1.702 * x)


@pytest.mark.parametrize(("act", "name"), [(QuickGELU(), "quick_gelu"), (nn.GELU(), "gelu")])
def test_an_activation_is_known_by_what_it_computes(act: nn.Module, name: str) -> None:
    backbone = ModuleBackbone(nn.Sequential(nn.Linear(2, 2), act))
    assert check_backbone(Premises(activation=name), backbone) == []
    [finding] = check_backbone(Premises(activation="relu"), backbone)
    assert finding.problem == f"activation is {name}, the checkpoints need relu"


def test_tasks_are_those_of_the_benchmark(benchmark: Path, tmp_path: Path) -> None:
    assert set(reached(benchmark, tmp_path / "table")) == set(TASKS)
