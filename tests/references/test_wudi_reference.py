"""WUDI-Merging again: the loss of section C11 under autograd, and its minimum by a pseudo-inverse."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from adamerge.static import merge
from adamerge.vectors import TaskVectors

pytestmark = pytest.mark.filterwarnings("ignore:expert")  # T = 1, and vectors of zeros
SHAPES = [(), (5,), (4, 4), (7, 3), (3, 8), (2, 40), (1, 6), (6, 1), (3, 2, 4), (2, 3, 2, 2)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def loss(merged: Tensor, taus: list[Tensor]) -> Tensor:
    terms = [((merged - tau) @ tau.T).square().sum() / tau.square().sum() for tau in taus if tau.any()]
    return sum(terms, start=0 * merged.sum())


def adam(taus: list[Tensor], steps: int, lr: float) -> Tensor:
    merged = torch.nn.Parameter(sum(taus))
    optimizer = torch.optim.Adam([merged], lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(merged, taus).backward()
        optimizer.step()
    return merged.detach()


def stationary(taus: list[Tensor]) -> Tensor:
    grams = [tau.T @ tau / tau.square().sum() if tau.any() else 0 * tau.T @ tau for tau in taus]
    right_side = sum(tau @ gram for tau, gram in zip(taus, grams, strict=True))
    return right_side @ torch.linalg.pinv(sum(grams), hermitian=True, rtol=1e-11)


@st.composite
def stacks(draw: st.DrawFn) -> tuple[Tensor, list[Tensor]]:
    """Draw a base and its experts, sometimes every other one equal to it."""
    shape, tasks = draw(st.sampled_from(SHAPES)), draw(st.sampled_from([1, 2, 8]))
    dtype, still = draw(st.sampled_from(DTYPES)), draw(st.booleans())
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    base = torch.randn(shape, generator=generator).to(dtype)
    vectors = torch.randn(tasks, *shape, generator=generator)
    if still:
        vectors[1::2] = 0
    return base, list((base + vectors).to(dtype))


def assert_merges(base: Tensor, states: list[Tensor], expected: Tensor, **options: object) -> None:
    experts = {f"t{i}": {"w": state, "b": torch.ones(1)} for i, state in enumerate(states)}
    opened = TaskVectors.open({"w": base, "b": torch.zeros(1)}, experts, force=True)
    merged = merge(opened, "wudi", dtype=torch.float32, **options)["w"]
    assert_close(merged, base.float() + expected.float(), rtol=1e-4, atol=1e-4)


@settings(max_examples=60, deadline=None)
@given(drawn=stacks(), steps=st.sampled_from([0, 1, 7]))
def test_the_iterative_solver(drawn: tuple[Tensor, list[Tensor]], steps: int) -> None:
    base, states = drawn
    taus = [(state.float() - base.float()).double() for state in states]
    is_matrix = base.dim() == 2
    expected = adam(taus, steps, lr=0.01) if is_matrix else sum(taus) / len(taus)
    assert_merges(base, states, expected, solver="adam", steps=steps, lr=0.01)


@settings(max_examples=60, deadline=None)
@given(drawn=stacks())
def test_the_closed_form(drawn: tuple[Tensor, list[Tensor]]) -> None:
    base, states = drawn
    taus = [(state.float() - base.float()).double() for state in states]
    expected = stationary(taus) if base.dim() == 2 else sum(taus) / len(taus)
    assert_merges(base, states, expected, solver="closed_form")
