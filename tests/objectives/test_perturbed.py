"""The universal perturbation of a task's images."""

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from adamerge.errors import InputError
from adamerge.objectives import Consistency, Mixed, Perturbed


def images(n_images: int = 6, size: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (n_images, 3, size, size), generator=generator, dtype=torch.uint8)


def model(inputs: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    weights = (torch.randn(5, inputs[0].numel(), generator=generator) / 255).requires_grad_()
    return inputs.float().flatten(1) @ weights.T


def one_step(objective: Perturbed, passes: int = 1) -> Tensor:
    """Give the perturbed images of a step."""
    objective.begin_step()
    for _ in range(passes):
        view = objective.second_view(images(), "cars", 0)
        objective(model(view), "cars", model(images()).detach()).backward()
    return view.detach()


def test_it_starts_with_the_images_themselves_and_ascends_as_adam_does() -> None:
    objective = Perturbed(lr=0.01)
    assert_close(one_step(objective), images().float())
    one_step(objective)
    delta = nn.Parameter(torch.zeros(3, 4, 4))
    adam = torch.optim.Adam([delta], lr=0.01, maximize=True)
    target = model(images()).argmax(-1)
    for _ in range(2):
        adam.zero_grad()
        nn.functional.cross_entropy(model(255 * (images() / 255 + delta).clamp(0, 1)), target).backward()
        adam.step()
    assert_close(objective.per_task_state()["cars"][0], delta.detach())


def test_views_stay_images_and_clean_predictions_lose() -> None:
    objective = Perturbed(lr=0.1)
    for _ in range(10):
        view = one_step(objective)
    assert view.min() >= 0
    assert view.max() <= 255
    clean = model(images())
    before, after = (nn.functional.cross_entropy(x, clean.argmax(-1)).item() for x in (clean, model(view)))
    assert after > 2 * before


def test_a_second_pass_of_a_step_sees_the_same_and_counts_once() -> None:
    once, twice = Perturbed(lr=0.1), Perturbed(lr=0.1)
    for _ in range(2):
        assert torch.equal(one_step(once), one_step(twice, passes=2))
    assert torch.equal(once.per_task_state()["cars"][0], twice.per_task_state()["cars"][0])


def test_what_it_remembers_goes_on_and_can_be_forgotten() -> None:
    objective, resumed = Perturbed(lr=0.1), Perturbed(lr=0.1)
    one_step(objective)
    resumed.load_per_task_state(objective.per_task_state())
    assert torch.equal(one_step(objective), one_step(resumed))
    objective.forget()
    assert_close(one_step(objective), images().float())


def test_without_gradients_nothing_is_learned() -> None:
    objective = Perturbed()
    with torch.no_grad():
        objective(model(objective.second_view(images(), "cars", 0)), "cars", model(images()))
    assert objective.per_task_state() == {}


def test_wrong_inputs_are_refused() -> None:
    with pytest.raises(InputError, match="lr=0"):
        Perturbed(lr=0.0)
    with pytest.raises(InputError, match="task 'cars' has torch.int64 inputs"):
        Perturbed().second_view(torch.zeros(2, 3, 5, dtype=torch.int64), "cars", 0)
    with pytest.raises(InputError, match="needs both views of task 'cars'"):
        Perturbed()(torch.zeros(2, 3), "cars")
    with pytest.raises(InputError, match="two parts of Mixed augment"):
        Mixed([Consistency(), Perturbed()])
