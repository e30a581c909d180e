"""TSV-Merge, Iso-C, Iso-CTS, SVC and KnOTS again, slow and literal, by LAPACK's SVD in NumPy.

Where a matrix lacks rank, an SVD's choice among null directions is arbitrary: these leave them out.
"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from adamerge.static import merge
from adamerge.vectors import TaskVectors

pytestmark = pytest.mark.filterwarnings("ignore:expert")  # T = 1, and vectors of zeros
SHAPES = [(), (5,), (4, 4), (7, 3), (3, 8), (20, 17), (1, 6), (6, 1), (3, 2, 4), (2, 3, 2, 2)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

Matrices = list[np.ndarray]
Factors = tuple[np.ndarray, np.ndarray, np.ndarray]


@st.composite
def stacks(draw: st.DrawFn) -> list[tuple[Tensor, Tensor]]:
    """Draw a base and experts: of full rank, of rank 2 at most, or every other one equal to the base."""
    shape, tasks = draw(st.sampled_from(SHAPES)), draw(st.sampled_from([1, 2, 8]))
    kind, dtype = draw(st.sampled_from(["full", "low", "still"])), draw(st.sampled_from(DTYPES))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    vectors = torch.randn(tasks, *shape, generator=generator)
    base = torch.randn(shape, generator=generator).to(dtype)
    if kind == "low" and len(shape) == 2:
        base, vectors = torch.zeros_like(base), vectors[:, torch.arange(shape[0]) % 2]
    if kind == "still":
        vectors[1::2] = 0
    return [(base, (base.float() + vector).to(dtype)) for vector in vectors]


def assert_merges(
    given: list[tuple[Tensor, Tensor]], expected: np.ndarray, method: str, **options: object
) -> None:
    base = given[0][0]
    experts = {f"t{i}": {"w": expert, "b": torch.ones(1)} for i, (_, expert) in enumerate(given)}
    opened = TaskVectors.open({"w": base, "b": torch.zeros(1)}, experts, force=True)
    merged = merge(opened, method, dtype=torch.float32, **options)["w"]
    assert_close(merged, base.float() + torch.from_numpy(expected).float(), rtol=1e-4, atol=1e-4)


def taus(given: list[tuple[Tensor, Tensor]]) -> Matrices:
    return [(expert.float() - base.float()).double().numpy() for base, expert in given]


def svd(matrix: np.ndarray, most: int | None = None, floor: float = 0.0) -> Factors:
    u, s, vh = np.linalg.svd(matrix, full_matrices=False)
    rank = int((s > max(floor, 1e-6 * s[0])).sum())
    most = rank if most is None else min(most, rank)
    return u[:, :most], s[:most], vh[:most]


def procrustes(matrix: np.ndarray) -> np.ndarray:
    """The nearest matrix with orthonormal columns, on their range."""
    p, _, q = svd(matrix) if matrix.size else (matrix, None, matrix[:0].T @ matrix[:0])
    return p @ q


def joined(parts: list[Factors]) -> Factors:
    left, values, right = zip(*parts, strict=True)
    return np.concatenate(left, axis=1), np.concatenate(values), np.concatenate(right)


def tsv(matrices: Matrices) -> np.ndarray:
    """C4."""
    most = min(matrices[0].shape) // len(matrices)
    left, values, right = joined([svd(m, most) for m in matrices])
    return procrustes(left) @ np.diag(values) @ procrustes(right.T).T


def iso_c(matrices: Matrices) -> np.ndarray:
    """C5."""
    u, s, vh = svd(sum(matrices))
    return np.mean(s) * u @ vh if len(s) else 0 * matrices[0]


def iso_cts(matrices: Matrices, share: float) -> np.ndarray:
    """C5; the number of common directions is adjusted as in the authors' code."""
    r, tasks = min(matrices[0].shape), len(matrices)
    common = int(r * share)
    own = round((r - common) / tasks)
    while own * tasks > r:
        own -= 1
    u, s, vh = svd(sum(matrices), r - own * tasks)
    rests = [svd(m - u @ u.T @ m, own, floor=1e-6 * np.linalg.norm(m)) for m in matrices]
    left, values, right = joined([(u, s, vh), *rests])
    if len(values) == 0:
        return 0 * matrices[0]
    return np.mean(values) * procrustes(left) @ procrustes(right.T).T


def svc(merged: np.ndarray, matrices: Matrices, floor: float) -> np.ndarray:
    """C15; a task without a component along a direction is not counted there."""
    u, s, vh = svd(merged)
    result = np.zeros_like(merged)
    for r in range(len(s)):
        own = [u[:, r] @ m for m in matrices if np.linalg.norm(u[:, r] @ m) > 1e-6 * np.linalg.norm(m)]
        coefficients = [(u[:, r] @ merged) @ a / (a @ a) for a in own]
        gamma = len(own) / sum(max(floor, c) for c in coefficients) if own else 1
        result += gamma * s[r] * np.outer(u[:, r], vh[r])
    return result


def knots(matrices: Matrices, density: float) -> np.ndarray:
    """C10 with TIES (mean), of a model that has one tensor; sums of exactly 0 elect nothing."""
    u, s, vh = np.linalg.svd(np.concatenate(matrices, axis=1), full_matrices=False)
    u, s, vh = u[:, s > 1e-4], s[s > 1e-4], vh[s > 1e-4]
    rows = [(s[:, None] * v) for v in np.split(vh, len(matrices), axis=1)]
    limit = 1e-6 * max(s, default=0)
    rows = [np.where(abs(row) > limit, row, 0) for row in rows]
    kept = [keep_largest(row, density) for row in rows]
    sign = np.sign(sum(kept))
    agreeing = [np.where(np.sign(row) == sign, row, 0) for row in kept]
    count = sum((row != 0).astype(int) for row in agreeing)
    return u @ (sum(agreeing) / np.maximum(count, 1))


def keep_largest(row: np.ndarray, density: float) -> np.ndarray:
    kept = int(density * row.size)
    if kept == row.size:
        return row
    threshold = np.sort(abs(row), axis=None)[row.size - kept - 1] if kept else np.inf
    return np.where(abs(row) >= threshold, row, 0)


def assert_per_matrix(
    given: list[tuple[Tensor, Tensor]], reference: object, method: str, **options: object
) -> None:
    """A matrix is merged by the reference, any other tensor is the mean of the vectors."""
    matrices = taus(given)
    expected = reference(matrices) if matrices[0].ndim == 2 else sum(matrices) / len(matrices)
    assert_merges(given, np.asarray(expected), method, **options)


@settings(max_examples=60, deadline=None)
@given(drawn=stacks(), scale=st.sampled_from([1.0, -0.5, 1.5]))
def test_tsv(drawn: list[tuple[Tensor, Tensor]], scale: float) -> None:
    assert_per_matrix(drawn, lambda m: scale * tsv(m), "tsv", scale=scale)


@settings(max_examples=60, deadline=None)
@given(drawn=stacks(), scale=st.sampled_from([1.0, -0.5, 1.5]))
def test_iso_c(drawn: list[tuple[Tensor, Tensor]], scale: float) -> None:
    assert_per_matrix(drawn, lambda m: scale * iso_c(m), "iso_c", scale=scale)


@settings(max_examples=80, deadline=None)
@given(drawn=stacks(), share=st.sampled_from([0.0, 0.3, 0.8, 1.0]))
def test_iso_cts(drawn: list[tuple[Tensor, Tensor]], share: float) -> None:
    assert_per_matrix(drawn, lambda m: iso_cts(m, share), "iso_cts", common_share=share)


@settings(max_examples=60, deadline=None)
@given(drawn=stacks(), floor=st.sampled_from([0.1, 0.5]))
def test_svc_of_task_arithmetic(drawn: list[tuple[Tensor, Tensor]], floor: float) -> None:
    matrices = taus(drawn)
    merged = 0.3 * sum(matrices)
    expected = svc(merged, matrices, floor) if merged.ndim == 2 else merged
    assert_merges(drawn, np.asarray(expected), "svc", floor=floor, of="task_arithmetic")


@settings(max_examples=60, deadline=None)
@given(drawn=stacks(), density=st.sampled_from([0.05, 0.3, 1.0]))
def test_knots(drawn: list[tuple[Tensor, Tensor]], density: float) -> None:
    assert_per_matrix(drawn, lambda m: knots(m, density), "knots", density=density)
