"""The natural gradient: exact on what it models, damped, bounded, and resumable bit for bit."""

import io

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from adamerge import InputError
from adamerge.optimizers import NaturalGradient

N_TASKS, N_GROUPS = 3, 4
SCALES = torch.tensor([1.0, 30.0, 0.1])


def losses_of(values: Tensor) -> Tensor:
    """Give one squared residual per task, linear in the coefficients, of very different scales."""
    generator = torch.Generator().manual_seed(0)
    slopes = torch.randn(N_TASKS, N_TASKS * N_GROUPS, generator=generator)
    residuals = SCALES * (slopes @ values.flatten() - 1)
    return residuals.square() / 2


def step(optimizer: NaturalGradient, values: nn.Parameter) -> None:
    losses = losses_of(values)
    parts = [torch.autograd.grad(loss, values, retain_graph=True)[0] for loss in losses]
    values.grad = torch.stack(parts).sum(0)
    optimizer.receive(torch.stack(parts), losses.detach())
    optimizer.step()


def start() -> nn.Parameter:
    return nn.Parameter(torch.full((N_TASKS, N_GROUPS), 0.3))


def test_one_gauss_newton_step_solves_linear_residuals_of_any_scale() -> None:
    values = start()
    step(NaturalGradient([values], damping=1e-9, most=10.0), values)
    assert losses_of(values.detach()).max() < 1e-6


@pytest.mark.parametrize("curvature", ["fisher", "gauss_newton"])
def test_it_is_the_literal_formula(curvature: str) -> None:
    values, decay, damping = start(), 0.5, 0.3
    optimizer = NaturalGradient([values], 0.2, damping=damping, decay=decay, curvature=curvature, most=1e9)
    literal = values.detach().double().flatten()
    total, weight = torch.zeros(12, 12, dtype=torch.float64), 0.0
    for _ in range(3):
        here = literal.float().reshape(N_TASKS, N_GROUPS).requires_grad_()
        losses = losses_of(here)
        parts = [torch.autograd.grad(x, here, retain_graph=True)[0].double().flatten() for x in losses]
        factors = [1.0 if curvature == "fisher" else 1 / (2 * x) for x in losses.tolist()]
        outer = sum(f * torch.outer(g, g) for f, g in zip(factors, parts, strict=True))
        total, weight = decay * total + (1 - decay) * outer, decay * weight + 1 - decay
        mean = total / weight
        damped = mean + damping * torch.trace(mean) / 12 * torch.eye(12, dtype=torch.float64)
        literal = literal - 0.2 * torch.linalg.inv(damped) @ sum(parts)
        step(optimizer, values)
    assert_close(values.detach().double().flatten(), literal, rtol=1e-4, atol=1e-5)


def test_no_step_is_longer_than_the_bound() -> None:
    values = start()
    step(NaturalGradient([values], 1e6, damping=1e-9, most=0.05), values)
    assert (values.detach() - 0.3).square().mean().sqrt() == pytest.approx(0.05, rel=1e-4)


def test_a_checkpoint_keeps_the_curvature_in_fp64() -> None:
    values = start()
    optimizer = NaturalGradient([values])
    step(optimizer, values)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    again = nn.Parameter(values.detach().clone())
    resumed = NaturalGradient([again])
    file.seek(0)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert resumed.state[again]["curvature"].dtype == torch.float64
    for _ in range(2):
        step(optimizer, values)
        step(resumed, again)
    assert torch.equal(values, again)


def test_without_gradient_nothing_moves() -> None:
    values = start()
    optimizer = NaturalGradient([values])
    values.grad = torch.zeros_like(values)
    optimizer.receive(torch.zeros(N_TASKS, N_TASKS, N_GROUPS), torch.ones(N_TASKS))
    optimizer.step()
    assert torch.equal(values.detach(), torch.full_like(values, 0.3))


@pytest.mark.parametrize(
    "options", [{"lr": 0.0}, {"damping": -1.0}, {"decay": 1.0}, {"most": 0.0}, {"curvature": "k"}], ids=str
)
def test_options_out_of_range_are_refused(options: dict[str, object], unchecked: None) -> None:
    with pytest.raises(InputError, match=next(iter(options))):
        NaturalGradient([start()], **options)
