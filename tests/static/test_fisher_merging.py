"""Fisher merging: limits, normalisation and where it falls back to the average."""

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from adamerge.errors import InputError
from adamerge.static.fisher import fisher
from adamerge.vectors import Stacks

STACKS = {"w": torch.tensor([[1.0, 2.0, 3.0], [5.0, 5.0, 5.0]]), "b": torch.tensor([[1.0], [3.0]])}
SOME = {"w": torch.tensor([[1.0, 2.0, 1.0], [3.0, 1.0, 0.5]]), "b": torch.tensor([[1.0], [0.1]])}


def merged(diagonals: Mapping[str, Tensor], **options: object) -> dict[str, Tensor]:
    apply = fisher(Stacks.of(STACKS), fisher=lambda name, _merged: diagonals.get(name), **options)
    return {name: apply(stack, name=name) for name, stack in STACKS.items()}


def assert_average(found: Mapping[str, Tensor]) -> None:
    for name, tensor in found.items():
        assert_close(tensor, STACKS[name].mean(0))


def test_equal_diagonals_give_the_average() -> None:
    assert_average(merged({name: row[:1].expand(2, -1) for name, row in SOME.items()}))


def test_without_any_information_the_result_is_the_average() -> None:
    zeros = {name: 0 * row for name, row in SOME.items()}
    assert_average(merged(zeros))
    assert_average(merged(zeros, floor=0.0))
    assert_average(merged(zeros, floor=0.0, normalize=False))
    assert_average(merged({}))


def test_an_expert_without_information_does_not_count() -> None:
    one = {name: row * torch.tensor([[1.0], [0.0]]) for name, row in SOME.items()}
    for name, tensor in merged(one, floor=0.0).items():
        assert_close(tensor, STACKS[name][0])


def test_by_hand() -> None:
    found = merged(SOME, normalize=False, floor=0.0)
    assert_close(found["w"], torch.tensor([(1 + 15) / 4, (4 + 5) / 3, (3 + 2.5) / 1.5]))


def test_normalised_the_scale_of_a_diagonal_does_not_matter() -> None:
    larger = {name: row * torch.tensor([[1.0], [1000.0]]) for name, row in SOME.items()}
    for name, tensor in merged(SOME).items():
        assert_close(merged(larger)[name], tensor)
    assert not torch.allclose(merged(larger, normalize=False)["w"], merged(SOME, normalize=False)["w"])


def test_one_expert_is_itself_bit_for_bit() -> None:
    stack = torch.randn(1, 9, generator=torch.Generator().manual_seed(0))
    apply = fisher(Stacks.of({"w": stack}), fisher=lambda *_: stack.square())
    assert torch.equal(apply(stack, name="w"), stack[0])


def test_a_negative_floor_is_refused() -> None:
    with pytest.raises(InputError, match="floor=-1.0 is negative.\nUse e.g. 1e-6; 0 for none."):
        merged(SOME, floor=-1.0)
