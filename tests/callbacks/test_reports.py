"""What a run leaves behind, and the guard that watches over it."""

import csv
from pathlib import Path

import pytest
import torch
from builders import adapt, make_task, memory_data
from conftest import TASKS
from safetensors import safe_open

from adamerge import Entropy, Learned
from adamerge.callbacks import (
    CoefficientReport,
    Curves,
    MergedModel,
    StepBar,
    write_coefficients,
)
from adamerge.checkpoints import open_checkpoint


def test_curves_have_a_line_per_step_and_a_picture(clip: Path, tmp_path: Path) -> None:
    task = make_task(clip)
    adapt(task, memory_data(), 3, Curves(tmp_path))
    lines = list(csv.DictReader((tmp_path / "curves.csv").read_text().splitlines()))
    assert [line["step"] for line in lines] == ["1", "2", "3"]
    assert {name: float(lines[-1][name]) for name in TASKS} == task.losses
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_curves_of_a_resumed_run_drop_what_is_done_again_and_cut_lines(clip: Path, tmp_path: Path) -> None:
    curves = Curves(tmp_path)
    (tmp_path / "curves.csv").write_text("step,circles,bars,dots\n0,1,1,1\n7,1,1,1\n1")
    adapt(make_task(clip), memory_data(), 2, curves)
    steps = [line["step"] for line in csv.DictReader((tmp_path / "curves.csv").read_text().splitlines())]
    assert steps == ["0", "1", "2"]


def test_coefficients_are_named_in_every_form(tmp_path: Path) -> None:
    values = torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.5, -0.6]])
    write_coefficients(tmp_path, ["cars", "pets"], ["a", "b", "c"], values)
    rows = list(csv.reader((tmp_path / "coefficients.csv").read_text().splitlines()))
    assert rows[0] == ["task", "a", "b", "c"]
    assert [float(cell) for cell in rows[2][1:]] == values[1].tolist()
    with safe_open(tmp_path / "coefficients.safetensors", "pt") as file:
        assert file.metadata()["groups"].split("\n") == ["a", "b", "c"]
        assert torch.equal(file.get_tensor("pets"), values[1])
    assert (tmp_path / "coefficients.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_that_fails_leaves_its_last_good_coefficients(clip: Path, tmp_path: Path) -> None:
    class Stops(Entropy):
        def begin_step(self) -> None:
            self.steps = getattr(self, "steps", 0) + 1
            if self.steps == 3:
                raise RuntimeError("stop here")

    task = make_task(clip, objective=Stops())
    with pytest.raises(RuntimeError, match="stop here"):
        adapt(task, memory_data(), 9, CoefficientReport(tmp_path))
    with safe_open(tmp_path / "coefficients.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor("bars"), task.coefficients.table()[1][1])


def test_the_merged_model_is_the_base_layout_with_merged_weights(clip: Path, tmp_path: Path) -> None:
    task = make_task(clip)
    adapt(task, memory_data(), 2, MergedModel(tmp_path / "merged", clip / "base", card="# a card"))
    written, base = open_checkpoint(tmp_path / "merged"), open_checkpoint(clip / "base")
    expected = task.merged_state()
    assert set(written) == set(base)
    assert all(torch.equal(written[name], expected[name]) for name in base)
    assert not torch.equal(written["visual.proj"], base["visual.proj"])
    assert (tmp_path / "merged" / "README.md").read_text() == "# a card"
    assert (tmp_path / "merged" / "open_clip_config.json").exists()


def test_progress_is_printed_in_tenths_where_there_is_no_terminal(
    clip: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapt(make_task(clip, Learned("task")), memory_data(), 20, StepBar("run"))
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("run: step")]
    assert len(lines) == 10
    assert lines[0].startswith("run: step 2/20, loss ")
