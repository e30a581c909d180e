"""Examples, limits and options of Model Breadcrumbs, and the ranks that it selects by."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from adamerge.errors import InputError
from adamerge.static.breadcrumbs import breadcrumbs, breadcrumbs_trim
from adamerge.static.primitives.ranking import by_magnitude, keep_ranked


def test_the_largest_go_first_and_then_the_largest_of_the_rest_stay() -> None:
    rows = torch.tensor([[[1.0, -9, 3, -4], [2, 0, 5, 1]]])
    expected = torch.tensor([[[0.0, 0, 3, -4], [2, 0, 0, 1]]])
    assert torch.equal(breadcrumbs_trim(rows, keep=0.5, outliers=0.25), expected)
    assert_close(breadcrumbs(rows, keep=0.5, outliers=0.25, scale=0.5), expected[0] / 2)


def test_without_outliers_and_with_all_entries_it_is_task_arithmetic(stacks: object) -> None:
    for stack in stacks().values():
        assert_close(breadcrumbs(stack, keep=1.0, outliers=0.0, scale=0.3), 0.3 * stack.sum(0))


@pytest.mark.parametrize("step", [0.0, 1.0, 1e-3])
def test_the_number_of_survivors_in_each_row_is_exact(step: float) -> None:
    rows = 10 + step * torch.arange(300.0).remainder(7).reshape(1, 3, 100)
    kept = breadcrumbs_trim(rows, keep=0.29, outliers=0.06)
    assert (kept != 0).sum(-1).eq(29).all()


def test_of_equal_magnitudes_the_earlier_count_as_larger() -> None:
    kept = breadcrumbs_trim(torch.tensor([[1.0, -1, 1, -1, 1]]), keep=0.4, outliers=0.2)
    assert kept.tolist() == [[0, -1, 1, 0, 0]]


def test_a_row_may_be_the_whole_tensor() -> None:
    stack = torch.tensor([[[1.0, 2], [3, 4]]])
    assert breadcrumbs_trim(stack, keep=0.5, outliers=0.25, scope="tensor").tolist() == [[[0, 2], [3, 0]]]


@pytest.mark.parametrize("scope", ["row", "tensor"])
def test_a_small_tensor_loses_no_outlier_and_is_not_zeroed(scope: str) -> None:
    kept = breadcrumbs_trim(torch.tensor([[1.0, 5, 2, 3, 4, 0, 0]]), scope=scope)
    assert kept.tolist() == [[0, 5, 0, 0, 0, 0, 0]]


def test_rows_that_are_too_short_keep_nothing() -> None:
    assert not breadcrumbs_trim(torch.ones(2, 4, 3, 3)).any()


def test_scalars_and_empty_tensors_pass() -> None:
    assert breadcrumbs_trim(torch.tensor([3.0, -1])).tolist() == [3, -1]
    assert breadcrumbs(torch.ones(2, 4, 0)).shape == (4, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 0.0}, "keep=0.0 is outside (0, 1].\nUse e.g. 0.2."),
        ({"outliers": 1.0}, "outliers=1.0 is outside [0, 1).\nUse e.g. 0.5."),
        ({"outliers": 2.0}, "outliers=2.0 is outside [0, 1).\nDid you mean 0.02?"),
        ({"scope": "column"}, "scope='column' is unknown.\nUse 'row' or 'tensor'."),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_wrong_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError) as caught:
        breadcrumbs(torch.ones(2, 3), **options)
    assert str(caught.value) == message


@given(
    seed=st.integers(0, 2**32),
    shape=st.tuples(st.integers(1, 4), st.integers(1, 40)),
    skip=st.integers(0, 41),
    keep=st.integers(0, 41),
)
def test_ranks_are_those_of_a_stable_sort(seed: int, shape: tuple[int, int], skip: int, keep: int) -> None:
    rows = torch.randint(-6, 7, shape, generator=torch.Generator().manual_seed(seed)) / 4
    order = rows.abs().argsort(dim=1, descending=True, stable=True)
    assert torch.equal(by_magnitude(rows).flip(1), order)
    chosen = order[:, skip : skip + keep]
    expected = torch.zeros(shape).scatter(1, chosen, rows.gather(1, chosen))
    assert torch.equal(keep_ranked(rows, skip, keep), expected)


@pytest.mark.parametrize("skip", [0, 1, 300])
def test_ranks_hold_in_long_rows_and_in_many(skip: int) -> None:
    rows = torch.randn(70, 4000, generator=torch.Generator().manual_seed(0)).round(decimals=1)
    chosen = rows.abs().argsort(dim=1, descending=True, stable=True)[:, skip : skip + 600]
    expected = torch.zeros(rows.shape).scatter(1, chosen, rows.gather(1, chosen))
    assert torch.equal(keep_ranked(rows, skip, 600), expected)
