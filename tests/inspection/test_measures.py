"""Sums and spectra that are gathered piece by piece, against direct formulas."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from adamerge.inspection.measures import Spectra, Sums, measure, ranks_of
from adamerge.vectors import DenseBlock

# Small integers: zeros and disagreeing signs are frequent.
stacks = st.integers(1, 4).flatmap(
    lambda tasks: st.lists(
        st.lists(st.integers(-2, 2), min_size=tasks, max_size=tasks), min_size=1, max_size=12
    ).map(lambda columns: torch.tensor(columns, dtype=torch.float32).T)
)


def share(part: float, whole: float) -> float:
    return part / whole if whole else math.nan


@settings(deadline=None)
@given(stack=stacks, cut=st.integers(1, 5))
def test_sums_over_pieces_give_what_loops_over_entries_give(stack: Tensor, cut: int) -> None:
    sums = Sums.zero(len(stack))
    for piece in stack.split(cut, dim=1):
        sums = sums.plus(Sums.of(piece))
    rows = stack.tolist()
    for a, first in enumerate(rows):
        assert sums.norms()[a] == pytest.approx(math.sqrt(sum(x * x for x in first)))
        for b, second in enumerate(rows):
            both = [(x, y) for x, y in zip(first, second, strict=True) if x and y]
            apart = [(x, y) for x, y in both if x * y < 0]
            dot = sum(x * y for x, y in both)
            lengths = math.dist(first, [0] * len(first)) * math.dist(second, [0] * len(second))
            expected = [
                share(dot, lengths),
                share(len(apart), len(both)),
                share(sum(-x * y for x, y in apart), sum(abs(x * y) for x, y in both)),
            ]
            found = [sums.cosines()[a, b], sums.conflicts()[a, b], sums.weighted_conflicts()[a, b]]
            assert [float(x) for x in found] == pytest.approx(expected, nan_ok=True)


@settings(deadline=None)
@given(stack=stacks)
def test_signs_conflict_where_several_vectors_move_an_entry_in_different_directions(stack: Tensor) -> None:
    shared = [column for column in stack.T.tolist() if sum(x != 0 for x in column) > 1]
    apart = [column for column in shared if min(column) < 0 < max(column)]
    magnitudes = [sum(abs(x) for column in columns for x in column) for columns in (apart, shared)]
    expected = [share(len(apart), len(shared)), share(*magnitudes)]
    assert Sums.of(stack).conflict().tolist() == pytest.approx(expected, nan_ok=True)


def literal_ranks(matrix: Tensor) -> tuple[float, float]:
    values = torch.linalg.svdvals(matrix.double()).tolist()
    if not any(values):
        return 0.0, 0.0
    shares = [value / sum(values) for value in values]
    entropy = -sum(p * math.log(p) for p in shares if p)
    return math.exp(entropy), sum(v * v for v in values) / values[0] ** 2


@pytest.mark.parametrize("shape", [(9, 4), (4, 9), (6, 6), (5, 3, 2), (3, 2, 2, 2)], ids=str)
@pytest.mark.parametrize("cut", [1, 5, 1000])
def test_ranks_follow_from_singular_values_however_a_parameter_is_cut(
    shape: tuple[int, ...], cut: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("adamerge.inspection.measures._CHUNK", 8)  # two rows of four, so that parts add up
    stack = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    stack[1] = 0
    spectra = Spectra(tuple(stack.shape))
    for piece in stack.flatten(1).split(cut, dim=1):
        spectra.add(piece)
    expected = torch.tensor([literal_ranks(matrix.flatten(1)) for matrix in stack], dtype=torch.float64)
    assert_close(spectra.ranks(), expected.T)


def test_ranks_of_matrices_that_are_known() -> None:
    identity, one = torch.eye(5).double(), torch.ones(5, 5).double()
    assert_close(ranks_of(identity), torch.tensor([5.0, 5.0]).double())
    assert_close(ranks_of(one @ one.T), torch.tensor([1.0, 1.0]).double())
    assert_close(ranks_of(torch.diag(torch.tensor([9.0, 1.0]).double()))[1], torch.tensor(10 / 9).double())


def test_a_low_rank_product_has_no_more_than_its_rank_in_spite_of_rounding() -> None:
    generator = torch.Generator().manual_seed(0)
    b, a = (
        torch.randn(200, 4, generator=generator).double(),
        torch.randn(4, 100, generator=generator).double(),
    )
    assert 3 < float(ranks_of((b @ a).T @ (b @ a))[0]) <= 4


def test_what_is_no_matrix_has_no_rank() -> None:
    shapes = [(2,), (2, 7), (2, 7, 1), (2, 1, 7), (2, 1, 3, 3), (2, 0, 4)]
    assert not any(Spectra.apply_to(shape) for shape in shapes)


def test_equal_vectors_are_told_from_nearly_equal_ones() -> None:
    stack = torch.ones(3, 4)
    stack[2, 3] += 1e-7
    block = DenseBlock(torch.zeros(4), stack)
    assert measure(block, rank=False, pairs={(0, 1), (0, 2), (1, 2)}).equal == {(0, 1)}
