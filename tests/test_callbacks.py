"""What a run leaves behind, and the guard that watches over it."""

import csv
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from builders import adapt, make_task, make_trainer, memory_data
from conftest import TASKS
from pytorch_lightning.callbacks import ModelCheckpoint
from safetensors import safe_open
from torch import Tensor

from adamerge import Entropy, InputError, Learned, MergeTask
from adamerge.callbacks import (
    CoefficientReport,
    CollapseGuard,
    Curves,
    MergedModel,
    Signs,
    StepBar,
    signs_of,
    write_coefficients,
)
from adamerge.checkpoints import open_checkpoint
from adamerge.errors import AdamergeWarning
from adamerge.objectives import Objective


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


def test_signs_of_health_on_predictions_that_can_be_counted_by_hand() -> None:
    def sure(classes: list[int]) -> torch.Tensor:
        return 100 * torch.nn.functional.one_hot(torch.tensor(classes), 4).float()

    signs = signs_of(sure([0, 0, 0, 1]), expert=sure([0, 1, 2, 1]))
    assert signs.top_share == pytest.approx(0.75)
    assert signs.agreement == pytest.approx(0.5)
    assert signs.marginal == pytest.approx((0.75 * 0.2876820 + 0.25 * 1.3862943) / 1.3862943, rel=1e-5)
    assert signs_of(sure([0, 1, 2, 3]), sure([0, 1, 2, 3])).marginal == pytest.approx(1)


class OneClass(Objective):
    """Drives one task into its first class, as entropy minimisation does when it collapses."""

    def forward(self, logits, task, teacher=None):
        return -logits.log_softmax(-1)[:, 0].mean() if task == "bars" else logits.sum() * 0


def strong(parameters):
    return torch.optim.SGD(parameters, lr=30.0)


def test_a_collapse_is_stopped_and_rolled_back(clip: Path) -> None:
    guard = CollapseGuard(every_n_steps=1, max_images=40, marginal=0.0, lost_agreement=9.0)
    task = make_task(clip, objective=OneClass(), optimizer=strong)
    pattern = r"collapse guard: stopped at step \d+ .*'bars' fall into one class.*rolled back to step"
    with pytest.warns(AdamergeWarning, match=pattern):
        learned = adapt(task, memory_data(n_adapt=200), 200, guard)
    best = guard.state_dict()["best"]
    assert task.global_step < 200
    assert torch.equal(learned, best["values"]["coefficients.values"])
    assert "'bars'" in guard.verdict


def test_a_look_merges_once_for_all_tasks(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task, merges = make_task(clip), []
    merge = task.evaluated
    monkeypatch.setattr(task, "evaluated", lambda: merges.append(task.global_step) or merge())
    adapt(task, memory_data(n_adapt=100), 2, CollapseGuard(every_n_steps=1))
    assert merges == [0, 1, 2]


def test_without_the_guard_the_same_run_does_collapse(clip: Path) -> None:
    task, data = make_task(clip, objective=OneClass(), optimizer=strong), memory_data(n_adapt=200)
    guard = CollapseGuard(every_n_steps=0)
    adapt(task, data, 200, guard)
    assert guard.verdict == ""
    assert task.global_step == 200
    share = (task.merged_logits("bars", data.held_out("bars")).argmax(1) == 0).float().mean()
    assert share > 0.9


def test_a_healthy_run_is_left_alone_and_few_images_are_not_judged(clip: Path) -> None:
    for n_adapt in (100, 20):
        watched = adapt(make_task(clip), memory_data(n_adapt=n_adapt), 4, CollapseGuard(every_n_steps=2))
        alone = adapt(make_task(clip), memory_data(n_adapt=n_adapt), 4)
        assert torch.equal(watched, alone)


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        ({"top_share": -1.0}, ""),
        ({"marginal": 1e9}, "marginal entropy"),
        ({"lost_agreement": -2.0}, "agrees"),
    ],
)
def test_each_sign_can_stop_a_run(clip: Path, limits: dict[str, float], reason: str) -> None:
    guard = CollapseGuard(every_n_steps=1, **limits)
    if not reason:  # a share may be as large as the expert's or the start's: nothing to stop
        adapt(make_task(clip), memory_data(n_adapt=100), 1, guard)
        assert guard.verdict == ""
        return
    with pytest.warns(AdamergeWarning, match=reason):
        adapt(make_task(clip), memory_data(n_adapt=100), 3, guard)
    assert "step 1" in guard.verdict


def test_a_run_that_was_stopped_stays_stopped(clip: Path) -> None:
    guard, again = CollapseGuard(every_n_steps=1, marginal=1e9), CollapseGuard(every_n_steps=1)
    with pytest.warns(AdamergeWarning, match="collapse guard"):
        adapt(make_task(clip), memory_data(n_adapt=100), 3, guard)
    again.load_state_dict(guard.state_dict())
    task = make_task(clip)
    adapt(task, memory_data(n_adapt=100), 3, again)
    assert task.global_step <= 1
    assert again.verdict == guard.verdict


def test_the_guard_remembers_across_a_resume(clip: Path) -> None:
    guard, again = CollapseGuard(every_n_steps=1), CollapseGuard(every_n_steps=1)
    adapt(make_task(clip), memory_data(n_adapt=100), 2, guard)
    again.load_state_dict(guard.state_dict())
    assert again.state_dict() == guard.state_dict() or torch.equal(
        *(each.state_dict()["best"]["values"]["coefficients.values"] for each in (again, guard))
    )


class Scripted(CollapseGuard):
    """Sees the agreements that a test has written down, by step."""

    agreements: Mapping[int, float] = {0: 0.5, 2: 0.7, 4: 0.9, 6: 0.6, 7: 0.8}
    cut_off_at = -1

    def _look(self, module: MergeTask) -> dict[str, Signs]:
        if module.global_step == self.cut_off_at:
            raise RuntimeError("cut off")
        return {"dots": Signs(1.0, 0.2, self.agreements[module.global_step])}


def watched(clip: Path, steps: int, *callbacks: pl.Callback, **options: Any) -> Tensor:
    """Adapt beside a guard that looks every second step."""
    task = make_task(clip, optimizer=partial(torch.optim.Adam, lr=1e-2))
    saves = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    trainer = make_trainer(steps, *callbacks, enable_checkpointing=saves)
    trainer.fit(task, datamodule=memory_data(n_adapt=100), **options)
    return task.coefficients.table()[1]


def test_a_run_ends_with_its_best_coefficients_or_its_last(clip: Path) -> None:
    assert torch.equal(watched(clip, 7, Scripted(2, keep="best")), watched(clip, 4))
    assert torch.equal(watched(clip, 7, Scripted(2)), watched(clip, 7))


@pytest.mark.parametrize(("at_the_end", "best"), [(0.95, 7), (0.9, 4)])
def test_the_end_is_looked_at_and_must_be_better(clip: Path, at_the_end: float, best: int) -> None:
    guard = Scripted(2, keep="best")
    guard.agreements = {**guard.agreements, 7: at_the_end}
    assert torch.equal(watched(clip, 7, guard), watched(clip, best))


def test_few_images_are_no_reason_to_go_back(clip: Path) -> None:
    task = make_task(clip)
    adapt(task, memory_data(n_adapt=20), 3, CollapseGuard(1, keep="best"))
    assert torch.equal(task.coefficients.table()[1], adapt(make_task(clip), memory_data(n_adapt=20), 3))


resuming = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")  # only the test saves


@resuming
@pytest.mark.parametrize("cut", [3, 4, 7])
def test_a_resumed_run_knows_its_best(clip: Path, tmp_path: Path, cut: int) -> None:
    saves = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    whole = watched(clip, 7, Scripted(2, keep="best"), saves)
    resumed = watched(clip, 7, Scripted(2, keep="best"), ckpt_path=tmp_path / f"step={cut}.ckpt")
    assert torch.equal(whole, resumed)
    assert torch.equal(whole, watched(clip, 4))


@resuming
def test_a_look_that_was_cut_off_is_taken_again(clip: Path, tmp_path: Path) -> None:
    saves = ModelCheckpoint(tmp_path, save_last=True, save_top_k=0, save_on_exception=True)
    guard = Scripted(2, keep="best")
    guard.cut_off_at = 4
    with pytest.raises(RuntimeError, match="cut off"):
        watched(clip, 7, guard, saves)
    resumed = watched(clip, 7, Scripted(2, keep="best"), ckpt_path=tmp_path / "last.ckpt")
    assert torch.equal(resumed, watched(clip, 4))


@pytest.mark.parametrize("options", [{"keep": "first"}, {"keep": "best", "every_n_steps": 0}])
@pytest.mark.usefixtures("unchecked")
def test_what_to_keep_must_be_known_and_seen(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="Use 'last', or 'best' with every_n_steps of 1 or more"):
        CollapseGuard(**options)


def test_progress_is_printed_in_tenths_where_there_is_no_terminal(
    clip: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapt(make_task(clip, Learned("task")), memory_data(), 20, StepBar("run"))
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("run: step")]
    assert len(lines) == 10
    assert lines[0].startswith("run: step 2/20, loss ")
