"""Examples and limits of EMR-Merging."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.testing import assert_close

from adamerge.static import edit, expert_tensors
from adamerge.static.emr import emr
from adamerge.vectors import Stacks, TaskVectors

Make = Callable[..., dict[str, Tensor]]


def test_one_expert_stays_as_it_is(stacks: Make) -> None:
    given = stacks(n_tasks=1)
    edited = emr(Stacks.of(given))
    assert all(torch.equal(edited(stack), stack) for stack in given.values())


def test_each_task_gets_the_unified_entries_of_its_sign_rescaled() -> None:
    """Unified: 4 -3 -1. The first task sums to 8 and has 7 of it, the second to 6 and has 5."""
    stack = torch.tensor([[4.0, -3, 1], [2, 3, -1]])
    edited = emr(Stacks.of({"w": stack}))(stack)
    assert_close(edited, torch.tensor([[4.0, -3, 0], [4, 0, -1]]) * torch.tensor([[8 / 7], [6 / 5]]))


def test_where_the_sum_is_zero_the_negative_sign_is_elected() -> None:
    stack = torch.tensor([[4.0, 1], [-4, 1]])
    assert_close(emr(Stacks.of({"w": stack}))(stack), torch.tensor([[0.0, 5], [-4, 1]]))


def test_the_mean_magnitude_of_every_task_is_kept(stacks: Make) -> None:
    given = stacks()
    edited = emr(Stacks.of(given))
    own = sum(stack.abs().reshape(3, -1).mean(1) for stack in given.values())
    assert_close(sum(edited(stack).abs().reshape(3, -1).mean(1) for stack in given.values()), own)


def test_a_task_without_change_gets_none() -> None:
    stack = torch.tensor([[4.0, -3], [0, 0]])
    assert emr(Stacks.of({"w": stack}))(stack).tolist() == [[4, -3], [0, 0]]


def test_empty_parameters_do_not_matter(stacks: Make) -> None:
    given = stacks() | {"empty": torch.ones(3, 0, 2)}
    edited = emr(Stacks.of(given))
    assert torch.equal(edited(given["bias"]), emr(Stacks.of(stacks()))(given["bias"]))
    assert edited(given["empty"]).shape == (3, 0, 2)


def test_a_tasks_model_is_the_base_and_its_edited_vector(stacks: Make) -> None:
    given = stacks()
    base = {name: torch.full(stack.shape[1:], 10.0) for name, stack in given.items()}
    experts = {f"t{i}": {n: base[n] + s[i] for n, s in given.items()} for i in range(3)}
    vectors = TaskVectors.open(base, experts)
    model = dict(expert_tensors(edit(vectors, "emr"), "t1"))
    expected = emr(vectors.stacks())
    for name, stack in vectors.stacks():
        assert_close(model[name], 10 + expected(stack)[1])
