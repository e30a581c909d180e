"""Frank-Wolfe on coefficients: it stays in the hull, stands still without gradient, and resumes."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from adamerge import FrankWolfe, InputError


def step(optimizer: FrankWolfe, values: nn.Parameter, gradients: Tensor) -> None:
    """Give the optimizer one gradient per task, and step."""
    values.grad = gradients.sum(0)
    optimizer.receive(gradients, gradients.new_zeros(len(gradients)))
    optimizer.step()


def gradients(seed: int, n_tasks: int = 3, n_groups: int = 4) -> Tensor:
    return torch.randn(n_tasks, n_tasks, n_groups, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    lr=st.floats(0.01, 1.0),
    scale=st.floats(0.5, 3.0),
    soft=st.booleans(),
    granularity=st.sampled_from(["group", "task"]),
    direction=st.sampled_from(["inner_product", "cosine"]),
)
def test_coefficients_stay_in_the_simplex(
    seed: int, lr: float, scale: float, soft: bool, granularity: str, direction: str
) -> None:
    values = nn.Parameter(torch.full((3, 4), scale / 3))
    options = {"soft": soft, "granularity": granularity, "direction": direction}
    optimizer = FrankWolfe([values], lr=lr, scale=scale, **options)
    for i in range(6):
        step(optimizer, values, gradients(seed + i))
        assert values.min() >= -1e-6
        torch.testing.assert_close(values.detach().sum(0), torch.full((4,), scale))
        if granularity == "task":
            assert torch.equal(values.detach(), values.detach()[:, :1].expand(-1, 4))


def test_a_start_outside_the_simplex_is_one_more_corner_of_the_hull() -> None:
    start = torch.full((3, 4), 0.5)
    values = nn.Parameter(start.clone())
    optimizer = FrankWolfe([values])
    for i in range(6):
        step(optimizer, values, gradients(i))
        share = (values.detach().sum(0) - 1) / 0.5  # the start sums to 1.5, every expert to 1
        assert (share >= -1e-6).all()
        assert (values.detach() >= share * 0.5 - 1e-6).all()


def test_the_minimum_of_a_quadratic_inside_the_hull_is_approached() -> None:
    target = torch.tensor([[0.2, 0.7], [0.5, 0.1], [0.3, 0.2]])
    values = nn.Parameter(torch.zeros(3, 2))
    optimizer = FrankWolfe([values])
    for _ in range(300):
        optimizer.zero_grad()
        (values - target).square().sum().backward()
        optimizer.step()
    torch.testing.assert_close(values.detach(), target, rtol=0, atol=0.02)


def test_one_expert_and_a_whole_step_give_that_expert() -> None:
    values = nn.Parameter(torch.full((1, 5), 0.3))
    step(FrankWolfe([values]), values, -torch.ones(1, 1, 5))
    assert torch.equal(values.detach(), torch.ones(1, 5))


@pytest.mark.parametrize("direction", ["inner_product", "cosine"])
def test_a_group_without_gradient_does_not_move(direction: str) -> None:
    values = nn.Parameter(torch.full((3, 4), 0.3))
    gradient = gradients(0)
    gradient[:, :, 2] = 0
    step(FrankWolfe([values], direction=direction), values, gradient)
    assert torch.equal(values.detach()[:, 2], torch.full((3,), 0.3))
    assert not torch.equal(values.detach()[:, 1], torch.full((3,), 0.3))


def test_a_soft_step_goes_to_the_mean_of_what_the_tasks_choose() -> None:
    values = nn.Parameter(torch.zeros(2, 1))
    each_its_own = torch.tensor([[[-1.0], [1.0]], [[1.0], [-1.0]]])  # they cancel in the sum
    step(FrankWolfe([values], soft=True), values, each_its_own)
    assert values.detach().flatten().tolist() == [0.5, 0.5]


def test_a_step_is_the_same_after_a_checkpoint() -> None:
    values = nn.Parameter(torch.full((3, 4), 0.3))
    optimizer = FrankWolfe([values])
    step(optimizer, values, gradients(0))
    again = nn.Parameter(values.detach().clone())
    resumed = FrankWolfe([again])
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for i in (1, 2):
        step(optimizer, values, gradients(i))
        step(resumed, again, gradients(i))
    assert torch.equal(values, again)


@pytest.mark.parametrize(
    "options",
    [{"lr": 0.0}, {"lr": 1.5}, {"scale": 0.0}, {"granularity": "layer"}, {"direction": "sine"}],
    ids=str,
)
def test_options_out_of_range_are_refused(options: dict[str, object], unchecked: None) -> None:
    with pytest.raises(InputError, match=next(iter(options))):
        FrankWolfe([nn.Parameter(torch.zeros(2, 2))], **options)


def test_soft_steps_without_the_tasks_gradients_are_refused() -> None:
    values = nn.Parameter(torch.zeros(2, 2))
    values.grad = torch.ones(2, 2)
    with pytest.raises(InputError, match="gradient of every task"):
        FrankWolfe([values], soft=True).step()


def test_parameters_that_are_no_matrix_of_coefficients_are_refused() -> None:
    with pytest.raises(InputError, match="one matrix"):
        FrankWolfe([nn.Parameter(torch.zeros(3))]).step()
