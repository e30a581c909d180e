"""LiNeS: which block is scaled by how much."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from adamerge.static import merge
from adamerge.vectors import TaskVectors

NAMES = ("conv1", "visual.blocks.0.weight", "visual.blocks.1.layers.7.bias", "visual.blocks.4.weight")
NAMES += ("text.encoder.layer.0.weight", "text.encoder.layer.2.weight", "h.0.weight", "class.mlp.3.weight")


def vectors(n_tasks: int = 2) -> TaskVectors:
    base = {name: torch.zeros(2) for name in NAMES}
    experts = {f"t{i}": {name: torch.tensor([1.0 + i, 2.0]) for name in NAMES} for i in range(n_tasks)}
    return TaskVectors.open(base, experts)


def scales(given: TaskVectors, **options: object) -> dict[str, float]:
    """Give what each parameter of the sum was multiplied by."""
    summed = merge(given, "task_arithmetic", scale=1.0)
    merged = merge(given, "lines", of_options={"scale": 1.0}, **options)
    return {name: (merged[name] / summed[name]).mean().item() for name in NAMES}


def test_alpha_one_and_beta_zero_change_nothing() -> None:
    assert set(scales(vectors(), alpha=1.0, beta=0.0).values()) == {1.0}


def test_blocks_are_numbered_per_tower_and_the_rest_gets_alpha() -> None:
    found = scales(vectors(), alpha=0.5, beta=2.0)
    assert list(found.values()) == [0.5, 0.5, 1.0, 2.5, 0.5, 2.5, 0.5, 0.5]


def test_of_a_sum_the_first_block_is_the_average() -> None:
    assert scales(vectors(4), beta=0.0)["conv1"] == pytest.approx(1 / 4)


def test_by_default_blocks_keep_their_size_on_average() -> None:
    found = scales(vectors(4))
    assert found["visual.blocks.0.weight"] == pytest.approx(0.25)
    assert found["visual.blocks.4.weight"] == pytest.approx(1.75)


def test_a_merge_below_the_average_is_brought_to_it_everywhere() -> None:
    merged = merge(vectors(), "lines", of_options={"scale": 0.1})
    for name, tensor in merge(vectors(), "average").items():
        assert_close(merged[name], tensor)


def test_one_expert_alone_stays_itself() -> None:
    expected: Tensor = torch.tensor([1.0, 2.0])
    assert_close(merge(vectors(1), "lines", of="average")["h.0.weight"], expected)


@pytest.mark.filterwarnings("ignore:experts")
def test_a_merge_of_nothing_stays_nothing() -> None:
    state = {"w": torch.ones(3)}
    given = TaskVectors.open(state, {"a": {"w": state["w"] + 1}, "b": {"w": state["w"] - 1}})
    assert torch.equal(merge(given, "lines")["w"], state["w"])
