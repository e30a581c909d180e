"""Two levels: what the masks' step sees, and what it leaves."""

from pathlib import Path

import pytest
import torch
from builders import adapt, make_task, make_trainer, memory_data
from torch import nn
from torch.testing import assert_close

from adamerge import BiLevel, Concrete, Entropy, InputError, KLTeacher, Learned, Mixed, Perturbed, Router
from adamerge.errors import AdamergeWarning


class Problem:
    """A loss of one number and one mask; it remembers where it was asked."""

    def __init__(self, **options: float) -> None:
        self.number, self.mask = nn.Parameter(torch.tensor([0.3])), nn.Parameter(torch.tensor([0.5]))
        self.optimizer = BiLevel([self.number, self.mask], **options)
        self.asked: list[float] = []
        self.fixed = False

    def __call__(self) -> torch.Tensor:
        self.optimizer.zero_grad()
        self.asked.append(self.number.item())
        mask = self.mask.detach() if self.fixed else self.mask
        loss = (self.number * mask - 2).square().sum()
        loss.backward()
        return loss


def test_masks_move_by_their_gradient_at_the_moved_number_which_goes_back() -> None:
    problem = Problem(inner_lr=1.0, mask_lr=0.01)
    problem.optimizer.step(problem)
    assert problem.asked == pytest.approx([0.3, 1.3])  # Adam's first step is its rate
    assert problem.number.item() == pytest.approx(0.3)
    assert problem.mask.item() == pytest.approx(0.51)


def test_under_fixed_masks_it_is_adam_on_the_numbers_from_fresh_moments() -> None:
    problem = Problem(lr=0.02)
    for _ in range(3):
        problem.optimizer.step(problem)
    problem.fixed, mask = True, problem.mask.detach().clone()
    problem.asked = []
    for _ in range(4):
        problem.optimizer.step(problem)
    plain = nn.Parameter(torch.tensor([0.3]))
    adam = torch.optim.Adam([plain], lr=0.02)
    for _ in range(4):
        adam.zero_grad()
        (plain * mask - 2).square().sum().backward()
        adam.step()
    assert_close(problem.number, plain)
    assert torch.equal(problem.mask, mask)
    assert len(problem.asked) == 4  # one pass each


def make(parameters):
    return BiLevel(parameters, lr=0.01, inner_lr=0.1, mask_lr=0.1)


def dam(clip: Path, fix_after: int = 2):
    objective = Mixed([Entropy(), Perturbed(lr=0.05)], [1.0, 0.1])
    return make_task(clip, Concrete(fix_after=fix_after), objective=objective, optimizer=make)


def test_an_interrupted_dam_run_goes_on_bit_for_bit(clip: Path, tmp_path: Path) -> None:
    whole = dam(clip)
    adapt(whole, memory_data(), 3, max_epochs=-1)
    trainer = make_trainer(1, max_epochs=-1)
    with pytest.warns(AdamergeWarning, match="their turn after fix_after=2 steps, and max_steps=1"):
        trainer.fit(dam(clip), datamodule=memory_data())
    trainer.save_checkpoint(tmp_path / "step.ckpt")
    resumed = dam(clip)
    make_trainer(3, max_epochs=-1).fit(resumed, datamodule=memory_data(), ckpt_path=tmp_path / "step.ckpt")
    a, b = (dict(task.coefficients.state_dict()) for task in (whole, resumed))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert a["matrix.values"].unique().numel() > 1  # the last step moved the numbers
    a, b = (task.objective.per_task_state() for task in (whole, resumed))
    for task, (_, (perturbation, *_)) in a.items():
        assert torch.equal(perturbation, b[task][1][0])
        assert perturbation.abs().max() > 0.05


def test_what_is_evaluated_and_exported_has_no_noise_even_while_it_trains(clip: Path) -> None:
    task = make_task(clip, Concrete(), objective=Entropy(), optimizer=make)
    adapt(task, memory_data(), 1)
    task.coefficients.train()
    exported, evaluated = task.merged_state(), task.evaluated()
    assert task.coefficients.training
    expected = task.coefficients.eval()(task.vectors)
    assert all(torch.equal(exported[name], expected[name]) for name in task.read_names)
    assert all(torch.equal(evaluated[name], expected[name]) for name in task.read_names)


def test_it_is_refused_where_there_are_no_masks(clip: Path) -> None:
    for coefficients, message in (
        (Learned(), "found numbers and no masks"),
        (Router(), "needs numbers and masks"),
    ):
        task = make_task(clip, coefficients, objective=KLTeacher(), optimizer=make)
        with pytest.raises(InputError, match=message):
            adapt(task, memory_data(), 1)
    with pytest.raises(InputError, match="needs a closure"):
        Problem().optimizer.step()
