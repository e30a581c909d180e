"""Examples, limits and options of PCB-Merging, and the exact selection that it clips by."""

from collections.abc import Callable
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from adamerge.errors import InputError
from adamerge.static.pcb import pcb
from adamerge.static.primitives.selection import largest
from adamerge.vectors import Stacks

Make = Callable[..., dict[str, Tensor]]
Variant = Literal["A", "B", "C"]
every_variant = pytest.mark.parametrize("variant", ["A", "B", "C"])


@pytest.mark.parametrize(("variant", "clip"), [("A", 499), ("B", 495), ("C", 495)])
def test_one_expert_keeps_its_largest_entries_clipped(variant: Variant, clip: int) -> None:
    """Of a thousand magnitudes (500, twice 499 to 1, and 0) 475 has the quantile of scores."""
    entries = torch.arange(-500.0, 500)
    vector = entries[None] / 512
    merged = pcb(Stacks.of({"w": vector}), variant=variant, ratio=0.05, scale=512.0)(vector)
    expected = torch.where(entries.abs() > 475, entries.clamp(-clip, clip), 0)
    sure = entries.abs() != 475  # there, rounding decides
    assert_close(merged[sure], expected[sure], rtol=1e-4, atol=0)


@every_variant
@pytest.mark.parametrize("fill", [0.0, 0.5])
def test_where_nothing_differs_nothing_is_merged(variant: Variant, fill: float) -> None:
    stack = torch.full((3, 20), fill)
    assert not pcb(Stacks.of({"w": stack}), variant=variant, ratio=0.5)(stack).any()


@every_variant
def test_a_task_without_change_does_not_weigh(variant: Variant) -> None:
    own = torch.randn(1, 200, generator=torch.Generator().manual_seed(0))
    stack = torch.cat([own, torch.zeros(1, 200)])
    merged = pcb(Stacks.of({"w": stack}), variant=variant, ratio=0.1, scale=1.0)(stack)
    assert (merged * own[0] >= 0).all()
    assert (merged.abs() <= own[0].abs() + 1e-6).all()
    assert 0 < merged.count_nonzero() <= 20


@every_variant
def test_the_merged_vector_is_linear_in_the_scale_alone(variant: Variant, stacks: Make) -> None:
    given = Stacks.of(stacks())
    once, twice = (pcb(given, variant=variant, ratio=0.5, scale=scale) for scale in (1.0, 2.0))
    for _, stack in given:
        assert_close(twice(stack), 2 * once(stack))


def test_variants_differ(stacks: Make) -> None:
    given, weight = Stacks.of(stacks()), stacks()["weight"]
    merged = [pcb(given, variant=variant, ratio=0.5)(weight) for variant in ("A", "B", "C")]
    assert not any(torch.allclose(merged[i], merged[j]) for i, j in [(0, 1), (0, 2), (1, 2)])


def test_many_tasks_do_not_overflow() -> None:
    stack = torch.randn(120, 50, generator=torch.Generator().manual_seed(0))
    assert pcb(Stacks.of({"w": stack}), ratio=1.0)(stack).isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "D"}, "variant='D' is unknown.\nUse 'A', 'B' or 'C'."),
        ({"ratio": 5.0}, "ratio=5.0 is outside (0, 1].\nDid you mean 0.05?"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_wrong_options_are_refused(stacks: Make, options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError) as caught:
        pcb(Stacks.of(stacks()), **options)
    assert str(caught.value) == message


@settings(max_examples=30, deadline=None)
@given(
    values=st.lists(
        st.lists(st.floats(width=32, allow_nan=False), min_size=7, max_size=7), min_size=1, max_size=3
    ),
    ranks=st.lists(st.integers(1, 7), min_size=1, max_size=3),
)
def test_the_largest_values_are_exact_whatever_their_sign(
    values: list[list[float]], ranks: list[int]
) -> None:
    flat = torch.tensor(values)
    found = largest(Stacks.of({"a": flat[:, :5], "b": flat[:, 5], "c": flat[:, 6:, None]}), *ranks)
    for row, rank in zip(found, ranks, strict=True):
        assert row.tolist() == flat.sort(dim=1, descending=True).values[:, rank - 1].tolist()
