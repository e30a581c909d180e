"""What a state is, what is mergeable, and which values and bytes a tensor has."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from adamerge.state import as_bytes, digest, first_nonfinite, info, is_mergeable


def base() -> dict[str, Tensor]:
    return {"visual.b": torch.zeros(2), "visual.a": torch.zeros(3), "ids": torch.arange(4)}


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


def test_bytes_of_a_tensor_are_its_memory_in_order() -> None:
    matrix = torch.arange(6, dtype=torch.int16).reshape(2, 3)
    assert as_bytes(matrix.t()).tolist() == [0, 0, 3, 0, 1, 0, 4, 0, 2, 0, 5, 0]
    assert as_bytes(matrix).data_ptr() == matrix.data_ptr()
    assert as_bytes(torch.tensor(True)).tolist() == [1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_large_finite_values_are_finite(dtype: torch.dtype) -> None:
    assert first_nonfinite(torch.full((9,), torch.finfo(dtype).max, dtype=dtype)) is None


def test_a_quantised_nan_is_found() -> None:
    assert first_nonfinite(torch.tensor([1.0, float("nan")]).to(torch.float8_e4m3fn)) == (1,)
