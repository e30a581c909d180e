"""Examples, limits, statistics and options of DELLA."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from adamerge.errors import InputError
from adamerge.static.della import della, della_drop

Make = Callable[..., dict[str, Tensor]]


def kept_share(vectors: Tensor, **options: object) -> Tensor:
    """Give how often each entry is kept, over a thousand tasks of equal vectors."""
    many = vectors.expand(1000, *vectors.shape)
    return (della_drop(many, name="w", **options) != 0).float().mean(0)


def test_the_probability_to_keep_rises_evenly_with_the_rank_in_the_row() -> None:
    rows = torch.tensor([[1.0, -5, 3, -2, 4], [50, 10, 30, -20, 40]])
    ranks = torch.tensor([[0.0, 4, 2, 1, 3], [4, 0, 2, 1, 3]])
    share = kept_share(rows, density=0.5, epsilon=0.3)
    assert (share - (0.2 + 0.15 * ranks)).abs().max() < 4 * 0.5 / 1000**0.5


@pytest.mark.parametrize("shape", [(), (3, 1)])
def test_an_entry_alone_in_its_row_is_kept_with_the_mean_probability(shape: tuple[int, ...]) -> None:
    assert (kept_share(torch.ones(shape), density=0.3) - 0.3).abs().max() < 4 * 0.5 / 1000**0.5


def test_the_inverse_probability_keeps_the_mean() -> None:
    row = torch.tensor([1.0, -5, 3, -2, 4]).expand(4000, 5)
    mean = della_drop(row, name="w", rescale="inverse_prob").mean(0)
    assert_close(mean, row[0], rtol=0.1, atol=0)


def test_l1_keeps_the_sum_of_magnitudes(stacks: Make) -> None:
    stack = stacks()["kernel"]
    kept = della_drop(stack, name="w")
    assert not torch.equal(kept, stack)
    assert_close(kept.abs().sum((1, 2, 3, 4)), stack.abs().sum((1, 2, 3, 4)))


def test_masks_depend_on_the_seed_the_name_and_the_task() -> None:
    stack = torch.arange(1.0, 101).expand(2, 100)
    kept = della_drop(stack, name="w")
    assert torch.equal(kept, della_drop(stack, name="w"))
    assert torch.equal(kept[:1], della_drop(stack[:1], name="w"))
    others = [della_drop(stack, name="w", seed=1), della_drop(stack, name="v"), kept.flip(0)]
    assert not any(torch.equal(kept, other) for other in others)


def test_no_two_rows_are_dropped_alike() -> None:
    kept = della_drop(torch.arange(1.0, 701).expand(1, 300, 700), name="w", rescale="none")
    assert len(kept[0].unique(dim=0)) == 300


def test_without_dropping_signs_are_elected_and_what_disagrees_is_left_out() -> None:
    stack = torch.tensor([[2.0, 1, 1, -3], [-2, 1, -5, -3.5]])
    options = {"density": 1.0, "epsilon": 0.0, "scale": 1.0}
    assert della(stack, name="w", **options).tolist() == [-2, 2, -5, -6.5]
    assert della(stack, name="w", aggregate="mean", **options).tolist() == [-2, 1, -5, -3.25]


def test_equal_signs_without_dropping_are_task_arithmetic(stacks: Make) -> None:
    for stack in stacks().values():
        merged = della(stack.abs(), name="w", density=1.0, epsilon=0.0)
        assert_close(merged, 0.3 * stack.abs().sum(0))


def test_zeros_and_empty_tensors_pass() -> None:
    assert not della(torch.zeros(2, 3, 4), name="w").any()
    assert della(torch.ones(2, 3, 0), name="w").shape == (3, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 0.1}, "density=0.1 and epsilon=0.15 give probabilities outside (0, 1].\n"),
        ({"density": 0.9}, "density=0.9 and epsilon=0.15 give probabilities outside (0, 1].\n"),
        ({"epsilon": -0.1}, "density=0.5 and epsilon=-0.1 give probabilities outside (0, 1].\n"),
        ({"rescale": "l2"}, "rescale='l2' is unknown.\nUse 'inverse_prob', 'l1' or 'none'."),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_wrong_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError) as caught:
        della(torch.ones(2, 3), name="w", **options)
    assert str(caught.value).startswith(message)
