"""`adamerge evolve`: a search over a benchmark's adaptation images, a row beside model A's, a model."""

import json
from pathlib import Path
from typing import Any

import pytest
from builders import noise, write_benchmark
from conftest import TASKS

from adamerge import Entropy, InputError, MultiTaskData, load
from adamerge.benchmarks import Benchmark
from adamerge.cli import main
from adamerge.commands.evolve import _Opened
from adamerge.dataflow import Flow, Found, Genome, Step, search


@pytest.fixture
def opened(tmp_path: Path, clip: Path, rows: dict, monkeypatch: pytest.MonkeyPatch) -> _Opened:
    table = Benchmark(write_benchmark(tmp_path, clip, rows, holdout=0.5), tmp_path / "out")
    found = _Opened(table, "average", TASKS[:1], Entropy())

    def refuse(*_: object) -> None:
        raise AssertionError("test images were read")

    monkeypatch.setattr(MultiTaskData, "test", refuse)
    return found


def test_searching_and_selecting_read_no_test_image(opened: _Opened) -> None:
    found = search(opened.fitness(), opened.blocks, Genome(2, opened.count, 1), 1, population=4)
    flow, notes, details = opened.selected(found)
    assert details["winner"] == found.flow.document()
    assert notes == []
    assert flow == found.flow


def test_a_winner_that_held_out_images_do_not_prefer_is_dropped(opened: _Opened) -> None:
    start = Flow(opened.blocks, (Step(0, 0), Step(0, 1)))
    before = opened.fitness(held_out=True)(start)
    paths = [Flow(opened.blocks, (Step(1, b, s),)) for b in (0, 1) for s in (0.01, 1.0, 9.0)]
    worse = max(paths, key=opened.fitness(held_out=True))
    assert opened.fitness(held_out=True)(worse) > before
    flow, notes, details = opened.selected(Found(worse, 0.0, [], 1))
    assert flow == start
    assert "model A" in notes[0]
    assert details["winner"] == worse.document()


def evolve(benchmark: Path, out: Path, *more: str) -> int:
    given = ["--out", str(out), "--generations", "1", "--population", "4", "--start", "average"]
    return main(["evolve", str(benchmark), *given, *more])


def test_the_row_says_that_labels_were_read_and_the_model_loads(
    tmp_path: Path, clip: Path, rows: dict
) -> None:
    benchmark, out = write_benchmark(tmp_path, clip, rows), tmp_path / "out"
    assert evolve(benchmark, out, "--repeats", "1", "--donors", TASKS[1]) == 0
    found = json.loads((out / "results.json").read_text())["rows"]
    assert [row["method"] for row in found] == ["individual", "average", "evolved_cmaes_cross_entropy"]
    assert found[-1]["notes"][0] == "learned on labels of adaptation images"
    assert found[-1]["provenance"]["config"]["donors"] == [TASKS[1]]
    assert found[-1]["details"]["judged"] <= 6
    assert load(out / "merged").predict(noise(2, 0).images, task=TASKS[0]).task == [TASKS[0]] * 2
    assert "searched" in (out / "merged" / "README.md").read_text()


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (["--start", "tiez"], "no static method 'tiez'"),
        (["--donors", "horses"], "no expert 'horses'"),
        (["--objective", "magic"], "magic"),
    ],
)
def test_wrong_names_are_refused(
    tmp_path: Path, clip: Path, rows: dict, capsys: pytest.CaptureFixture, more: Any, reason: str
) -> None:
    assert evolve(write_benchmark(tmp_path, clip, rows), tmp_path / "out", *more) == InputError.exit_code
    assert reason in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
