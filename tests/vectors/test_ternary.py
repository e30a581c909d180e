"""Ternary storage: lossless for ternary vectors, ComPEFT tensor by tensor for others, and fit to learn on."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from adamerge.errors import InputError
from adamerge.static import edit
from adamerge.vectors import TaskVectors, ternary
from adamerge.vectors.ternary import TernaryCodec

shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def through(vectors: Tensor, **options: float) -> Tensor:
    return TernaryCodec(**options).encode(torch.zeros(vectors.shape[1:]), vectors).dense()


@settings(max_examples=100, deadline=None)
@given(shape=shapes, n_tasks=st.integers(1, 8), chunk=st.integers(1, 64), data=st.data())
def test_ternary_vectors_of_any_shape_come_back_bit_for_bit(
    shape: tuple[int, ...], n_tasks: int, chunk: int, data: st.DataObject
) -> None:
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    share = data.draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]))
    signs = torch.randn(n_tasks, *shape, generator=generator).sign()
    signs *= torch.rand(n_tasks, *shape, generator=generator) < share
    scales = data.draw(st.lists(st.floats(2**-100, 2**100, width=32), min_size=n_tasks, max_size=n_tasks))
    vectors = signs * torch.tensor(scales).reshape(-1, *[1] * len(shape))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ternary, "_CHUNK", chunk)
        assert torch.equal(through(vectors), vectors)


def test_other_vectors_keep_their_largest_entries_as_alpha_sigma() -> None:
    vectors = torch.tensor([[[3.0, -5], [1, 1]], [[-3, 5], [1, -3]]])  # standard deviations 3 and sqrt(11)
    found = through(vectors, density=0.5, alpha=2.0)
    assert_close(found[0], torch.tensor([[6.0, -6], [0, 0]]))
    assert_close(found[1], 2 * 11**0.5 * torch.tensor([[-1.0, 1], [0, -1]]))  # equal magnitudes stay together


def test_the_share_kept_is_the_density() -> None:
    vectors = random(2, 1000)
    for row in through(vectors, density=0.29):
        assert row.count_nonzero() == 290
    assert torch.equal(through(vectors, density=1.0).sign(), vectors.sign())


def test_less_than_one_entry_keeps_nothing() -> None:
    assert not through(torch.tensor([[3.0, -5, 1, 1]]), density=0.2).any()


def test_the_compeft_edit_is_stored_without_loss() -> None:
    base = {"w": random(40, 30), "b": random(30), "s": random()}
    experts = {f"t{i}": {n: t + 0.1 * random(*t.shape, seed=i) for n, t in base.items()} for i in (1, 2)}
    edited = edit(TaskVectors.open(base, experts), "compeft")
    for block in edited.blocks.values():
        stored = TernaryCodec().encode(block.base_tensor(), block.dense())
        assert torch.equal(stored.dense(), block.dense())


def test_coefficients_learn_on_ternary_vectors() -> None:
    base = {"w": random(40, 30)}
    experts = {f"t{i}": {"w": base["w"] + 0.1 * random(40, 30, seed=i)} for i in (1, 2)}
    vectors = TaskVectors.open(base, experts, TernaryCodec(density=0.5))
    target = vectors.merge(torch.tensor([[0.7], [-0.2]]))["w"]
    coefficients = torch.zeros(2, 1, requires_grad=True)
    optimizer = torch.optim.LBFGS([coefficients], line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = (vectors.merge(coefficients)["w"] - target).square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    assert_close(coefficients.detach(), torch.tensor([[0.7], [-0.2]]), atol=1e-4, rtol=0)


def test_scales_beyond_fp32_are_refused() -> None:
    with pytest.raises(OverflowError, match=r"alpha=1e\+38 x the standard deviation is beyond fp32"):
        through(100 * random(1, 10), alpha=1e38)


@pytest.mark.parametrize("option", ["density", "alpha"])
@pytest.mark.parametrize("value", [0.0, -1.0, float("inf"), float("nan")])
def test_options_out_of_range_are_refused(option: str, value: float) -> None:
    with pytest.raises(InputError, match=f"{option}={value} is "):
        TernaryCodec(**{option: value})
