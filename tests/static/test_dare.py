"""Examples, limits, statistics and options of DARE, and the random bits that it drops by."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from adamerge.errors import InputError
from adamerge.static import edit, merge
from adamerge.static.dare import dare, dare_drop
from adamerge.static.primitives.dropping import highest_kept, in_pieces, random_bits
from adamerge.vectors import Stacks, TaskVectors

Make = Callable[..., dict[str, Tensor]]


def opened(stacks: dict[str, Tensor], codec: str = "fp32") -> TaskVectors:
    base = {name: torch.zeros(stack.shape[1:]) for name, stack in stacks.items()}
    n_tasks = len(next(iter(stacks.values())))
    return TaskVectors.open(
        base, {f"t{i}": {n: s[i] for n, s in stacks.items()} for i in range(n_tasks)}, codec
    )


@pytest.mark.parametrize("rescale", ["inverse_prob", "l1", "none"])
def test_without_dropping_it_is_the_method_that_merges(stacks: Make, rescale: str) -> None:
    given = opened(stacks())
    options = {"drop_rate": 0.0, "rescale": rescale, "scale": 0.3}
    for method in ("linear", "ties"):
        plain = merge(given, {"linear": "task_arithmetic", "ties": "ties"}[method], scale=0.3)
        for name, tensor in merge(given, "dare", merger=method, **options).items():
            assert_close(tensor, plain[name])


def test_the_mean_over_seeds_is_the_vector() -> None:
    vector, drop_rate, n = torch.linspace(-2, 2, 50)[None], 0.9, 1000
    mean = sum(dare_drop(vector, name="w", drop_rate=drop_rate, seed=seed) for seed in range(n)) / n
    deviation = vector.abs() * math.sqrt(drop_rate / (1 - drop_rate) / n)
    assert ((mean - vector).abs() <= 4 * deviation).all()


@pytest.mark.parametrize("drop_rate", [0.1, 0.5, 0.99])
def test_the_share_of_zeros_is_the_drop_rate(drop_rate: float) -> None:
    kept = dare_drop(torch.ones(2, 300, 100), name="w", drop_rate=drop_rate)
    zeros = (kept == 0).float().mean((1, 2))
    assert (zeros - drop_rate).abs().max() < 4 * math.sqrt(drop_rate * (1 - drop_rate) / 30_000)


def test_l1_keeps_the_sum_of_magnitudes(stacks: Make) -> None:
    stack = stacks()["kernel"]
    kept = dare_drop(stack, name="w", rescale="l1")
    assert not torch.equal(kept, stack)
    assert_close(kept.abs().sum((1, 2, 3, 4)), stack.abs().sum((1, 2, 3, 4)))


@pytest.mark.parametrize("rescale", ["inverse_prob", "l1", "none"])
def test_where_nothing_is_kept_nothing_is_rescaled(rescale: str) -> None:
    stack = torch.ones(20, 2)
    stack[3] = 0
    kept = dare_drop(stack, name="w", drop_rate=0.99, rescale=rescale)
    assert torch.isfinite(kept).all()
    assert not kept[3].any()
    assert not kept[(kept == 0).all(1)].any()


class TestMasks:
    @staticmethod
    def mask(values: Tensor, name: str = "w", seed: int = 0) -> Tensor:
        return dare_drop(values, name=name, seed=seed) != 0

    def test_depend_on_the_seed_the_name_and_the_task_alone(self) -> None:
        ones = torch.ones(2, 40)
        mask = self.mask(ones)
        assert torch.equal(mask, self.mask(torch.rand(2, 40) - 2))
        assert torch.equal(mask, self.mask(torch.ones(5, 8, 5))[:2].flatten(1))
        for other in (
            self.mask(ones, seed=1),
            self.mask(ones, seed=-1),
            self.mask(ones, name="v"),
            mask.flip(0),
        ):
            assert not torch.equal(mask, other)

    def test_do_not_depend_on_what_else_is_merged(self, stacks: Make) -> None:
        stack = stacks()
        alone = merge(opened({"weight": stack["weight"]}), "dare")["weight"]
        assert torch.equal(alone, merge(opened(stack), "dare")["weight"])

    @pytest.mark.parametrize("codec", ["fp32", "stream"])
    @pytest.mark.parametrize("rescale", ["inverse_prob", "l1", "none"])
    def test_are_the_same_whenever_the_vectors_are_walked(
        self, stacks: Make, codec: str, rescale: str
    ) -> None:
        """DARE with TIES drops four times: it must equal TIES on what the edit drops once."""
        stack = stacks() | {"long": torch.randn(3, 400_000, generator=torch.Generator().manual_seed(1))}
        given, options = opened(stack, codec), {"rescale": rescale, "drop_rate": 0.7, "seed": 3}
        edited = merge(edit(given, "dare_drop", **options), "ties", density=0.1)
        for name, tensor in merge(given, "dare", merger="ties", density=0.1, **options).items():
            assert_close(tensor, edited[name], rtol=0, atol=0)

    @given(start=st.integers(0, 50), count=st.integers(0, 50))
    def test_can_be_entered_at_any_place(self, start: int, count: int) -> None:
        whole = random_bits(0, "w", 1, 0, 100)
        assert torch.equal(random_bits(0, "w", 1, start, count), whole[start : start + count])

    def test_do_not_change_between_versions(self) -> None:
        assert random_bits(0, "w", 0, 0, 3).tolist() == [1075259634, 819918650, 1040481251]


@given(probability=st.floats(1e-9, 1.0))
def test_limits_of_random_bits_are_exact_to_a_bit(probability: float) -> None:
    limit = int(highest_kept(torch.tensor([probability], dtype=torch.float64)))
    assert abs((limit + 2**31 + 1) / 2**32 - probability) <= 2**-32


def test_pieces_join_to_the_whole() -> None:
    stack = torch.randn(3, 2, 200_000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(in_pieces(lambda piece: piece.amax(0), stack), stack.amax(0))
    assert in_pieces(lambda piece: piece.sum(0), torch.tensor([1.0, 2])).tolist() == 3
    assert in_pieces(lambda piece: piece.sum(0), torch.ones(2, 0, 3)).shape == (0, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"drop_rate": 1.0}, "drop_rate=1.0 is outside [0, 1).\nUse e.g. 0.5."),
        ({"drop_rate": 90.0}, "drop_rate=90.0 is outside [0, 1).\nDid you mean 0.9?"),
        ({"drop_rate": -0.1}, "drop_rate=-0.1 is outside [0, 1).\nUse e.g. 0.5."),
        ({"rescale": "l2"}, "rescale='l2' is unknown.\nUse 'inverse_prob', 'l1' or 'none'."),
        ({"merger": "mean"}, "merger='mean' is unknown.\nUse 'linear' or 'ties'."),
        ({"merger": "ties", "density": 20.0}, "density=20.0 is outside (0, 1].\nDid you mean 0.2?"),
        (
            {"merger": "ties", "aggregate": "median"},
            "aggregate='median' is unknown.\nUse 'sum', 'mean' or 'max'.",
        ),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_wrong_options_are_refused(stacks: Make, options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError) as caught:
        dare(Stacks.of(stacks()), **options)
    assert str(caught.value) == message
