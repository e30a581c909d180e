"""ComPEFT by hand: three values per task, the share kept, and the merges of such vectors."""

import pytest
import torch
from torch import Tensor

from adamerge.errors import InputError
from adamerge.static import EDITS, METHODS, edit, merge
from adamerge.vectors import TaskVectors


def vectors(*rows: list[float]) -> TaskVectors:
    """Give vectors of a base of 64s, in two tensors."""
    base = {"a": torch.full((2,), 64.0), "b": torch.full((len(rows[0]) - 2,), 64.0)}
    moved = [dict(zip(base, torch.tensor(row).split([2, len(row) - 2]), strict=True)) for row in rows]
    return TaskVectors.open(
        base, {f"t{i}": {n: base[n] + t for n, t in row.items()} for i, row in enumerate(moved)}
    )


def edited(given: TaskVectors, **options: object) -> list[list[float]]:
    stacks = dict(edit(given, "compeft", **options).stacks())
    return torch.cat([stacks["a"], stacks["b"]], dim=1).tolist()


def delta(given: TaskVectors, **options: object) -> list[float]:
    merged = merge(given, "compeft", **options)
    return torch.cat([merged["a"] - 64, merged["b"] - 64]).tolist()


def random(n: int = 1000, n_tasks: int = 2) -> TaskVectors:
    generator = torch.Generator().manual_seed(0)
    experts = {f"t{i}": {"w": torch.randn(n, generator=generator)} for i in range(n_tasks)}
    return TaskVectors.open({"w": torch.zeros(n)}, experts, force=True)


def weights(given: TaskVectors, **options: object) -> Tensor:
    return dict(edit(given, "compeft", **options).stacks())["w"]


def test_the_largest_of_the_whole_model_become_alpha_sigma() -> None:
    given = vectors([3, -5, 1, 1])  # mean 0, variance 9
    assert edited(given, density=0.5) == [[3, -3, 0, 0]]
    assert edited(given, density=0.5, alpha=2.0) == [[6, -6, 0, 0]]
    assert edited(given, density=0.5, value="mean") == [[4, -4, 0, 0]]


def test_sigma_is_the_populations_around_the_mean_of_all_entries() -> None:
    assert edited(vectors([2, 2, 6, 6]), density=0.5) == [[0, 0, 2, 2]]


def test_every_task_has_its_own_threshold_and_value() -> None:
    given = vectors([3, -5, 1, 1], [0, 0, -2, 2])
    assert edited(given, density=0.25, value="mean") == [[0, -5, 0, 0], [0, 0, -2, 2]]


@pytest.mark.parametrize("density", [0.05, 0.2, 0.5, 0.999])
def test_values_are_three_and_the_share_kept_is_the_density(density: float) -> None:
    given = random()
    for row, vector in zip(
        weights(given, density=density, alpha=2.0), given.blocks["w"].dense(), strict=True
    ):
        kept = row != 0
        assert kept.sum() == int(density * 1000)
        assert row[kept].abs().unique().tolist() == pytest.approx([2 * vector.std(correction=0).item()])
        assert torch.equal(row[kept].sign(), vector[kept].sign())
        assert vector[kept].abs().min() > vector[~kept].abs().max()


def test_entries_equal_to_the_smallest_kept_one_are_all_kept() -> None:
    assert edited(vectors([3, 1, -1, 1]), density=0.5, value="mean") == [[1.5, 1.5, -1.5, 1.5]]


def test_zeros_stay_zeros_where_fewer_entries_differ_than_could_be_kept() -> None:
    assert edited(vectors([0, -2, 0, 0]), density=0.75, value="mean") == [[0, -2, 0, 0]]


def test_a_density_of_one_leaves_the_vectors_as_they_are() -> None:
    assert edited(vectors([3, -5, 1, 1]), density=1.0, alpha=7.0) == [[3, -5, 1, 1]]


def test_less_than_one_entry_keeps_nothing() -> None:
    assert edited(vectors([3, -5, 1, 1]), density=0.2) == [[0, 0, 0, 0]]


def test_ternary_vectors_stay_as_they_are_under_their_mean() -> None:
    once = edit(random(), "compeft", value="mean")
    twice = dict(edit(once, "compeft", value="mean").stacks())
    torch.testing.assert_close(twice["w"], dict(once.stacks())["w"])


def test_the_mean_has_the_smallest_error_of_all_values() -> None:
    given = random()
    vector = given.blocks["w"].dense()
    errors = [(weights(given, value="mean", alpha=a) - vector).norm().item() for a in (0.9, 1.0, 1.1)]
    assert errors[1] == min(errors)


def test_the_linear_merge_is_task_arithmetic_on_the_edited_vectors() -> None:
    given = vectors([3, -5, 1, 1], [-3, -5, 1, 1])
    assert delta(given, density=0.5, scale=0.5, value="mean") == [0, -4, 0, 0]
    expected = merge(edit(given, "compeft", density=0.5), "task_arithmetic", scale=0.5)
    assert (
        delta(given, density=0.5, scale=0.5) == torch.cat([expected["a"] - 64, expected["b"] - 64]).tolist()
    )


@pytest.mark.parametrize(("aggregate", "expected"), [("sum", 9), ("mean", 4.5), ("max", 5)])
def test_the_ties_merge_joins_what_has_the_elected_sign(aggregate: str, expected: float) -> None:
    given = vectors([4, 0, 0, 0], [5, 0, 0, 0], [-6, 0, 0, 0])
    chosen = {"density": 0.25, "value": "mean", "merger": "ties", "aggregate": aggregate, "scale": 1.0}
    assert delta(given, **chosen) == [expected, 0, 0, 0]


def test_ties_would_trim_nothing_more() -> None:
    given = random(n_tasks=3)
    merged = merge(given, "compeft", merger="ties")["w"]
    assert torch.equal(merged, merge(edit(given, "compeft"), "ties", density=0.2)["w"])


def test_the_edit_and_the_method_have_one_name() -> None:
    assert set(METHODS["compeft"].options) == {*EDITS["compeft"].options, "merger", "aggregate", "scale"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 20.0}, "density=20.0 is outside (0, 1].\nDid you mean 0.2?"),
        ({"alpha": 0.0}, "alpha=0.0 is no positive number.\nUse e.g. 1.0."),
        ({"alpha": float("nan")}, "alpha=nan is not finite.\nUse a number in [-1e6, 1e6]."),
        ({"alpha": 1e39}, "alpha=1e+39 is out of range.\nUse a number in [-1e6, 1e6]."),
        ({"value": "max"}, "value='max' is unknown.\nUse 'std' or 'mean'."),
        ({"merger": "dare"}, "merger='dare' is unknown.\nUse 'linear' or 'ties'."),
        ({"aggregate": "Sum"}, "aggregate='Sum' is unknown.\nUse 'sum', 'mean' or 'max'."),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_wrong_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError) as caught:
        merge(vectors([3, -5, 1, 1]), "compeft", **options)
    assert str(caught.value) == message
