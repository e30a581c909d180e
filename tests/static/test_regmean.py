"""RegMean and RegMean++: the regression's optimum, its limits, and what cannot be regressed."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from adamerge.errors import InputError, NumericError
from adamerge.static.regmean import regmean
from adamerge.static.regmean_pp import regmean_pp

N_TASKS, N_ROWS, IN, OUT = 3, 11, 4, 5


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


INPUTS, VECTORS = random(N_TASKS, N_ROWS, IN, seed=1), random(N_TASKS, OUT, IN, seed=2)
GRAM = INPUTS.mT @ INPUTS / N_ROWS


def test_the_merged_matrix_minimises_the_squared_error_on_all_inputs() -> None:
    merged = regmean(VECTORS, gram=GRAM, shrink=1.0).double().requires_grad_()
    error = (INPUTS.double() @ (VECTORS.double() - merged).mT).square().sum() / N_ROWS
    (gradient,) = torch.autograd.grad(error, merged)
    assert gradient.abs().max() < 1e-4


def test_identical_inputs_give_the_average() -> None:
    assert_close(regmean(VECTORS, gram=GRAM[:1].expand(N_TASKS, -1, -1)), VECTORS.mean(0))


def test_one_expert_is_itself() -> None:
    assert torch.equal(regmean(VECTORS[:1], gram=GRAM[:1]), VECTORS[0])


def test_without_correlations_every_input_is_averaged_on_its_own() -> None:
    weights = GRAM.diagonal(dim1=1, dim2=2)[:, None]
    expected = (weights * VECTORS).sum(0) / weights.sum(0)
    assert_close(regmean(VECTORS, gram=GRAM, shrink=0.0), expected)


def test_inputs_that_no_expert_saw_keep_the_average() -> None:
    gram = GRAM.clone()
    gram[:, 2] = gram[:, :, 2] = 0
    merged = regmean(VECTORS, gram=gram)
    assert_close(merged[:, 2], VECTORS.mean(0)[:, 2])
    assert_close(
        merged[:, [0, 1, 3]], regmean(VECTORS[..., [0, 1, 3]], gram=gram[:, [0, 1, 3]][:, :, [0, 1, 3]])
    )


def test_fewer_inputs_than_columns_still_have_a_solution() -> None:
    """Each expert saw one input: the merged matrix maps it as that expert does."""
    seen = INPUTS[:, :1]
    merged = regmean(VECTORS, gram=seen.mT @ seen, shrink=1.0)
    assert_close(seen @ merged.T, seen @ VECTORS.mT, rtol=1e-4, atol=1e-4)


def test_a_matrix_that_is_stored_transposed_is_merged_alike() -> None:
    assert_close(regmean(VECTORS.mT, gram=GRAM), regmean(VECTORS, gram=GRAM).T)


@pytest.mark.parametrize("shape", [(), (4,), (0, 4), (2, 3, 4), (2, 3, 1, 4)])
def test_what_is_no_matrix_with_a_gram_matrix_is_averaged(shape: tuple[int, ...]) -> None:
    vectors = random(N_TASKS, *shape)
    assert torch.equal(regmean(vectors, gram=None), vectors.mean(0))
    assert torch.equal(regmean(vectors, gram=GRAM), vectors.mean(0))


def test_experts_equal_to_the_base_stay_bit_for_bit() -> None:
    assert torch.equal(regmean(torch.zeros_like(VECTORS), gram=GRAM), torch.zeros(OUT, IN))


def test_rounding_of_large_singular_grams_does_no_harm() -> None:
    wide = 1000 * random(2, 3, 200)
    vectors = random(2, 6, 200)
    merged = regmean(vectors, gram=wide.mT @ wide, shrink=1.0)
    assert_close(wide @ merged.T, wide @ vectors.mT, rtol=1e-3, atol=10.0)
    assert merged.abs().max() < 2 * vectors.abs().max()


def test_regmean_pp_is_the_same_function_of_other_gram_matrices() -> None:
    assert torch.equal(regmean_pp(VECTORS, prefix_gram=GRAM), regmean(VECTORS, gram=GRAM))


def test_wrong_options_and_gram_matrices_are_refused() -> None:
    with pytest.raises(InputError, match=r"shrink=1.5 is outside \[0, 1\].\nUse e.g. 0.95."):
        regmean(VECTORS, gram=GRAM, shrink=1.5)
    with pytest.raises(NumericError, match="not positive semi-definite"):
        regmean(VECTORS, gram=GRAM - 10 * torch.eye(IN))
