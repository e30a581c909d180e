"""Objectives with a memory, of features and of the coefficients themselves, in MergeTask."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from builders import adapt, make_task, make_trainer, memory_data
from conftest import TASKS
from pytorch_lightning.callbacks import ModelCheckpoint

from adamerge import (
    Balanced,
    Consistency,
    Entropy,
    FeatureMatching,
    InputError,
    KLTeacher,
    Learned,
    Mixed,
    NaturalGradient,
    Prior,
    ReliableEntropy,
    SharpnessAware,
)
from adamerge.objectives import Objective

OBJECTIVES: dict[str, Callable[[], Objective]] = {
    "balanced": lambda: Balanced(window=2.0),
    "features": FeatureMatching,
    "all": lambda: Mixed(
        [ReliableEntropy(1.0), Balanced(window=2.0), KLTeacher(), FeatureMatching(), Consistency(), Prior()],
        [1.0, 0.5, 1.0, 1.0, 1.0, 0.2],
    ),
}


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")  # only the first run saves
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_resuming_is_bit_for_bit(clip: Path, tmp_path: Path, objective: str) -> None:
    def task():
        return make_task(clip, objective=OBJECTIVES[objective](), optimizer=sgd)

    saves = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=3, save_top_k=-1)
    whole, cut = task(), task()
    learned = adapt(whole, memory_data(), 7, saves, enable_checkpointing=True)
    make_trainer(7).fit(cut, datamodule=memory_data(), ckpt_path=tmp_path / "step=3.ckpt")
    assert torch.equal(learned, cut.coefficients.table()[1])
    assert whole.objective.per_task_state() == cut.objective.per_task_state()
    assert (learned - 0.3).abs().max() > 1e-3


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_sharpness_aware_steps_remember_once(clip: Path, objective: str) -> None:
    def flat(parameters):
        return SharpnessAware(parameters, base=sgd, rho=0.0)

    once = adapt(make_task(clip, objective=OBJECTIVES[objective](), optimizer=sgd), memory_data(), 4)
    twice = adapt(make_task(clip, objective=OBJECTIVES[objective](), optimizer=flat), memory_data(), 4)
    torch.testing.assert_close(once, twice, rtol=0, atol=0)


def test_features_match_where_the_merge_is_the_expert(clip: Path) -> None:
    task = make_task(clip, Learned("task", [1.0, 0.0, 0.0]), objective=FeatureMatching())
    adapt(task, memory_data(), 1)
    assert task.losses[TASKS[0]] == pytest.approx(0, abs=1e-6)
    assert all(task.losses[name] > 1e-3 for name in TASKS[1:])


@pytest.mark.parametrize("images_per_pass", [1, 8])
def test_consistency_compares_two_views_of_the_same_weights(clip: Path, images_per_pass: int) -> None:
    objective = Consistency(shift=0.2)
    task = make_task(clip, objective=objective, images_per_pass=images_per_pass)
    batch = next(iter(memory_data().train_dataloader()))[0]
    task.training_step(batch, 0)
    for name, part in batch.items():
        weights = task.weights(task.coefficients())
        clean, moved = (
            task.logits(weights, name, images)
            for images in (part["images"], objective.second_view(part["images"], name, 0))
        )
        assert task.losses[name] == pytest.approx(float(objective(moved, name, clean).detach()), rel=1e-4)
    adapt(still := make_task(clip, objective=Consistency(shift=0.0)), memory_data(), 1)
    assert still.losses == pytest.approx(dict.fromkeys(TASKS, 0.0), abs=1e-6)


@pytest.mark.parametrize("world", [1, 2])
def test_the_prior_adds_its_plain_gradient(clip: Path, world: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many processes there are: each has the whole prior, and their gradients are averaged."""
    batch = next(iter(memory_data().train_dataloader()))[0]
    everywhere = lambda found, here: found.__setitem__(slice(None), [here] * world)  # noqa: E731  # one process
    monkeypatch.setattr(torch.distributed, "all_gather_object", everywhere)
    plain, pulled = (
        make_task(clip, objective=o) for o in (Entropy(), Mixed([Entropy(), Prior()], [1.0, 0.5]))
    )
    gradients = []
    for task in (plain, pulled):
        monkeypatch.setattr(task, "_world_size", lambda: world)
        with torch.no_grad():
            task.coefficients.values += 0.25
        task.training_step(batch, 0).backward()
        gradients.append(task.coefficients.values.grad)
    torch.testing.assert_close(gradients[1] - gradients[0], torch.full_like(gradients[0], 0.5 * 2 * 0.25))


def test_processes_hear_of_each_others_running_means(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def gather(found, here):
        found[:] = [here, ({"dots": 0.5}, {"dots": [0.75, 0.25]})]

    task, data = make_task(clip, objective=Balanced()), memory_data()
    monkeypatch.setattr(task, "_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    batch = next(iter(data.train_dataloader()))[0]
    del batch["dots"]
    task.training_step(batch, 0)
    assert set(task.losses) == set(TASKS)
    assert task.objective.per_task_state()["dots"] == [0.75, 0.25]
    assert set(task.objective.per_task_state()) == set(TASKS)


def test_a_prior_keeps_coefficients_near_their_start(clip: Path) -> None:
    free, held = (
        adapt(make_task(clip, objective=objective, optimizer=sgd), memory_data(), 20)
        for objective in (Entropy(), Mixed([Entropy(), Prior()], [1.0, 4.0]))
    )
    assert 0 < (held - 0.3).norm() < 0.5 * (free - 0.3).norm()


@pytest.mark.parametrize("objective", [Prior, lambda: Mixed([Prior(), Prior()])])
def test_an_objective_that_reads_no_images_is_refused(clip: Path, objective: Callable[[], Objective]) -> None:
    with pytest.raises(InputError, match="alone moves nothing.\nAdd an objective of images: adamerge.Mixed"):
        make_task(clip, objective=objective())


def test_steps_on_the_tasks_gradients_alone_refuse_what_coefficients_cost(clip: Path) -> None:
    objective = Mixed([Entropy(), Prior()], [1.0, 0.1])
    with pytest.raises(InputError, match="NaturalGradient steps on the tasks' gradients alone"):
        adapt(make_task(clip, objective=objective, optimizer=NaturalGradient), memory_data(), 1)
