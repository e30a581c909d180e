"""SAR's filter, sharpness step and recovery again, literal (methods A3.1), against the shipped ones."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from adamerge.objectives import ReliableEntropy, SharpnessAware

N_CLASSES = 4
rows = st.lists(st.floats(-6, 6, width=32), min_size=N_CLASSES, max_size=N_CLASSES)
batches = st.lists(rows, min_size=1, max_size=6)


def entropy(row: list[float]) -> float:
    powers = [math.exp(x) for x in row]
    p = [x / sum(powers) for x in powers]
    return -sum(x * math.log(x) for x in p)


def mean_of_reliable(batch: list[list[float]], among: set[int]) -> tuple[float | None, set[int]]:
    """Keep what lies below 0.4 ln C; the mean is None where nothing does."""
    entropies = [entropy(row) for row in batch]
    kept = {i for i in among if entropies[i] < 0.4 * math.log(N_CLASSES)}
    return (sum(entropies[i] for i in kept) / len(kept) if kept else None), kept


@settings(max_examples=60, deadline=None)
@given(first=batches, shift=st.floats(-2, 2))
def test_the_second_pass_filters_what_the_first_kept(first: list[list[float]], shift: float) -> None:
    second = [[x + shift * i for i, x in enumerate(row)] for row in first]
    objective, kept = ReliableEntropy(threshold=0.4, recovery=0.0), set(range(len(first)))
    for batch in (first, second):
        expected, kept = mean_of_reliable(batch, kept)
        found = objective(torch.tensor(batch), "task")
        assert (found is None) == (expected is None)
        if expected is not None:
            assert float(found) == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_the_moving_average_follows_the_last_pass_of_each_step() -> None:
    objective, average = ReliableEntropy(recovery=0.0), None
    for step in range(5):
        objective.begin_step()
        confidence = 3.0 + step / 4
        for row in ([confidence, 0, 0, 0], [confidence + 0.1, 0, 0, 0]):
            objective(torch.tensor([row]), "task")
        last = entropy([confidence + 0.1, 0, 0, 0])
        average = last if average is None else 0.9 * average + 0.1 * last
    assert objective.per_task_state() == pytest.approx({"task": average})


CURVATURE = torch.tensor([[3.0, 0.5], [0.5, 1.0]])


def gradient(w: list[float]) -> list[float]:
    """Give the gradient of w'Aw / 2 + sum of fourth powers."""
    return [sum(a * x for a, x in zip(r, w, strict=True)) + 4 * w[i] ** 3 for i, r in enumerate(CURVATURE)]


def literal_steps(w: list[float], rho: float, *, adaptive: bool, steps: int) -> list[float]:
    """SGD with momentum 0.9 and lr 0.01 on the gradient at w + e (A3.1 steps 2 to 4)."""
    momentum = [0.0] * len(w)
    for _ in range(steps):
        size = [abs(x) if adaptive else 1.0 for x in w]
        g = [float(x) for x in gradient(w)]
        norm = math.sqrt(sum((s * x) ** 2 for s, x in zip(size, g, strict=True)))
        e = [rho * s * s * x / (norm + 1e-12) for s, x in zip(size, g, strict=True)]
        there = gradient([x + y for x, y in zip(w, e, strict=True)])
        momentum = [0.9 * m + float(x) for m, x in zip(momentum, there, strict=True)]
        w = [x - 0.01 * m for x, m in zip(w, momentum, strict=True)]
    return w


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("rho", [0.0, 0.05, 0.5])
def test_the_sharpness_step(rho: float, adaptive: bool) -> None:
    w = nn.Parameter(torch.tensor([0.8, -0.4]))

    def base(groups: list[dict[str, object]]) -> torch.optim.Optimizer:
        return torch.optim.SGD(groups, lr=0.01, momentum=0.9)

    optimizer = SharpnessAware([w], base, rho=rho, adaptive=adaptive)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = w @ CURVATURE @ w / 2 + w.pow(4).sum()
        loss.backward()
        return loss

    for _ in range(10):
        optimizer.step(closure)
    expected = literal_steps([0.8, -0.4], rho, adaptive=adaptive, steps=10)
    assert w.tolist() == pytest.approx(expected, rel=1e-4)
