"""What running a method refuses, and what it keeps."""

import pytest
import torch

import adamerge
from adamerge.errors import InputError
from adamerge.static import edit, merged_tensors
from adamerge.static.registry import EDITS, METHODS, Method, look_up
from adamerge.vectors import TaskVectors


def opened(base: torch.Tensor, codec: str = "fp32") -> TaskVectors:
    states = {task: {"w": base.clone(), "v": base + k / 10} for k, task in enumerate(("a", "b"), 1)}
    return TaskVectors.open({"w": base, "v": base}, states, codec)


def test_a_value_of_the_wrong_type_is_refused_by_name() -> None:
    vectors = opened(torch.ones(4, 3))
    with pytest.raises(InputError, match=r"density='0.2' has the wrong type"):
        adamerge.merge(vectors, "ties", density="0.2")
    with pytest.raises(InputError, match=r"density='much' has the wrong type"):
        adamerge.merge(vectors, "lines", of="ties", of_options={"density": "much"})
    with pytest.raises(InputError, match="density=True has the wrong type"):
        edit(vectors, "ties_trim", density=True)


@pytest.mark.parametrize("rows", [METHODS, EDITS])
def test_every_default_has_the_type_that_is_asked_for(rows: dict[str, Method]) -> None:
    for name, row in rows.items():
        defaults = {option: parameter.default for option, parameter in row.options.items()}
        assert look_up(rows, name, defaults) is row


def test_an_integer_will_do_where_a_float_is_asked_for() -> None:
    assert look_up(METHODS, "ties", {"density": 1}) is METHODS["ties"]


@pytest.mark.parametrize("method", sorted(n for n, row in METHODS.items() if set(row.needs) <= {"name"}))
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_tensors_that_no_expert_changed_stay_bit_for_bit(method: str, dtype: torch.dtype) -> None:
    base = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(dtype)
    merged = dict(merged_tensors(opened(base, "stream"), method))
    assert torch.equal(merged["w"], base)
    assert merged["w"].dtype == dtype
