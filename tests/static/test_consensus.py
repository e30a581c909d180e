"""Examples, limits and options of Consensus merging and TALL masks."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from adamerge.errors import InputError
from adamerge.static.consensus import consensus, consensus_mask, tall_mask

Make = Callable[..., dict[str, Tensor]]
# Entry by entry: all need it, the first alone, it is torn in two, none.
STACK = torch.tensor([[2.0, 5, 4, 0], [2, 1, -4, 0], [2, -1, 0, 0]])


def test_a_mask_holds_what_is_large_beside_the_others() -> None:
    masked = tall_mask(STACK, mask_scale=0.4)
    assert masked.tolist() == [[6, 5, 0, 0], [6, 0, 0, 0], [6, 0, 0, 0]]


def test_consensus_keeps_what_two_masks_hold() -> None:
    assert consensus(STACK, mask_scale=0.4, minimum=2, scale=0.5).tolist() == [3, 0, 0, 0]
    assert consensus(STACK, mask_scale=0.4, minimum=1, scale=0.5).tolist() == [3, 2.5, 0, 0]


def test_one_expert_alone_keeps_all_its_entries() -> None:
    stack = torch.tensor([[2.0, -1, 0]])
    assert torch.equal(tall_mask(stack), stack)
    assert torch.equal(consensus_mask(stack, minimum=1), stack)


def test_no_minimum_is_task_arithmetic_and_more_than_all_the_base(stacks: Make) -> None:
    for stack in stacks().values():
        assert_close(consensus(stack, minimum=0), 0.3 * stack.sum(0))
        assert not consensus(stack, minimum=4).any()


def test_the_edit_before_task_arithmetic_is_the_method(stacks: Make) -> None:
    for stack in stacks().values():
        assert_close(0.3 * consensus_mask(stack).sum(0), consensus(stack))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask_scale": -0.1}, "mask_scale=-0.1 is negative.\nUse 0.2 to 0.6."),
        ({"minimum": -1}, "minimum=-1 is negative.\nUse 2: an entry that two tasks need."),
    ],
)
def test_negative_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError) as caught:
        consensus(STACK, **options)
    assert str(caught.value) == message
