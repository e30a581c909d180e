"""Examples and limits of MagMax."""

import torch
from torch.testing import assert_close

from adamerge.static.magmax import magmax


def test_the_largest_magnitude_wins_with_its_sign() -> None:
    stack = torch.tensor([[1.0, -4, 0, 2], [-3, 3, 0, 2], [2, 1, 0, -1]])
    assert magmax(stack, scale=1.0).tolist() == [-3, -4, 0, 2]


def test_of_opposite_entries_the_positive_one_wins_in_any_order() -> None:
    stack = torch.tensor([[-2.0, 2], [2, -2]])
    assert magmax(stack, scale=0.5).tolist() == magmax(stack.flip(0), scale=0.5).tolist() == [1, 1]


def test_one_vector_is_scaled() -> None:
    stack = torch.tensor([[-2.0, 0.5, 0]])
    assert_close(magmax(stack), 0.5 * stack[0])
    assert magmax(torch.tensor([-3.0, 1]), scale=1.0).tolist() == -3
