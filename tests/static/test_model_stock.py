"""Model Stock: limits, rows and the pole of its formula."""

import pytest
import torch
from torch.testing import assert_close

from adamerge.errors import InputError
from adamerge.static.model_stock import model_stock

X, Y = torch.tensor([[1.0, 0.0], [0.0, 1.0]])


def test_identical_experts_merge_to_the_expert() -> None:
    assert_close(model_stock(torch.stack([X, X, X])), X)


def test_one_expert_is_itself() -> None:
    assert torch.equal(model_stock(X[None]), X)


def test_orthogonal_experts_leave_the_base() -> None:
    assert torch.equal(model_stock(torch.stack([X, Y])), torch.zeros(2))


def test_at_sixty_degrees_two_thirds_of_the_way_are_gone() -> None:
    other = torch.tensor([0.5, 0.75**0.5])
    assert_close(model_stock(torch.stack([X, other])), 2 / 3 * (X + other) / 2)


def test_opposing_experts_leave_the_base_or_follow_the_bare_formula() -> None:
    other = torch.tensor([-0.5, 0.75**0.5])
    vectors = torch.stack([X, other])
    assert torch.equal(model_stock(vectors), torch.zeros(2))
    assert_close(model_stock(vectors, min_cosine=-1.0), -2 * (X + other) / 2)
    assert torch.isfinite(model_stock(torch.stack([X, -X]), min_cosine=-1.0)).all()


def test_rows_and_filters_are_scaled_on_their_own() -> None:
    """The experts agree in the first row, and are orthogonal in the second."""
    vectors = torch.stack([torch.stack([X, X]), torch.stack([X, Y])])
    assert_close(model_stock(vectors, per_row=True), torch.stack([X, torch.zeros(2)]))
    kernels = vectors.reshape(2, 2, 1, 2, 1)
    assert_close(model_stock(kernels, per_row=True)[:, 0, :, 0], torch.stack([X, torch.zeros(2)]))


@pytest.mark.parametrize("shape", [(2,), (2, 0), (2, 0, 3), (2, 3, 0)])
@pytest.mark.parametrize("per_row", [False, True])
def test_scalars_and_empty_tensors_keep_their_shape(shape: tuple[int, ...], per_row: bool) -> None:
    merged = model_stock(torch.ones(shape), per_row=per_row)
    assert merged.shape == shape[1:]
    assert torch.isfinite(merged).all()


def test_a_cosine_out_of_range_is_refused() -> None:
    with pytest.raises(InputError, match=r"min_cosine=-2.0 is outside \[-1, 1\].\n0 is usual."):
        model_stock(torch.ones(2, 2), min_cosine=-2.0)
