"""Examples by hand, limits and options of the static methods."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from adamerge.errors import InputError
from adamerge.static import edit, merge
from adamerge.static.primitives.selection import kept_count, largest_magnitude
from adamerge.vectors import Stacks, TaskVectors


def vectors(*rows: list[float]) -> TaskVectors:
    """Give vectors of a base of hundreds."""
    base = {"w": torch.full((len(rows[0]),), 100.0)}
    return TaskVectors.open(
        base, {f"t{i}": {"w": base["w"] + torch.tensor(row)} for i, row in enumerate(rows)}
    )


def delta(given: TaskVectors, method: str, **options: object) -> list[float]:
    return (merge(given, method, **options)["w"] - 100).tolist()


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("average", {}),
        ("task_arithmetic", {"scale": 1.0}),
        ("ties", {"density": 1.0, "scale": 1.0}),
        ("ties", {"density": 1.0, "scale": 1.0, "aggregate": "mean"}),
    ],
)
def test_one_expert_merges_to_itself(method: str, options: dict[str, object]) -> None:
    assert delta(vectors([1, -2, 3]), method, **options) == [1, -2, 3]


@pytest.mark.filterwarnings("ignore:experts .* are equal")
def test_the_average_of_equal_experts_is_the_expert() -> None:
    assert delta(vectors([1, -2], [1, -2]), "average") == [1, -2]


def test_the_average_is_task_arithmetic_with_one_over_t() -> None:
    given = vectors([1, -2, 4], [3, 5, 6], [0.5, 0, 1])
    assert delta(given, "average") == pytest.approx(delta(given, "task_arithmetic", scale=1 / 3))


def test_task_arithmetic_is_linear_in_its_scale() -> None:
    given = vectors([1, -2, 4], [3, 5, 6])
    assert delta(given, "task_arithmetic", scale=0.0) == [0, 0, 0]
    assert delta(given, "task_arithmetic", scale=-0.5) == [-2, -1.5, -5]
    assert delta(vectors([1, -2], [-1, 2]), "task_arithmetic") == [0, 0]


def test_where_ties_cancels_exactly_the_majority_sign_decides() -> None:
    given = vectors([2, 1, 1, -3], [-2, 1, 1, -3.5])
    assert delta(given, "ties", density=1.0, scale=1.0) == [2, 2, 2, -6.5]


def test_where_everything_cancels_nothing_survives_ties() -> None:
    assert delta(vectors([1, -2], [-1, 2]), "ties", density=1.0) == [0, 0]


def test_ties_keeps_all_entries_at_its_threshold() -> None:
    assert delta(vectors([4, -1, 1, 1, 0]), "ties", density=0.4, scale=1.0) == [4, -1, 1, 1, 0]
    assert delta(vectors([4, 1, 1, 1, 0]), "ties", density=0.4, scale=1.0) == [4, 1, 1, 1, 0]


def test_a_density_of_less_than_one_entry_keeps_nothing() -> None:
    assert delta(vectors([4, 1, 1]), "ties", density=0.3) == [0, 0, 0]


def test_ties_with_equal_signs_and_all_entries_is_task_arithmetic() -> None:
    given = vectors([1, 2, -4], [3, 5, -6])
    assert delta(given, "ties", density=1.0) == pytest.approx(delta(given, "task_arithmetic"))


@pytest.mark.parametrize(("aggregate", "expected"), [("sum", 6), ("mean", 3), ("max", 5)])
def test_aggregates_see_only_what_agrees(aggregate: str, expected: float) -> None:
    given = vectors([1, 1], [5, 1], [-2, 1], [0, 1])
    assert delta(given, "ties", density=1.0, scale=1.0, aggregate=aggregate)[0] == expected


def test_adamerging_pp_starts_at_ties(stacks: object) -> None:
    stack = stacks()
    base = {name: torch.zeros(s.shape[1:]) for name, s in stack.items()}
    experts = {f"t{i}": {name: s[i] for name, s in stack.items()} for i in range(3)}
    given = TaskVectors.open(base, experts)
    edited = edit(given, "ties_trim", density=0.2)
    merged = edited.state(edited.uniform(0.3))
    for name, tensor in merge(given, "ties", density=0.2, scale=0.3).items():
        assert_close(merged[name], tensor)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("tie", {}, "method 'tie' is unknown.\nDid you mean 'ties'?"),
        ("ties", {"densty": 0.2}, "ties has no option 'densty'.\nDid you mean 'density'?"),
        ("average", {"scale": 1.0}, "average has no option 'scale'.\nIt takes no options."),
        ("ties", {"density": 20.0}, "density=20.0 is outside (0, 1].\nDid you mean 0.2?"),
        ("ties", {"density": 0.0}, "density=0.0 is outside (0, 1].\nUse e.g. 0.2."),
        ("ties", {"aggregate": "Sum"}, "aggregate='Sum' is unknown.\nUse 'sum', 'mean' or 'max'."),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_wrong_methods_and_options_are_refused(method: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError) as caught:
        merge(vectors([1, 2], [3, 4]), method, **options)
    assert str(caught.value) == message


def test_unknown_edits_are_refused() -> None:
    with pytest.raises(InputError, match="'ties' is unknown.\nDid you mean 'ties_trim'"):
        edit(vectors([1, 2]), "ties")


@pytest.mark.parametrize(
    ("density", "size", "kept"),
    [(0.29, 100, 29), (0.57, 100, 57), (0.2, 9, 1), (0.5, 10**10 + 1, 5 * 10**9)],
)
def test_the_number_kept_is_the_floor_of_the_decimal_product(density: float, size: int, kept: int) -> None:
    assert kept_count(density, size) == kept


@pytest.mark.parametrize("rank", [1, 2, 50, 96, 97])
def test_the_largest_magnitudes_are_exact(stacks: object, rank: int) -> None:
    """Over a stream of tensors, with denormal and equal entries among them."""
    stack = list(stacks(n_tasks=2).items())
    stack[1][1][:, :3] = torch.tensor([1e-41, -1e-41, 0.0])
    flat = torch.cat([s.reshape(2, -1) for _, s in stack], dim=1).abs()
    rank = min(rank, flat.shape[1])
    expected: Tensor = flat.sort(dim=1, descending=True).values[:, rank - 1]
    assert torch.equal(largest_magnitude(Stacks.of(dict(stack)), rank), expected)
