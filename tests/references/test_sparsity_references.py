"""Breadcrumbs, MagMax, Consensus, TALL masks and EMR again, slow and literal."""

import math
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sparse_models import (
    MODELS,
    SHAPES,
    Model,
    Rows,
    assert_edits_to,
    assert_merges_to,
    largest_first,
    models,
    summed,
)

pytestmark = pytest.mark.filterwarnings("ignore:expert")  # T = 1, and vectors of zeros


def floor(share: float, size: int) -> int:
    return math.floor(Fraction(str(share)) * size)


def lines(row: list[float], width: int) -> Rows:
    return [row[i : i + width] for i in range(0, len(row), width)]


def crumbs(line: list[float], keep: float, outliers: float) -> list[float]:
    """B7: zero the largest, then keep the largest of what remains."""
    remaining = largest_first(line)[floor(outliers, len(line)) :]
    chosen = remaining[: floor(keep, len(line))]
    return [x if i in chosen else 0.0 for i, x in enumerate(line)]


def breadcrumbs(name: str, row: list[float], scope: str, keep: float, outliers: float) -> list[float]:
    if not SHAPES[name] or not row:
        return row
    width = len(row) if scope == "tensor" else SHAPES[name][-1]
    return [x for line in lines(row, width) for x in crumbs(line, keep, outliers)]


@settings(max_examples=50, deadline=None)
@given(
    model=MODELS,
    scope=st.sampled_from(["row", "tensor"]),
    keep=st.sampled_from([0.15, 0.29, 0.5, 1.0]),
    outliers=st.sampled_from([0.0, 0.006, 0.2, 0.6]),
)
def test_breadcrumbs(model: Model, scope: str, keep: float, outliers: float) -> None:
    options = {"scope": scope, "keep": keep, "outliers": outliers}
    trimmed = {n: [breadcrumbs(n, row, **options) for row in rows] for n, rows in model.rows().items()}
    assert_edits_to(model, trimmed, "breadcrumbs_trim", **options)
    expected = {n: summed(rows, 0.2) for n, rows in trimmed.items()}
    assert_merges_to(model, expected, "breadcrumbs", **options, scale=0.2)


@settings(max_examples=30, deadline=None)
@given(model=MODELS)
def test_magmax(model: Model) -> None:
    columns = {n: zip(*rows, strict=True) for n, rows in model.rows().items()}
    expected = {n: [0.5 * max(c, key=lambda x: (abs(x), x)) for c in column] for n, column in columns.items()}
    assert_merges_to(model, expected, "magmax", scale=0.5)


def masks(column: tuple[float, ...], mask_scale: float) -> list[bool]:
    """C2."""
    return [abs(x) > mask_scale * abs(sum(column) - x) for x in column]


@settings(max_examples=50, deadline=None)
@given(
    given=st.one_of(
        st.tuples(models(coarse=True), st.sampled_from([0.0, 0.25, 0.5, 1.0])),  # equality is exact
        st.tuples(models(coarse=False), st.sampled_from([0.2, 0.6])),
    ),
    minimum=st.integers(0, 3),
)
def test_consensus_and_tall_masks(given: tuple[Model, float], minimum: int) -> None:
    model, mask_scale = given
    columns = {n: list(zip(*rows, strict=True)) for n, rows in model.rows().items()}
    kept = {n: [sum(masks(c, mask_scale)) >= minimum for c in cs] for n, cs in columns.items()}
    expected = {n: [0.3 * sum(c) * k for c, k in zip(cs, kept[n], strict=True)] for n, cs in columns.items()}
    assert_merges_to(model, expected, "consensus", mask_scale=mask_scale, minimum=minimum, scale=0.3)
    tasks = range(len(model.experts))
    own = {n: [[sum(c) * masks(c, mask_scale)[t] for c in cs] for t in tasks] for n, cs in columns.items()}
    assert_edits_to(model, own, "tall_mask", mask_scale=mask_scale)


def mean(magnitudes: list[float]) -> float:
    return sum(map(abs, magnitudes)) / len(magnitudes) if magnitudes else 0.0


@settings(max_examples=50, deadline=None)
@given(model=MODELS)
def test_emr(model: Model) -> None:
    """C6: elect, mask, rescale."""
    rows, masked = model.rows(), {}
    for name, stack in rows.items():
        columns = list(zip(*stack, strict=True))
        gamma = [1 if sum(c) > 0 else -1 for c in columns]
        unified = [
            g * max([abs(x) for x in c if x * g > 0], default=0.0)
            for c, g in zip(columns, gamma, strict=True)
        ]
        masked[name] = [
            [u if x * g > 0 else 0.0 for x, g, u in zip(row, gamma, unified, strict=True)] for row in stack
        ]
    for task in range(len(model.experts)):
        left = sum(mean(masked[n][task]) for n in rows)
        kappa = sum(mean(rows[n][task]) for n in rows) / left if left else 0.0
        for stack in masked.values():
            stack[task] = [kappa * x for x in stack[task]]
    assert_edits_to(model, masked, "emr")
