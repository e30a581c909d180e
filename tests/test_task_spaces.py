"""Finer coefficient spaces under the trainer: the same steps, the same export, the same checkpoints."""

from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from builders import adapt, make_task, make_trainer, memory_data
from conftest import TASKS
from torch.testing import assert_close

from adamerge import (
    Components,
    Concrete,
    Elements,
    FeatureMatching,
    FrankWolfe,
    InputError,
    KLTeacher,
    Learned,
    RandomSearch,
)
from adamerge.spaces import Space


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.05)


def literal_gradient(task, batch) -> dict[str, torch.Tensor]:
    """One graph through the merge, all losses summed."""
    space = task.coefficients
    weights = space(task.vectors)
    loss = torch.zeros(())
    for name in TASKS:
        expert = task.vectors.merge(task.vectors.one_hot(name))
        ours, theirs = (task.backbone.features(w, batch[name]["images"]) for w in (weights, expert))
        loss = loss + task.objective(ours, name, theirs)
    values = dict(space.named_parameters())
    found = torch.autograd.grad(loss, list(values.values()), allow_unused=True)
    return {k: torch.zeros_like(values[k]) if g is None else g for k, g in zip(values, found, strict=True)}


@pytest.mark.parametrize("space", [Components("weight"), Elements()], ids=["components", "elements"])
def test_a_step_goes_down_the_gradient_of_the_literal_loss(clip: Path, space: Space) -> None:
    task = make_task(clip, space, objective=FeatureMatching(), optimizer=sgd)
    data = memory_data()
    batch = {name: next(iter(data._stream(name))) for name in TASKS}
    before = {name: value.detach().clone() for name, value in space.named_parameters()}
    expected = literal_gradient(task, batch)
    adapt(task, data, 1)
    for name, value in space.named_parameters():
        assert_close(value.detach(), before[name] - 0.05 * expected[name], rtol=1e-4, atol=1e-6)
    assert max(g.abs().max() for g in expected.values()) > 1e-4


def test_what_is_exported_is_what_is_evaluated(clip: Path) -> None:
    task = make_task(clip, Components(keep=0.5), objective=KLTeacher(), optimizer=sgd)
    adapt(task, memory_data(), 2)
    exported, evaluated = task.merged_state(), task.evaluated()
    assert all(torch.equal(exported[name], evaluated[name]) for name in task.backbone.names)


def test_weights_of_all_components_at_first_step_like_numbers_alone(clip: Path) -> None:
    """At the start both spaces are task arithmetic: losses of the first step are equal."""
    losses = []
    for coefficients in (Learned(), Components("weight")):
        task = make_task(clip, coefficients, objective=KLTeacher(), optimizer=sgd)
        adapt(task, memory_data(), 1)
        losses.append(task.losses)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_masks_that_are_fixed_do_not_move_by_momentum(clip: Path) -> None:
    def masks(steps: int) -> dict[str, torch.Tensor]:
        space = Concrete(learn_numbers=False, fix_after=2)
        adapt(make_task(clip, space, objective=KLTeacher()), memory_data(), steps)
        return {name: value.detach() for name, value in space.fine.items()}

    fixed, later = masks(2), masks(4)
    assert all(torch.equal(fixed[name], later[name]) for name in fixed)
    assert any(value.abs().max() > 0 for value in fixed.values())


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("make", "found"),
    [(lambda: Components("weights"), "kind='weights'"), (lambda: Elements("rows"), "per='rows'")],
)
def test_unknown_kinds_of_coefficients_are_refused(make, found: str) -> None:
    with pytest.raises(InputError, match=f"{found} is unknown"):
        make()


def test_optimizers_of_a_matrix_refuse_finer_coefficients(clip: Path) -> None:
    task = make_task(clip, Components(), objective=KLTeacher(), optimizer=FrankWolfe)
    with pytest.raises(InputError, match="FrankWolfe needs one matrix"):
        make_trainer(1).fit(task, datamodule=memory_data())


def test_the_learning_rate_falls_to_zero_as_a_function_of_the_step(clip: Path) -> None:
    """So a run that is resumed has the rates of one that was not."""
    task = make_task(clip, objective=KLTeacher(), optimizer=sgd, decay="linear")
    rates: list[float] = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer, *_: object) -> None:
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    adapt(task, memory_data(), 4, Watch())
    assert rates == pytest.approx([0.05, 0.0375, 0.025, 0.0125])


def test_a_search_has_no_rate_to_decay(clip: Path) -> None:
    task = make_task(clip, objective=KLTeacher(), optimizer=RandomSearch, decay="linear")
    with pytest.raises(InputError, match="no learning rate to decay"):
        make_trainer(1).fit(task, datamodule=memory_data())
