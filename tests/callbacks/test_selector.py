"""The selector: what it sees, what it keeps, when it stops a run, and how it resumes."""

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
from torch import Tensor

from adamerge import InputError, MergeTask
from adamerge.callbacks import (
    Selector,
    Signs,
    signs_of,
)
from adamerge.errors import AdamergeWarning
from adamerge.objectives import Objective


def test_signs_of_health_on_predictions_that_can_be_counted_by_hand() -> None:
    def sure(classes: list[int]) -> torch.Tensor:
        return 100 * torch.nn.functional.one_hot(torch.tensor(classes), 4).float()

    signs = signs_of(sure([0, 0, 0, 1]), expert=sure([0, 1, 2, 1]))
    assert signs.top_share == pytest.approx(0.75)
    assert signs.agreement == pytest.approx(0.5)
    assert signs.marginal == pytest.approx((0.75 * 0.2876820 + 0.25 * 1.3862943) / 1.3862943, rel=1e-5)
    assert signs_of(sure([0, 1, 2, 3]), sure([0, 1, 2, 3])).marginal == pytest.approx(1)
    assert signs.reliable == 1
    assert signs_of(torch.zeros(3, 4), torch.zeros(3, 4)).reliable == 0
    half = torch.tensor([[0.5, 0.5]]).log()
    certain, sign = torch.tensor([[0.9, 0.1]]).log(), signs_of(half, torch.tensor([[0.9, 0.1]]).log())
    assert sign.teacher_kl == pytest.approx((0.9 * 0.5877867 - 0.1 * 1.6094379) / 0.6931472, rel=1e-5)
    assert signs_of(certain, certain).teacher_kl == pytest.approx(0, abs=1e-7)


def test_being_surer_is_neither_nearer_to_the_expert_nor_farther() -> None:
    ours, noise = 2 * torch.randn(2, 40, 5, generator=torch.Generator().manual_seed(0))
    expert = ours + 0.3 * noise
    sign, surer = signs_of(ours, expert), signs_of(4 * ours, expert)
    assert surer.teacher_kl == pytest.approx(sign.teacher_kl, rel=1e-5)
    assert surer.reliable > sign.reliable


class OneClass(Objective):
    """Drives one task into its first class, as entropy minimisation does when it collapses."""

    def forward(self, logits, task, teacher=None):
        return -logits.log_softmax(-1)[:, 0].mean() if task == "bars" else logits.sum() * 0


def strong(parameters):
    return torch.optim.SGD(parameters, lr=30.0)


def test_a_collapse_is_stopped_and_rolled_back(clip: Path) -> None:
    selector = Selector(every_n_steps=1, max_images=40, marginal=0.0, lost_agreement=9.0, keep="last")
    task = make_task(clip, objective=OneClass(), optimizer=strong)
    pattern = r"selector: stopped at step \d+ .*'bars' fall into one class.*rolled back to step"
    with pytest.warns(AdamergeWarning, match=pattern):
        learned = adapt(task, memory_data(n_adapt=200), 200, selector)
    best = selector.state_dict()["best"]
    assert task.global_step < 200
    assert torch.equal(learned, best["values"]["coefficients.values"])
    assert "'bars'" in selector.verdict


def test_a_look_merges_once_for_all_tasks(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task, merges = make_task(clip), []
    merge = task.evaluated
    monkeypatch.setattr(task, "evaluated", lambda: merges.append(task.global_step) or merge())
    adapt(task, memory_data(n_adapt=100), 2, Selector(every_n_steps=1))
    assert merges == [0, 1, 2]


def test_without_the_selector_the_same_run_does_collapse(clip: Path) -> None:
    task, data = make_task(clip, objective=OneClass(), optimizer=strong), memory_data(n_adapt=200)
    selector = Selector(every_n_steps=0)
    adapt(task, data, 200, selector)
    assert selector.verdict == ""
    assert task.global_step == 200
    share = (task.merged_logits("bars", data.held_out("bars")).argmax(1) == 0).float().mean()
    assert share > 0.9


def test_a_healthy_run_is_left_alone_and_few_images_are_not_judged(clip: Path) -> None:
    for n_adapt in (100, 15):
        selector = Selector(every_n_steps=2, keep="last")
        watched = adapt(make_task(clip), memory_data(n_adapt=n_adapt), 4, selector)
        alone = adapt(make_task(clip), memory_data(n_adapt=n_adapt), 4)
        assert torch.equal(watched, alone)
        assert set(selector._images) == (set() if n_adapt == 15 else set(TASKS))


def test_where_few_images_are_held_out_all_are_looked_at(clip: Path) -> None:
    selector = Selector(every_n_steps=2)
    adapt(make_task(clip), memory_data(n_adapt=20), 2, selector)
    assert {task: len(images) for task, images in selector._images.items()} == dict.fromkeys(TASKS, 20)


def test_no_test_image_and_no_label_is_read(clip: Path) -> None:
    """The data module has no test images, and would say so; adaptation images have no labels to read."""
    data = memory_data(n_adapt=100)
    for task in TASKS:
        del data._loaded[task, "test"]
    selector = Selector(every_n_steps=1)
    adapt(make_task(clip), data, 3, selector)
    assert selector.state_dict()["best"]["values"]
    assert all(images.labels is None for images in selector._images.values())
    assert {part for _, part in data._loaded} == {"adaptation"}


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        ({"top_share": -1.0}, ""),
        ({"marginal": 1e9}, "marginal entropy"),
        ({"lost_agreement": -2.0}, "agrees"),
    ],
)
def test_each_sign_can_stop_a_run(clip: Path, limits: dict[str, float], reason: str) -> None:
    selector = Selector(every_n_steps=1, keep="last", **limits)
    if not reason:  # a share may be as large as the expert's or the start's: nothing to stop
        adapt(make_task(clip), memory_data(n_adapt=100), 1, selector)
        assert selector.verdict == ""
        return
    with pytest.warns(AdamergeWarning, match=reason):
        adapt(make_task(clip), memory_data(n_adapt=100), 3, selector)
    assert "step 1" in selector.verdict


def test_a_run_that_was_stopped_stays_stopped(clip: Path) -> None:
    selector, again = (Selector(every_n_steps=1, marginal=m, keep="last") for m in (1e9, 0.5))
    with pytest.warns(AdamergeWarning, match="selector"):
        adapt(make_task(clip), memory_data(n_adapt=100), 3, selector)
    again.load_state_dict(selector.state_dict())
    task = make_task(clip)
    adapt(task, memory_data(n_adapt=100), 3, again)
    assert task.global_step <= 1
    assert again.verdict == selector.verdict


def test_the_selector_remembers_across_a_resume(clip: Path) -> None:
    selector, again = Selector(every_n_steps=1), Selector(every_n_steps=1)
    adapt(make_task(clip), memory_data(n_adapt=100), 2, selector)
    again.load_state_dict(selector.state_dict())
    ours, theirs = (each.state_dict()["best"]["values"] for each in (again, selector))
    assert torch.equal(ours["coefficients.values"], theirs["coefficients.values"])
    assert again._start == selector._start


class Scripted(Selector):
    """Sees the signs that a test has written down, by step; the two scores agree."""

    agreements: Mapping[int, float] = {0: 0.5, 2: 0.7, 4: 0.9, 6: 0.6, 7: 0.8}
    cut_off_at = -1

    def _look(self, module: MergeTask) -> dict[str, Signs]:
        if module.global_step == self.cut_off_at:
            raise RuntimeError("cut off")
        agreement = self.agreements[module.global_step]
        return {"dots": Signs(1.0, 0.2, agreement, 1 - agreement, 0.5)}


def watched(clip: Path, steps: int, *callbacks: pl.Callback, **options: Any) -> Tensor:
    """Adapt beside a selector that looks every second step."""
    task = make_task(clip, optimizer=partial(torch.optim.Adam, lr=1e-2))
    saves = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    trainer = make_trainer(steps, *callbacks, enable_checkpointing=saves)
    trainer.fit(task, datamodule=memory_data(n_adapt=100), **options)
    return task.coefficients.table()[1]


def test_a_run_ends_with_its_best_coefficients_or_its_last(clip: Path) -> None:
    assert torch.equal(watched(clip, 7, Scripted(2, keep="best")), watched(clip, 4))
    assert torch.equal(watched(clip, 7, Scripted(2, score="agreement")), watched(clip, 4))
    assert torch.equal(watched(clip, 7, Scripted(2, keep="last")), watched(clip, 7))


def test_agreement_is_told_of_the_state_that_is_kept(clip: Path) -> None:
    selector = Scripted(2)
    watched(clip, 7, selector)
    assert selector.agreement == {"dots": {"start": 50, "now": 90}}
    assert Scripted(2, keep="last").agreement == Selector().agreement == {}


def test_a_run_without_a_better_look_loses_patience_and_goes_back(clip: Path) -> None:
    with pytest.warns(AdamergeWarning, match="stopped at step 6 .*1 looks without a better teacher_kl"):
        assert torch.equal(watched(clip, 20, Scripted(2, patience=1)), watched(clip, 4))


def test_a_state_in_which_a_task_has_collapsed_is_never_the_best(clip: Path) -> None:
    selector = Scripted(2, lost_agreement=-0.5)  # less than a gain of 0.5 counts as a collapse here
    watched(clip, 7, selector)
    assert selector.state_dict()["last"]  # it ended, and went back
    assert selector.state_dict()["best"]["step"] == 0
    assert selector.verdict == ""


@pytest.mark.parametrize(("at_the_end", "best"), [(0.95, 7), (0.9, 4)])
def test_the_end_is_looked_at_and_must_be_better(clip: Path, at_the_end: float, best: int) -> None:
    selector = Scripted(2, keep="best")
    selector.agreements = {**selector.agreements, 7: at_the_end}
    assert torch.equal(watched(clip, 7, selector), watched(clip, best))


def test_few_images_are_no_reason_to_go_back(clip: Path) -> None:
    task = make_task(clip)
    adapt(task, memory_data(n_adapt=15), 3, Selector(1))
    assert torch.equal(task.coefficients.table()[1], adapt(make_task(clip), memory_data(n_adapt=15), 3))


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
    selector = Scripted(2, keep="best")
    selector.cut_off_at = 4
    with pytest.raises(RuntimeError, match="cut off"):
        watched(clip, 7, selector, saves)
    resumed = watched(clip, 7, Scripted(2, keep="best"), ckpt_path=tmp_path / "last.ckpt")
    assert torch.equal(resumed, watched(clip, 4))


@pytest.mark.parametrize("options", [{"keep": "first"}, {"score": "loss"}])
@pytest.mark.usefixtures("unchecked")
def test_what_to_keep_must_be_known_and_seen(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="Keep the 'best' or the 'last'"):
        Selector(**options)


@resuming
@pytest.mark.parametrize("cut", [2, 4, 5])
def test_a_resumed_run_has_as_much_patience(clip: Path, tmp_path: Path, cut: int) -> None:
    class Falling(Scripted):
        agreements: Mapping[int, float] = {0: 0.9, 2: 0.8, 4: 0.7, 6: 0.6}

    stops = "stopped at step 6 .*3 looks without"
    saves = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    with pytest.warns(AdamergeWarning, match=stops):
        whole = watched(clip, 20, Falling(2, patience=3), saves)
    with pytest.warns(AdamergeWarning, match=stops):
        resumed = watched(clip, 20, Falling(2, patience=3), ckpt_path=tmp_path / f"step={cut}.ckpt")
    assert torch.equal(whole, resumed)
