"""SLERP, Model Stock, LiNeS, Fisher and RegMean again, slow and literal, against the shipped ones."""

import math
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from adamerge.static import merge
from adamerge.vectors import TaskVectors

pytestmark = pytest.mark.filterwarnings("ignore:expert")  # hypothesis likes zeros and repetitions
SHAPES = {"blocks.0.bias": (3,), "blocks.0.weight": (2, 3), "blocks.10.kernel": (2, 2, 1, 2)}
SHAPES |= {"blocks.2.cube": (2, 2, 2), "scale": ()}
DEPTHS = {"blocks.0.bias": 0.0, "blocks.0.weight": 0.0, "blocks.10.kernel": 1.0, "blocks.2.cube": 0.2}
SIZE = sum(math.prod(shape) for shape in SHAPES.values())
Flat = list[float]


class Case(NamedTuple):
    base: Flat
    tau: list[Flat]
    dtype: torch.dtype

    def vectors(self) -> TaskVectors:
        experts = {f"t{i}": unflatten(add(self.base, row), self.dtype) for i, row in enumerate(self.tau)}
        return TaskVectors.open(unflatten(self.base, self.dtype), experts, force=True)

    def stacks(self) -> dict[str, tuple[Flat, list[Flat]]]:
        """Give each tensor's base, and its row per task, flat."""
        rows = [cut(row) for row in self.tau]
        return {name: (base, [row[name] for row in rows]) for name, base in cut(self.base).items()}


@st.composite
def cases(draw: Any) -> Case:
    """Quarters are exact in every dtype; equal, opposite and zero vectors are frequent among them."""
    quarters = st.lists(st.integers(-6, 6).map(lambda i: i / 4), min_size=SIZE, max_size=SIZE)
    base = draw(quarters)
    pool = draw(st.lists(quarters, min_size=1, max_size=4))
    pool += [[-x for x in pool[0]], [0.0] * SIZE]
    tau = draw(
        st.sampled_from([1, 2, 8]).flatmap(lambda n: st.lists(st.sampled_from(pool), min_size=n, max_size=n))
    )
    assume(any(any(row) for row in tau))
    return Case(base, tau, draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])))


def cut(flat: Flat) -> dict[str, Flat]:
    pieces, start = {}, 0
    for name, shape in SHAPES.items():
        pieces[name] = flat[start : start + math.prod(shape)]
        start += math.prod(shape)
    return pieces


def unflatten(flat: Flat, dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: torch.tensor(piece, dtype=dtype).reshape(SHAPES[name]) for name, piece in cut(flat).items()}


def add(a: Flat, b: Flat) -> Flat:
    return [x + y for x, y in zip(a, b, strict=True)]


def mix(a: Flat, x: float, b: Flat, y: float) -> Flat:
    return [x * p + y * q for p, q in zip(a, b, strict=True)]


def dot(a: Flat, b: Flat) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def norm(a: Flat) -> float:
    return math.sqrt(dot(a, a))


def mean(rows: list[Flat]) -> Flat:
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]


def check(case: Case, expected: dict[str, Flat], method: str, **options: object) -> None:
    """Compare merged weights in fp32."""
    merged = merge(case.vectors(), method, dtype=torch.float32, **options)
    for name, values in expected.items():
        assert_close(merged[name].reshape(-1), torch.tensor(values), rtol=1e-5, atol=2e-5)


def slerp_two(a: Flat, b: Flat, t: float) -> Flat:
    """B6, to the letter."""
    if min(norm(a), norm(b)) <= 1e-8:
        return mix(a, 1 - t, b, t)
    cosine = dot(a, b) / (norm(a) * norm(b))
    if abs(cosine) > 0.9995:
        return mix(a, 1 - t, b, t)
    omega = math.acos(cosine)
    return mix(a, math.sin((1 - t) * omega) / math.sin(omega), b, math.sin(t * omega) / math.sin(omega))


@settings(max_examples=25, deadline=None)
@given(case=cases(), t=st.sampled_from([0.0, 0.3, 0.5, 1.0]), on=st.sampled_from(["weights", "task_vector"]))
def test_slerp(case: Case, t: float, on: str) -> None:
    expected = {}
    for name, (base, tau) in case.stacks().items():
        points = tau if on == "task_vector" else [add(base, row) for row in tau]
        found = points[0]
        for k, point in enumerate(points[1:], 2):
            found = slerp_two(found, point, t if len(points) == 2 else 1 / k)
        expected[name] = add(base, found) if on == "task_vector" else found
    check(case, expected, "slerp", on=on, many="chain", **({"t": t} if len(case.tau) == 2 else {}))


def karcher(points: list[Flat]) -> Flat | None:
    """Walk along the mean of the directions' logarithms; None where they do not share a half-sphere."""
    lengths = [norm(p) for p in points]
    if min(lengths) == 0:
        return mean(points)
    units = [[x / length for x in p] for p, length in zip(points, lengths, strict=True)]
    here = mean(units)
    if norm(here) < 0.1:
        return None
    for _ in range(200):
        here = [x / norm(here) for x in here]
        if min(dot(here, u) for u in units) < 0.1:
            return None
        logs = []
        for u in units:
            angle = math.acos(min(1.0, dot(here, u)))
            logs.append(
                mix(u, angle / math.sin(angle), here, -angle / math.tan(angle)) if angle else [0.0] * len(u)
            )
        step = mean(logs)
        here = (
            mix(here, math.cos(norm(step)), step, math.sin(norm(step)) / norm(step)) if norm(step) else here
        )
    return [x * sum(lengths) / len(lengths) for x in here]


@settings(max_examples=25, deadline=None)
@given(case=cases())
def test_the_karcher_mean(case: Case) -> None:
    assume(len(case.tau) > 2)
    found = {name: karcher([add(base, row) for row in tau]) for name, (base, tau) in case.stacks().items()}
    check(case, {name: point for name, point in found.items() if point}, "slerp")


@settings(max_examples=25, deadline=None)
@given(case=cases(), least=st.sampled_from([0.0, -0.05, 0.3]), per_row=st.booleans())
def test_model_stock(case: Case, least: float, per_row: bool) -> None:
    """B23; c is bounded below, because of the formula's pole."""
    expected = {}
    for name, (base, tau) in case.stacks().items():
        n_rows = SHAPES[name][0] if per_row and len(SHAPES[name]) > 1 else 1
        width = len(base) // n_rows
        expected[name] = []
        for start in range(0, len(base), width):
            rows = [row[start : start + width] for row in tau]
            pairs = [(a, b) for i, a in enumerate(rows) for b in rows[:i]]
            cosines = [max(-1, min(1, dot(a, b) / max(norm(a) * norm(b), 1e-6))) for a, b in pairs]
            c = max(least, sum(cosines) / len(pairs)) if pairs else 1
            t = len(rows) * c / (1 + (len(rows) - 1) * c)
            experts = mean([add(base[start : start + width], row) for row in rows])
            expected[name] += mix(experts, t, base[start : start + width], 1 - t)
    check(case, expected, "model_stock", per_row=per_row, min_cosine=least)


@settings(max_examples=25, deadline=None)
@given(case=cases(), beta=st.sampled_from([None, 0.0, 0.7]), of=st.sampled_from(["task_arithmetic", "ties"]))
def test_lines(case: Case, beta: float | None, of: str) -> None:
    """C3, with blocks 0, 2 and 10 of eleven."""
    inner = merge(case.vectors(), of, dtype=torch.float32)
    base = unflatten(case.base, torch.float32)
    corrected = {name: (inner[name] - base[name]).reshape(-1).tolist() for name in SHAPES}
    summed = sum(abs(sum(column)) for column in zip(*case.tau, strict=True))
    size = sum(abs(x) for values in corrected.values() for x in values)
    alpha = summed / size / len(case.tau) if size else 1
    slope = max(0, 2 * (1 - alpha)) if beta is None else beta
    expected = {
        name: mix(pretrained, 1, corrected[name], alpha + slope * DEPTHS.get(name, 0))
        for name, pretrained in cut(case.base).items()
    }
    check(case, expected, "lines", of=of, beta=beta)


class Given:
    """A statistic that was computed elsewhere."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors, self.order = tensors, tuple(tensors)

    def __call__(self, name: str, merged: object) -> Tensor | None:
        return self.tensors.get(name)


@settings(max_examples=25, deadline=None)
@given(case=cases(), data=st.data(), normalize=st.booleans(), floor=st.sampled_from([0.0, 1e-6, 0.1]))
def test_fisher(case: Case, data: st.DataObject, normalize: bool, floor: float) -> None:
    """B5 step 2, the norm being the root mean square over the model."""
    entries = st.lists(st.sampled_from([0.0, 0.0, 0.25, 1.0, 7.0]), min_size=SIZE, max_size=SIZE)
    diagonals = data.draw(st.lists(entries, min_size=len(case.tau), max_size=len(case.tau)))
    sizes = [norm(f) / math.sqrt(SIZE) if normalize else 1 for f in diagonals]
    expected = []
    for j in range(SIZE):
        weights = [f[j] / size + floor if size else floor for f, size in zip(diagonals, sizes, strict=True)]
        weights = weights if sum(weights) else [1.0] * len(weights)
        expected.append(
            case.base[j] + sum(w * tau[j] for w, tau in zip(weights, case.tau, strict=True)) / sum(weights)
        )
    pieces = [unflatten(f, torch.float32) for f in diagonals]
    statistics = {"fisher": Given({name: torch.stack([p[name] for p in pieces]) for name in SHAPES})}
    check(case, cut(expected), "fisher", statistics=statistics, normalize=normalize, floor=floor)


@settings(max_examples=25, deadline=None)
@given(case=cases(), seed=st.integers(0, 9999), shrink=st.sampled_from([0.0, 0.95, 1.0]))
@pytest.mark.parametrize(("method", "need"), [("regmean", "gram"), ("regmean_pp", "prefix_gram")])
def test_regmean(method: str, need: str, case: Case, seed: int, shrink: float) -> None:
    """C1 on whole weights instead of vectors."""
    inputs = np.random.default_rng(seed).normal(size=(len(case.tau), 7, 3))
    grams = [x.T @ x / len(x) for x in inputs]
    shrunk = [shrink * g + (1 - shrink) * np.diag(np.diag(g)) for g in grams]
    expected = {}
    for name, (base, tau) in case.stacks().items():
        experts = [np.array(add(base, row)).reshape(SHAPES[name]) for row in tau]
        if len(SHAPES[name]) == 2:
            target = sum(g @ w.T for g, w in zip(shrunk, experts, strict=True))
            expected[name] = np.linalg.solve(sum(shrunk), target).T.reshape(-1).tolist()
        else:
            expected[name] = mean([w.reshape(-1).tolist() for w in experts])
    statistics = {need: Given({"blocks.0.weight": torch.tensor(np.array(grams), dtype=torch.float32)})}
    check(case, expected, method, statistics=statistics, shrink=shrink)
