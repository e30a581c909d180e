"""What a state is, what is mergeable, and what the audit says of experts that do not fit."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from adamerge.errors import InputError
from adamerge.state import audit, digest, first_nonfinite, info, is_mergeable


def base() -> dict[str, Tensor]:
    return {"visual.b": torch.zeros(2), "visual.a": torch.zeros(3), "ids": torch.arange(4)}


def test_only_floating_tensors_of_some_expert_merge_in_sorted_order() -> None:
    assert audit(base(), {"cars": base()}) == ("visual.a", "visual.b")
    partial = {"visual.b": torch.ones(2)}
    assert audit(base(), {"cars": partial}, allow_missing=["visual.a", "ids"]) == ("visual.b",)


@pytest.mark.parametrize(
    ("rename", "hint"),
    [
        (lambda name: "module." + name, "carry the prefix 'module.': strip it"),
        (lambda name: name.removeprefix("visual."), "lack the prefix 'visual.': add it"),
        (lambda name: name.replace("visual", "other"), "If that is meant, pass allow_missing=[PATTERN, ...]"),
    ],
)
def test_names_that_differ_by_a_prefix_are_explained(rename: object, hint: str) -> None:
    expert = {rename(name): tensor for name, tensor in base().items()}
    with pytest.raises(InputError) as caught:
        audit(base(), {"cars": expert})
    assert hint in str(caught.value)


def test_long_lists_are_cut_and_counted() -> None:
    many = {f"layer.{i}": torch.zeros(1) for i in range(12)}
    with pytest.raises(InputError, match=r"lacks 12 of 12 tensors: layer\.0, .*layer\.4 and 7 more"):
        audit(many, {"cars": {}})


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_floating_tensors_are_mergeable(dtype: torch.dtype) -> None:
    assert is_mergeable(dtype)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool])
def test_others_are_not(dtype: torch.dtype) -> None:
    assert not is_mergeable(dtype)


def test_info_of_a_state_in_memory() -> None:
    assert info({"w": torch.zeros(2, 3).half()}, "w") == ((2, 3), torch.float16)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_the_first_value_that_is_not_finite_is_found(bad: float) -> None:
    tensor = torch.zeros(2, 3)
    assert first_nonfinite(tensor) is None
    tensor[1, 0:2] = bad
    assert first_nonfinite(tensor) == (1, 0)
    assert first_nonfinite(torch.tensor(bad)) == ()


@given(order=st.permutations(list(base())))
def test_a_digest_does_not_depend_on_the_order_of_names(order: list[str]) -> None:
    assert digest({name: base()[name] for name in order}) == digest(base())


@pytest.mark.parametrize(
    "change",
    [
        {"visual.a": torch.tensor([0.0, 0.0, 1e-30])},
        {"visual.a": torch.zeros(1, 3)},
        {"visual.a": torch.zeros(3, dtype=torch.bfloat16)},
        {"visual.c": torch.zeros(3)},
        {"ids": torch.arange(4).int()},
    ],
    ids=["value", "shape", "dtype", "name", "integer dtype"],
)
def test_a_digest_depends_on_everything_else(change: dict[str, Tensor]) -> None:
    assert digest(base() | change) != digest(base())


def test_a_digest_reads_any_tensor() -> None:
    odd = {
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(1.0),
        "view": torch.arange(6).reshape(2, 3).t(),
        "bool": torch.tensor([True]),
        "grad": torch.ones(2, requires_grad=True),
    }
    assert len(digest(odd)) == 64


def test_an_image_tower_alone_is_a_complete_expert_of_a_clip() -> None:
    base = {"visual.a": torch.zeros(2), "visual.b": torch.zeros(2), "text.c": torch.zeros(2)}
    tower = {"visual.a": torch.ones(2), "visual.b": torch.ones(2)}
    assert audit(base, {"cars": tower}) == ("visual.a", "visual.b")
    with pytest.raises(InputError, match="expert 'cars' lacks 1 of 3 tensors: visual.b"):
        audit(base, {"cars": {"visual.a": torch.ones(2)}})
