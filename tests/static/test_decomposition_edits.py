"""Edits that split a static method's merged vector into one term per task."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from adamerge.static import EDITS, METHODS

OPTIONS: dict[str, dict[str, Any]] = {"tsv": {}, "iso_c": {}, "wudi": {"solver": "closed_form"}}
SHAPES = {
    "tall": (24, 10),
    "wide": (10, 24),
    "very wide": (3, 40),
    "kernel": (4, 3, 2, 2),
    "bias": (7,),
    "text_projection": (6, 6),
}


def vectors(n_tasks: int, shape: tuple[int, ...]) -> Tensor:
    return torch.randn(n_tasks, *shape, generator=torch.Generator().manual_seed(len(shape)))


def both(method: str, stack: Tensor, name: str = "weight", **options: Any) -> tuple[Tensor, Tensor]:
    """Give the terms, and what the static method merges."""
    options |= {"name": name} if EDITS[method].needs else {}
    merged = METHODS[method].function(stack, **(OPTIONS[method] | options))
    return EDITS[method].function(stack, **options), merged


@pytest.mark.parametrize("n_tasks", [1, 3])
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("method", OPTIONS)
class TestTheSumIsTheStaticMethod:
    def test_of_independent_tasks(self, method: str, name: str, n_tasks: int) -> None:
        terms, merged = both(method, vectors(n_tasks, SHAPES[name]), name)
        assert terms.shape == (n_tasks, *SHAPES[name])
        assert_close(terms.sum(0), merged, rtol=1e-4, atol=1e-5)

    def test_where_a_task_has_nothing_and_ranks_are_low(self, method: str, name: str, n_tasks: int) -> None:
        stack = vectors(n_tasks, SHAPES[name])
        if stack.dim() == 3:
            stack[:, 1:] = stack[:, :1] * torch.arange(1.0, stack.shape[1])[:, None]
        stack[1:2] = 0
        terms, merged = both(method, stack, name)
        assert not terms[1:2].any()
        assert_close(terms.sum(0), merged, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["tsv", "iso_c"])
def test_the_scale_is_the_methods(method: str) -> None:
    terms, merged = both(method, vectors(3, (12, 9)), scale=1.4)
    assert_close(terms.sum(0), merged, rtol=1e-4, atol=1e-5)


def test_a_tsv_term_has_the_tasks_own_share_of_the_rank() -> None:
    terms, _ = both("tsv", vectors(3, (12, 9)))
    assert [int(torch.linalg.matrix_rank(term)) for term in terms] == [3, 3, 3]


def test_terms_of_wudi_keep_to_their_tasks_left_directions() -> None:
    stack = vectors(2, (10, 24))
    stack[0, 5:], stack[1, :5] = 0, 0
    terms, _ = both("wudi", stack)
    assert not terms[0, 5:].any()
    assert terms[0, :5].norm() > 1
