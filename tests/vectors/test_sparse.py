"""Sparse storage: what is kept, how it is counted, and that learning needs no expansion."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from adamerge.errors import InputError
from adamerge.vectors import BernoulliCodec, DenseBlock, MagnitudeCodec, SparseBlock, TaskVectors, sparse

CODECS = [MagnitudeCodec, BernoulliCodec]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def encoded(codec: MagnitudeCodec | BernoulliCodec, vectors: Tensor, seed: int = 9) -> SparseBlock:
    block = codec.encode(random(*vectors.shape[1:], seed=seed), vectors)
    assert isinstance(block, SparseBlock)
    return block


class TestMagnitude:
    def test_the_largest_magnitudes_stay_as_they_are(self) -> None:
        vectors = torch.tensor([[[3.0, -5], [1, 1]], [[-3, 5], [1, -3.5]]])
        kept = encoded(MagnitudeCodec(density=0.5), vectors).dense()
        assert torch.equal(kept, torch.tensor([[[3.0, -5], [0, 0]], [[0, 5], [0, -3.5]]]))

    def test_of_equal_magnitudes_the_first_are_kept(self) -> None:
        vectors = torch.tensor([[[1.0, -2, 1], [-1, -1, 1]]])
        kept = encoded(MagnitudeCodec(density=0.5), vectors).dense()
        assert torch.equal(kept, torch.tensor([[[1.0, -2, 1], [0, 0, 0]]]))

    @settings(max_examples=50, deadline=None)
    @given(size=st.integers(1, 60), percent=st.integers(1, 100), seed=st.integers(0, 9))
    def test_the_share_kept_is_the_density_rounded_down(self, size: int, percent: int, seed: int) -> None:
        vectors = random(2, size, 3, seed=seed)
        block = encoded(MagnitudeCodec(density=percent / 100), vectors)
        assert block.counts == (percent * 3 * size // 100,) * 2
        kept = block.dense() != 0
        assert torch.equal(block.dense(), vectors * kept)
        for vector, mask in zip(vectors.abs(), kept, strict=True):
            assert not mask.any() or mask.all() or vector[mask].min() > vector[~mask].max()


class TestBernoulli:
    def test_kept_entries_are_divided_by_the_density(self) -> None:
        vectors = random(2, 100, 100)
        for rescale, factor in ((True, 4.0), (False, 1.0)):
            found = encoded(BernoulliCodec(density=0.25, rescale=rescale), vectors).dense()
            kept = found != 0
            assert torch.equal(found[kept], factor * vectors[kept])
            assert 0.23 < kept.float().mean() < 0.27

    def test_masks_follow_from_seed_base_and_task_alone(self) -> None:
        codec, vectors = BernoulliCodec(density=0.5), random(2, 10, 10)
        block = encoded(codec, vectors)
        assert torch.equal(encoded(codec, 2 * vectors).indices, block.indices)
        assert torch.equal(encoded(codec, vectors[:1]).indices, block.indices[: block.counts[0]])
        masks = [
            block.dense() != 0,
            encoded(BernoulliCodec(density=0.5, seed=1), vectors).dense() != 0,
            encoded(codec, vectors, seed=8).dense() != 0,
        ]
        flat = [mask for pair in masks for mask in pair]
        assert not any(torch.equal(a, b) for i, a in enumerate(flat) for b in flat[:i])

    def test_a_base_in_half_precision_has_masks_too(self) -> None:
        block = BernoulliCodec(density=0.5).encode(random(4, 4).bfloat16(), random(2, 4, 4))
        assert 0 < (block.dense() != 0).sum() < 32


@settings(max_examples=50, deadline=None)
@given(
    shape=st.lists(st.integers(0, 5), min_size=2, max_size=4).map(tuple),
    n_tasks=st.integers(1, 4),
    chunk=st.integers(1, 40),
    density=st.sampled_from([0.01, 0.3, 1.0]),
)
def test_blocks_equal_their_dense_formulas_at_any_density(
    shape: tuple[int, ...], n_tasks: int, chunk: int, density: float
) -> None:
    block = encoded(MagnitudeCodec(density), random(n_tasks, *shape))
    coefficients, gradient = random(n_tasks, seed=1), random(*shape, seed=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sparse, "_CHUNK", chunk)
        dense = block.dense()
    assert_close(block.combine(coefficients), block.base + torch.tensordot(coefficients, dense, 1))
    expected = torch.stack([(vector * gradient).sum() for vector in dense])
    assert_close(block.project(gradient), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("codec", CODECS)
class TestBoth:
    def test_zeros_take_no_room(self, codec: type[MagnitudeCodec | BernoulliCodec]) -> None:
        vectors = torch.stack([torch.zeros(4, 5), torch.ones(4, 5)])
        block = encoded(codec(density=1.0), vectors)
        assert block.counts == (0, 20)
        assert torch.equal(block.dense(), vectors)

    def test_its_size_is_a_value_and_a_place_for_every_kept_entry(
        self, codec: type[MagnitudeCodec | BernoulliCodec]
    ) -> None:
        block = encoded(codec(density=0.25), random(2, 20, 20))
        assert block.n_scalars == sum(block.counts) == (block.dense() != 0).sum()
        assert block.n_bytes == 4 * 400 + 8 * block.n_scalars

    @pytest.mark.parametrize("shape", [(), (7,)], ids=str)
    def test_tensors_of_one_dimension_are_stored_whole(
        self, codec: type[MagnitudeCodec | BernoulliCodec], shape: tuple[int, ...]
    ) -> None:
        block = codec().encode(random(*shape), random(2, *shape))
        assert isinstance(block, DenseBlock)
        assert torch.equal(block.dense(), random(2, *shape))

    @pytest.mark.parametrize("density", [0.0, -0.1, 1.1, float("nan")])
    def test_a_density_out_of_range_is_refused(
        self, codec: type[MagnitudeCodec | BernoulliCodec], density: float
    ) -> None:
        with pytest.raises(InputError, match=rf"density={density} is outside \(0, 1\]"):
            codec(density=density)


@pytest.mark.parametrize(
    ("codec", "name"),
    [
        ("magnitude", "magnitude(density=0.1)"),
        ("bernoulli", "bernoulli(density=0.1, rescale=True, seed=0)"),
    ],
)
def test_a_word_gives_the_default_options(codec: str, name: str) -> None:
    base = {"w": random(20, 20)}
    vectors = TaskVectors.open(base, {"a": {"w": base["w"] + 0.01 * random(20, 20, seed=1)}}, codec)
    assert vectors.codec is not None
    assert vectors.codec.name == name
    assert isinstance(vectors.blocks["w"], SparseBlock)
