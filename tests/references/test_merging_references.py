"""Averaging, task arithmetic and TIES again, slow and literal, against the shipped ones."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from adamerge.static import edit, merge
from adamerge.vectors import TaskVectors

pytestmark = pytest.mark.filterwarnings("ignore:expert")  # hypothesis likes zeros and repetitions
SHAPES = {"b.weight": (2, 3), "a.bias": (4,), "c": ()}
SIZE = sum(math.prod(shape) for shape in SHAPES.values())

# Small integers: ties at the threshold and exact cancellations are frequent, and fp32 sums are exact.
entries = st.lists(st.integers(-4, 4), min_size=SIZE, max_size=SIZE)
experts = st.lists(entries, min_size=1, max_size=4).filter(lambda rows: any(any(row) for row in rows))
densities = st.sampled_from([0.05, 0.1, 0.2, 0.29, 0.5, 0.9, 1.0])


def unflatten(flat: list[float]) -> dict[str, Tensor]:
    """Cut one flat list into tensors, in sorted order of names."""
    pieces, start = {}, 0
    for name, shape in sorted(SHAPES.items()):
        stop = start + math.prod(shape)
        pieces[name] = torch.tensor(flat[start:stop], dtype=torch.float32).reshape(shape)
        start = stop
    return pieces


def open_vectors(rows: list[list[int]]) -> TaskVectors:
    """Give vectors of a base of ones, so that merged - 1 is the merged task vector."""
    base = {name: torch.ones(shape) for name, shape in SHAPES.items()}
    states = {f"task {i}": {n: base[n] + t for n, t in unflatten(row).items()} for i, row in enumerate(rows)}
    return TaskVectors.open(base, states, force=True)


def assert_merges_to(rows: list[list[int]], expected: list[float], method: str, **options: object) -> None:
    merged = merge(open_vectors(rows), method, **options)
    for name, delta in unflatten(expected).items():
        assert_close(merged[name], 1 + delta)


def sign(x: float) -> int:
    return (x > 0) - (x < 0)


def trimmed(row: list[int], density: float) -> list[int]:
    """B3 step 2: the threshold is the (d - floor(K d))-th smallest magnitude; all at or above it stay."""
    kept = math.floor(round(density * len(row), 9))
    if kept == 0:
        return [0] * len(row)
    if kept == len(row):
        return row
    threshold = sorted(abs(x) for x in row)[len(row) - kept - 1]
    return [x if abs(x) >= threshold else 0 for x in row]


def elected(rows: list[list[int]]) -> list[int]:
    """B3 step 3: the sign of the sum; where it is zero, the majority sign of the whole vector."""
    signs = [sign(sum(column)) for column in zip(*rows, strict=True)]
    majority = sign(sum(signs))
    return [s or majority for s in signs]


def agreeing(rows: list[list[int]], density: float) -> list[list[int]]:
    """A1.4: every task's trimmed entries that have the elected sign."""
    rows = [trimmed(row, density) for row in rows]
    signs = elected(rows)
    return [[x if x and sign(x) == s else 0 for x, s in zip(row, signs, strict=True)] for row in rows]


def disjoint(column: tuple[int, ...], aggregate: str) -> float:
    """B3 step 4."""
    if aggregate == "sum":
        return sum(column)
    if aggregate == "mean":
        return sum(column) / max(1, sum(x != 0 for x in column))
    return max(column, key=abs)


@settings(max_examples=30, deadline=None)
@given(rows=experts)
def test_average(rows: list[list[int]]) -> None:
    assert_merges_to(rows, [sum(column) / len(rows) for column in zip(*rows, strict=True)], "average")


@settings(max_examples=30, deadline=None)
@given(rows=experts, scale=st.floats(-1, 1, width=16))
def test_task_arithmetic(rows: list[list[int]], scale: float) -> None:
    expected = [scale * sum(column) for column in zip(*rows, strict=True)]
    assert_merges_to(rows, expected, "task_arithmetic", scale=scale)


@settings(max_examples=150, deadline=None)
@given(rows=experts, density=densities, aggregate=st.sampled_from(["sum", "mean", "max"]))
def test_ties(rows: list[list[int]], density: float, aggregate: str) -> None:
    columns = zip(*agreeing(rows, density), strict=True)
    expected = [0.5 * disjoint(column, aggregate) for column in columns]
    assert_merges_to(rows, expected, "ties", density=density, aggregate=aggregate, scale=0.5)


@settings(max_examples=50, deadline=None)
@given(rows=experts, density=densities)
def test_the_edit_of_adamerging_pp(rows: list[list[int]], density: float) -> None:
    edited = dict(edit(open_vectors(rows), "ties_trim", density=density).stacks())
    for i, row in enumerate(agreeing(rows, density)):
        for name, tensor in unflatten(row).items():
            assert torch.equal(edited[name][i], tensor)
