"""SLERP: examples by hand, limits and options."""

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from adamerge.errors import InputError
from adamerge.static.slerp import slerp

X, Y = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 1.0])
ORIGIN = torch.zeros(2)


def between(*points: Tensor, base: Tensor = ORIGIN, **options: object) -> Tensor:
    """Interpolate between weights."""
    return base + slerp(torch.stack(points) - base, base=base, **options)


def test_the_ends_are_the_experts() -> None:
    base = torch.tensor([0.5, -1.0])
    assert torch.equal(between(X, Y, base=base, t=0.0), X)
    assert_close(between(X, Y, base=base, t=1.0), Y)


def test_a_right_angle_is_cut_in_proportion() -> None:
    sixth = math.pi / 6
    assert_close(between(X, Y, t=1 / 3), math.cos(sixth) * X + math.sin(sixth) * Y)


def test_walking_back_is_walking_from_the_other_end() -> None:
    assert_close(between(X, Y, t=0.3), between(Y, X, t=0.7))


def test_equal_lengths_are_kept() -> None:
    a, b = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(0))
    a, b = a / a.norm(), b / b.norm()
    assert_close(between(a, b, base=torch.ones(4, 5), t=0.3).norm(), torch.tensor(1.0))


@pytest.mark.parametrize("other", [-X, 2 * X, 0 * X, X + torch.tensor([0.0, 0.01])])
def test_where_there_is_no_arc_the_line_is_taken(other: Tensor) -> None:
    assert_close(between(X, other, t=0.25), 0.75 * X + 0.25 * other)


@pytest.mark.parametrize("many", ["chain", "karcher"])
@pytest.mark.parametrize("n_tasks", [1, 2, 3, 8])
def test_equal_experts_merge_to_themselves_bit_for_bit(many: str, n_tasks: int) -> None:
    vector, base = torch.randn(2, 7, generator=torch.Generator().manual_seed(0))
    merged = slerp(vector.expand(n_tasks, -1).clone(), base=base, many=many)
    assert torch.equal(merged, vector)


def test_arcs_between_task_vectors_do_not_depend_on_the_base() -> None:
    vectors = torch.stack([X, Y])
    far = slerp(vectors, base=100 + ORIGIN, on="task_vector")
    assert_close(far, slerp(vectors, base=ORIGIN))
    assert not torch.allclose(slerp(vectors, base=100 + ORIGIN), far)


def test_a_chain_joins_one_expert_after_the_other() -> None:
    merged = between(*torch.eye(3), base=torch.zeros(3), many="chain")
    assert_close(merged, torch.tensor([0.375**0.5, 0.375**0.5, 0.5]))


def test_in_the_karcher_mean_all_experts_weigh_the_same() -> None:
    """Of three right angles it is equally far from all axes, and has their mean length."""
    merged = between(*torch.diag(torch.tensor([1.0, 2.0, 3.0])), base=torch.zeros(3))
    assert_close(merged, 2 * torch.ones(3) / math.sqrt(3))


def test_the_karcher_mean_does_not_depend_on_the_order() -> None:
    points = torch.randn(5, 9, generator=torch.Generator().manual_seed(0)) + 1
    base = torch.zeros(9)
    assert_close(
        between(*points, base=base, many="karcher"), between(*points.flip(0), base=base, many="karcher")
    )


def test_the_karcher_mean_of_directions_that_cancel_is_their_average() -> None:
    points = [X, -X, Y, -Y]
    assert_close(between(*points, many="karcher"), ORIGIN)


def test_a_direction_opposite_to_the_mean_does_not_pull() -> None:
    one = torch.ones(1)
    assert_close(between(2 * one, 4 * one, -6 * one, base=0 * one, many="karcher"), 4 * one)


@pytest.mark.parametrize(
    ("n_tasks", "options", "message"),
    [
        (2, {"t": 1.5}, "t=1.5 is outside [0, 1].\n0 is the first expert, 1 the second."),
        (3, {"t": 0.3}, "t=0.3 was chosen for 3 experts.\nMore than two all weigh the same: leave t out."),
        (2, {"on": "weight"}, "on='weight' is unknown.\nUse 'weights' or 'task_vector'."),
        (3, {"many": "mean"}, "many='mean' is unknown.\nUse 'karcher' or 'chain'."),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_wrong_options_are_refused(n_tasks: int, options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError) as caught:
        slerp(torch.ones(n_tasks, 2), base=ORIGIN, **options)
    assert str(caught.value) == message
