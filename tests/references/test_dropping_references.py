"""DARE and DELLA again, slow and literal.

Random bits are the only thing that is shared with the shipped code.
"""

import pytest
from hypothesis import assume, given, settings
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
from test_merging_references import agreeing, disjoint, elected, sign

from adamerge.static.primitives.dropping import random_bits

pytestmark = pytest.mark.filterwarnings("ignore:expert")  # T = 1, and vectors of zeros
AGGREGATES = st.sampled_from(["sum", "mean", "max"])
RESCALES = st.sampled_from(["inverse_prob", "l1", "none"])


def uniform(name: str, task: int, count: int) -> list[float]:
    """Read the seed's random bits as numbers in [0, 1)."""
    return [(bits + 2**31) / 2**32 for bits in random_bits(7, name, task, 0, count).tolist()]


def rescaled(row: list[float], probabilities: list[float], kept: list[bool], rescale: str) -> list[float]:
    dropped = [x if stays else 0.0 for x, stays in zip(row, kept, strict=True)]
    if rescale == "inverse_prob":
        return [x / p for x, p in zip(dropped, probabilities, strict=True)]
    left = sum(map(abs, dropped))
    return [x * sum(map(abs, row)) / left for x in dropped] if rescale == "l1" and left else dropped


def dare(name: str, task: int, row: list[float], drop_rate: float, rescale: str) -> list[float]:
    """B4."""
    kept = [u < 1 - drop_rate for u in uniform(name, task, len(row))]
    return rescaled(row, [1 - drop_rate] * len(row), kept, rescale)


@settings(max_examples=50, deadline=None)
@given(model=MODELS, drop_rate=st.sampled_from([0.0, 0.3, 0.5, 0.9]), rescale=RESCALES)
def test_dare_and_task_arithmetic(model: Model, drop_rate: float, rescale: str) -> None:
    options = {"drop_rate": drop_rate, "rescale": rescale, "seed": 7}
    dropped = {
        n: [dare(n, t, row, drop_rate, rescale) for t, row in enumerate(rows)]
        for n, rows in model.rows().items()
    }
    assert_edits_to(model, dropped, "dare_drop", **options)
    assert_merges_to(
        model, {n: summed(rows, 0.3) for n, rows in dropped.items()}, "dare", **options, scale=0.3
    )


@settings(max_examples=60, deadline=None)
@given(
    model=MODELS,
    drop_rate=st.sampled_from([0.0, 0.5, 0.75]),  # with which exact cancellations stay exact
    rescale=st.sampled_from(["inverse_prob", "none"]),
    density=st.sampled_from([0.05, 0.2, 0.5, 1.0]),
    aggregate=AGGREGATES,
)
def test_dare_and_ties(model: Model, drop_rate: float, rescale: str, density: float, aggregate: str) -> None:
    options = {"drop_rate": drop_rate, "rescale": rescale, "seed": 7}
    ties = {"merger": "ties", "density": density, "aggregate": aggregate, "scale": 0.5}
    rows = model.rows()
    whole = [
        [x for name in sorted(rows) for x in dare(name, t, rows[name][t], drop_rate, rescale)]
        for t in range(len(model.experts))
    ]
    flat = iter([0.5 * disjoint(column, aggregate) for column in zip(*agreeing(whole, density), strict=True)])
    expected = {name: [next(flat) for _ in rows[name][0]] for name in sorted(rows)}
    assert_merges_to(model, expected, "dare", **options, **ties)


def della(
    name: str, task: int, row: list[float], density: float, epsilon: float, rescale: str
) -> list[float]:
    """B23: probabilities by rank within each line; places of random numbers follow the ranks."""
    width = SHAPES[name][-1] if SHAPES[name] else 1
    numbers, kept, probabilities = uniform(name, task, len(row)), [False] * len(row), [0.0] * len(row)
    for start in range(0, len(row), max(width, 1)):
        ascending = largest_first(row[start : start + width])[::-1]
        for rank, position in enumerate(ascending):
            share = rank / (width - 1) if width > 1 else 0.5
            probabilities[start + position] = density - epsilon + 2 * epsilon * share
            kept[start + position] = numbers[start + rank] < probabilities[start + position]
    return rescaled(row, probabilities, kept, rescale)


def nearly_cancel(rows: Rows) -> bool:
    """Return whether a sum is so near to 0 that rounding decides its sign."""
    return any(
        0 < abs(sum(column)) < 1e-6 or (any(column) and not sum(column)) for column in zip(*rows, strict=True)
    )


def by_signs(rows: Rows, aggregate: str) -> list[float]:
    matching = [[x if sign(x) == s else 0.0 for x, s in zip(row, elected(rows), strict=True)] for row in rows]
    return [0.3 * disjoint(column, aggregate) for column in zip(*matching, strict=True)]


@settings(max_examples=60, deadline=None)
@given(
    given=st.one_of(
        st.tuples(models(coarse=True), st.just("none")),  # with which exact cancellations stay exact
        st.tuples(models(coarse=False), RESCALES),
    ),
    spread=st.sampled_from([(0.5, 0.15), (0.5, 0.0), (0.7, 0.3), (1.0, 0.0)]),
    aggregate=AGGREGATES,
)
def test_della(given: tuple[Model, str], spread: tuple[float, float], aggregate: str) -> None:
    (model, rescale), (density, epsilon) = given, spread
    options = {"density": density, "epsilon": epsilon, "rescale": rescale, "seed": 7}
    dropped = {
        n: [della(n, t, row, density, epsilon, rescale) for t, row in enumerate(rows)]
        for n, rows in model.rows().items()
    }
    assert_edits_to(model, dropped, "della_drop", **options)
    assume(rescale == "none" or not any(nearly_cancel(rows) for rows in dropped.values()))
    expected = {n: by_signs(rows, aggregate) for n, rows in dropped.items()}
    assert_merges_to(model, expected, "della", **options, aggregate=aggregate, scale=0.3)
