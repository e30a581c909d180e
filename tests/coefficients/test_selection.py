"""Rules that turn a router's logits into weights: by hand, and by properties that hold for any logits."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from adamerge.coefficients.selection import Selection, softmax, spread, top_1, top_k, top_p
from adamerge.errors import InputError

PROBABILITIES = (0.125, 0.5, 0.25, 0.125)  # exact in binary, and two are equal
RULES: dict[str, dict[str, object]] = {
    "softmax": {}, "top_1": {}, "top_k": {"k": 2}, "top_p": {"p": 0.6}, "none": {},
}  # fmt: skip
rows = st.lists(st.floats(-8, 8, width=32), min_size=2, max_size=9)


def logits_of(probabilities: tuple[float, ...] = PROBABILITIES) -> Tensor:
    return torch.tensor([math.log2(p) for p in probabilities], dtype=torch.float64).mul(math.log(2)).float()


@pytest.mark.parametrize(
    ("select", "expected"),
    [
        (softmax, PROBABILITIES),
        (top_1, (0, 1, 0, 0)),
        (lambda x: top_k(x, 2), (0, 0.5, 0.25, 0)),
        (lambda x: top_k(x, 3), (0.125, 0.5, 0.25, 0)),
        (lambda x: top_k(x, 2, renormalize=True), (0, 2 / 3, 1 / 3, 0)),
        (lambda x: top_p(x, 0.4), (0, 0.5, 0, 0)),
        (lambda x: top_p(x, 0.6), (0, 0.5, 0.25, 0)),
        (lambda x: top_p(x, 0.6, renormalize=True), (0, 2 / 3, 1 / 3, 0)),
        (lambda x: top_p(x, 0.8), (0.125, 0.5, 0.25, 0)),
    ],
)
def test_four_experts_by_hand(select: Callable[[Tensor], Tensor], expected: tuple[float, ...]) -> None:
    weights = select(logits_of())
    assert_close(weights, torch.tensor(expected, dtype=torch.float32))
    assert (weights == 0).tolist() == [x == 0 for x in expected]  # dropped means exactly zero


def test_a_sum_that_only_reaches_p_takes_one_expert_more() -> None:
    tied = torch.zeros(4)  # probabilities of exactly 1/4
    assert [int((top_p(tied, p) > 0).sum()) for p in (0.2, 0.25, 0.5, 0.6, 0.75)] == [1, 2, 3, 3, 4]


@settings(deadline=None)
@given(rows)
def test_the_ends_of_p_are_one_expert_and_all(row: list[float]) -> None:
    logits = torch.tensor(row)
    assert torch.equal(top_p(logits, 0.0), top_k(logits, 1))
    assert torch.equal(top_p(logits, 1.0), softmax(logits))


@settings(deadline=None)
@given(rows, st.sampled_from(["softmax", "top_1", "top_k", "top_p"]))
def test_weights_are_shares_of_one(row: list[float], rule: str) -> None:
    options = RULES[rule] | ({"renormalize": True} if "top_" in rule and rule != "top_1" else {})
    weights = Selection(rule, **options)(torch.tensor(row))
    assert (weights >= 0).all()
    assert float(weights.sum()) == pytest.approx(1, abs=1e-6)


@settings(deadline=None)
@given(rows, st.floats(0, 1))
def test_top_p_keeps_the_fewest_that_exceed_p(row: list[float], p: float) -> None:
    weights = top_p(torch.tensor(row), p).double()
    kept = weights[weights > 0]
    assert float(kept.sum()) > p - 1e-5
    assert float(kept.sum() - kept.min()) <= p + 1e-5


def test_an_uncertain_router_uses_more_experts() -> None:
    row = torch.tensor([3.0, 2.0, 0.5, 0.0, -1.0, -2.0])
    active = [int((top_p(row / t, 0.7) > 0).sum()) for t in (0.2, 1.0, 2.0, 50.0)]
    assert active == sorted(set(active))


@pytest.mark.parametrize("rule", RULES)
def test_a_sample_is_selected_the_same_alone_and_among_others(rule: str) -> None:
    select = Selection(rule, **RULES[rule])
    logits = torch.randn(7, 5, generator=torch.Generator().manual_seed(0)).round(decimals=0)  # with ties
    assert torch.equal(select(logits), torch.stack([select(row) for row in logits]))


@pytest.mark.parametrize("rule", RULES)
def test_kept_weights_carry_a_gradient(rule: str) -> None:
    logits = logits_of().requires_grad_()
    Selection(rule, **RULES[rule])(logits)[1].backward()
    assert logits.grad[1] > 0


def test_the_gradient_of_top_1_is_that_of_the_kept_probability() -> None:
    hard, soft = (logits_of().requires_grad_() for _ in range(2))
    top_1(hard)[1].backward()
    softmax(soft)[1].backward()
    assert torch.equal(hard.grad, soft.grad)


def test_temperature_divides_the_logits() -> None:
    logits = logits_of()
    assert_close(Selection(temperature=2.0)(2 * logits), softmax(logits))
    assert float(Selection(temperature=0.01)(logits).max()) == pytest.approx(1)


@pytest.mark.parametrize("rule", RULES)
def test_half_precision_logits_are_widened(rule: str) -> None:
    assert Selection(rule, **RULES[rule])(logits_of().bfloat16()).dtype == torch.float32


def test_none_gives_the_logits_as_they_are() -> None:
    assert torch.equal(Selection("none")(logits_of()), logits_of())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"select": "top_q"}, "select='top_q' is unknown"),
        ({"select": "top_k"}, "select='top_k' needs k"),
        ({"select": "top_p"}, "select='top_p' needs p"),
        ({"select": "top_k", "k": 0}, "k=0 keeps no expert"),
        ({"select": "top_p", "p": 1.5}, r"p=1.5 is outside \[0, 1\]"),
        ({"select": "top_p", "p": math.nan}, "p=nan is outside"),
        ({"temperature": 0.0}, "temperature=0.0 is not positive"),
        ({"temperature": math.inf}, "temperature=inf is not positive and finite"),
        ({"k": 2}, "k=2 is not read by select='softmax'"),
        ({"select": "none", "temperature": 2.0}, "temperature=2.0 is not read by select='none'"),
        ({"select": "top_1", "renormalize": True}, "renormalize=True is not read by select='top_1'"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_wrong_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Selection(**options)


def test_the_spread_is_between_one_expert_and_all_alike() -> None:
    weights = torch.tensor([[0, 3.0, 0], [0.3, 0.3, 0.3], [0, 0.5, 0.5], [0, 0, 0]])
    found = spread(weights)
    assert found[:3].tolist() == pytest.approx([0, 1, math.log(2) / math.log(3)])
    assert found[3].isnan()
    assert spread(torch.ones(1, 1)).tolist() == [0]
