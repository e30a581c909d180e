"""Entropy less that of the running mean: what it pushes, and what it remembers."""

import json
import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from adamerge.errors import InputError
from adamerge.objectives import Balanced, Entropy, entropy_of

C = 4


def one_class(label: int, n_images: int = 8) -> Tensor:
    return 6 * torch.eye(C)[torch.full((n_images,), label)]


def gradient(objective: Balanced | Entropy, logits: Tensor) -> Tensor:
    leaf = logits.clone().requires_grad_()
    return torch.autograd.grad(objective(leaf, "cars"), leaf)[0]


def knowing(mean: Tensor, **options: float) -> Balanced:
    objective = Balanced(**options)
    objective.load_per_task_state({"cars": mean.tolist()})
    objective.begin_step()
    return objective


def draw(n_images: int = 6) -> Tensor:
    return 2 * torch.randn(n_images, C, generator=torch.Generator().manual_seed(0))


def test_where_the_running_mean_is_the_batchs_it_is_minus_the_mutual_information() -> None:
    logits = draw().requires_grad_()
    mean = logits.softmax(-1).mean(0)
    expected = entropy_of(logits).mean() + (mean * mean.log()).sum()
    assert_close(knowing(mean.detach())(logits, "cars"), expected)
    assert_close(gradient(knowing(mean.detach()), draw()), torch.autograd.grad(expected, logits)[0])


def test_it_begins_as_plain_entropy_less_a_constant() -> None:
    assert_close(gradient(Balanced(), draw()), gradient(Entropy(), draw()), rtol=0, atol=1e-6)
    difference = Entropy()(draw(), "cars") - Balanced(weight=0.5)(draw(), "cars")
    assert float(difference) == pytest.approx(0.5 * math.log(C))


def test_without_weight_it_is_plain_entropy() -> None:
    objective = knowing(torch.tensor([0.7, 0.1, 0.1, 0.1]), weight=0.0)
    assert torch.equal(objective(draw(), "cars"), Entropy()(draw(), "cars"))


def test_classes_that_predictions_crowd_into_are_pushed_back() -> None:
    crowded = knowing(torch.tensor([0.85, 0.05, 0.05, 0.05]))
    push = gradient(crowded, draw()) - gradient(Entropy(), draw())
    assert (push[:, 0] > 0).all()
    assert (push[:, 1:] <= 0).all()


def test_batches_of_one_class_in_turn_leave_the_mean_even() -> None:
    objective = Balanced()
    for step in range(20 * C):
        objective.begin_step()
        objective(one_class(step % C), "cars")
    objective.begin_step()
    assert all(abs(p - 1 / C) < 0.05 for p in objective.per_task_state()["cars"])
    pushed = (gradient(objective, one_class(1)) - gradient(Entropy(), one_class(1))).abs().max()
    mean = one_class(1).softmax(-1).mean(0)
    of_batch = knowing(mean)  # the batch's own mean in its place
    assert pushed < 0.1 * (gradient(of_batch, one_class(1)) - gradient(Entropy(), one_class(1))).abs().max()


@pytest.mark.parametrize(("n_images", "share"), [(1, 1 / 40), (8, 8 / 40), (40, 1.0), (99, 1.0)])
def test_a_batch_moves_the_mean_by_its_share_of_the_window(n_images: int, share: float) -> None:
    objective, logits = Balanced(window=10.0), draw(n_images)
    objective(logits, "cars")
    expected = (1 - share) / C + share * logits.softmax(-1).mean(0)
    assert_close(torch.tensor(objective.per_task_state()["cars"]), expected)


def test_a_second_pass_of_a_step_replaces_the_first() -> None:
    objective, other = Balanced(), Balanced()
    objective(one_class(0), "cars")
    second = objective(one_class(1), "cars")
    assert torch.equal(second, other(one_class(1), "cars"))
    assert objective.per_task_state() == other.per_task_state()


def test_tasks_are_remembered_apart_and_forgotten_together() -> None:
    objective = Balanced()
    objective(one_class(0), "cars")
    objective(torch.zeros(2, 9), "digits")
    assert [len(mean) for mean in objective.per_task_state().values()] == [C, 9]
    objective.forget()
    objective.begin_step()
    assert objective.per_task_state() == {}
    assert_close(gradient(objective, draw()), gradient(Entropy(), draw()), rtol=0, atol=1e-6)


def test_memory_survives_as_text_bit_for_bit() -> None:
    objective = Balanced()
    objective(draw(), "cars")
    again = Balanced()
    again.load_per_task_state(json.loads(json.dumps(objective.per_task_state())))
    assert torch.equal(again.means["cars"], objective.means["cars"])


def test_a_class_that_nothing_falls_into_stays_finite() -> None:
    objective = knowing(torch.tensor([1.0, 0.0, 0.0, 0.0]))
    assert torch.isfinite(gradient(objective, one_class(2))).all()


@pytest.mark.parametrize("options", [{"weight": -1.0}, {"window": 0.0}, {"weight": math.nan}])
def test_options_out_of_range_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(InputError, match=f"{next(iter(options))}=.* is (out of range|not finite)"):
        Balanced(**options)
