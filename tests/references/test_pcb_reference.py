"""PCB-Merging again, slow and literal, in double precision and by sorting."""

import math
from collections.abc import Iterator
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sparse_models import Model, Rows, models
from test_merging_references import sign

from adamerge.static import merge

pytestmark = pytest.mark.filterwarnings("ignore:expert")  # T = 1, and vectors of zeros
TAILS = {"A": "0.0001", "B": "0.01", "C": "0.01"}


def minmax(values: list[float]) -> list[float]:
    low, high = min(values), max(values)
    return [(x - low) / (high - low) if high > low else 0.0 for x in values]


def clipped(row: list[float], tail: str) -> list[float]:
    """Clamp magnitudes to their quantiles, at the official code's places in the sorted list."""
    magnitudes, size = sorted(map(abs, row)), len(row)
    low = magnitudes[math.floor(Fraction(tail) * size)]
    high = magnitudes[max(math.floor((1 - Fraction(tail)) * size) - 1, 0)]
    return [min(max(abs(x), low), high) for x in row]


def inter(variant: str, rows: Rows, signed: Rows, task: int, j: int) -> float:
    if variant == "A":
        return math.tanh(rows[task][j] * sum(row[j] for row in rows))
    if variant == "B":
        return sum(math.tanh(signed[task][j] * row[j]) for row in signed)
    return math.tanh(rows[task][j] * sum(row[j] for row in signed))


def margins(scores: list[float], ratio: float) -> list[float]:
    """Give how far scores lie above their quantile, where the highest lies at 1."""
    threshold = sorted(scores)[math.floor((1 - Fraction(str(ratio))) * len(scores))]
    width = max(scores) - threshold
    return [(score - threshold) / width if width else -1.0 for score in scores]


def pcb(rows: Rows, variant: str, ratio: float) -> Iterator[float | None]:
    """B8, entry by entry; None where rounding decides whether an entry takes part."""
    magnitudes = [clipped(row, TAILS[variant]) for row in rows]
    units = [minmax(row) for row in magnitudes]
    signed = [[sign(x) * n for x, n in zip(*pair, strict=True)] for pair in zip(rows, units, strict=True)]
    above = []
    for task, unit in enumerate(units):
        intra = [math.exp(len(rows) * n**2) for n in unit]
        scores = [x * inter(variant, rows, signed, task, j) for j, x in enumerate(intra)]
        above.append(margins(scores, ratio))
    for j, column in enumerate(zip(*above, strict=True)):
        shares = [max(margin, 0.0) for margin in column]
        entries = [sign(row[j]) * magnitude[j] for row, magnitude in zip(rows, magnitudes, strict=True)]
        if sum(shares) > 1e-3:
            yield sum(s * x for s, x in zip(shares, entries, strict=True)) / sum(shares)
        else:
            yield 0.0 if max(column) < -1e-5 else None


@settings(max_examples=50, deadline=None)
@given(
    model=models(coarse=False),
    variant=st.sampled_from(["A", "B", "C"]),
    ratio=st.sampled_from([0.01, 0.05, 0.3, 1.0]),
)
def test_pcb(model: Model, variant: str, ratio: float) -> None:
    parameters = model.rows()
    whole = [[x for rows in parameters.values() for x in rows[t]] for t in range(len(model.experts))]
    merged = merge(model.vectors(), "pcb", variant=variant, ratio=ratio, scale=2.0, dtype=torch.float32)
    found = torch.cat([(merged[n] - model.base[n].float()).flatten() for n in parameters]).tolist()
    pairs = zip(found, pcb(whole, variant, ratio), strict=True)
    compared = [(x, 2 * expected) for x, expected in pairs if expected is not None]
    assert len(compared) > len(found) / 4
    for x, expected in compared:
        assert x == pytest.approx(expected, rel=2e-3, abs=1e-5)
