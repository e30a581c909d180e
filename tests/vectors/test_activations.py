"""Dense vectors applied sample by sample: what every sample's own matrix would give, in both directions."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from adamerge.vectors import LowRankCodec, activations
from adamerge.vectors.activations import apply_dense, product, sample_values

LARGE = 10**9
needs_onednn = pytest.mark.skipif(activations._ONEDNN is None, reason="this torch has no oneDNN")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def given_inputs(by_row: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Give base, vectors, activations and weights: 3 tasks, 5 samples of 4 rows."""
    weights = random(5, 4, 3, seed=4) if by_row else random(5, 3, seed=4)
    return random(7, 6, seed=1), random(3, 7, 6, seed=2), random(5, 4, 6, seed=3), weights


def literal(base: Tensor, vectors: Tensor, x: Tensor, weights: Tensor) -> Tensor:
    """Every row through a matrix of its own."""
    if weights.dim() == 2:
        weights = weights[:, None].expand(-1, x.shape[1], -1)
    matrices = base + torch.einsum("srt,toi->sroi", weights, vectors)
    return torch.einsum("sroi,sri->sro", matrices, x)


def chosen(kind: str, weights: Tensor) -> Tensor:
    """Zero some weights, or all; keep the largest; or give all samples two mixtures."""
    if kind == "two mixtures":
        return weights[:1] * (torch.arange(len(weights)) % 2).reshape(-1, *[1] * (weights.dim() - 1))
    if kind == "one expert":
        return weights * (weights == weights.amax(-1, keepdim=True))
    return {"all": weights, "some": weights.relu(), "none": torch.zeros_like(weights)}[kind]


@pytest.fixture
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put boundaries of pieces inside every batch and matrix."""
    monkeypatch.setattr(activations, "_SAMPLES", 2)
    monkeypatch.setattr(activations, "_ENTRIES", 12)


class TestApplyDense:
    @settings(max_examples=200, deadline=None)
    @given(
        shape=st.tuples(st.integers(1, 6), st.integers(1, 6)),
        batch=st.tuples(st.integers(1, 9), st.integers(1, 3)),
        n_tasks=st.integers(1, 4),
        by_row=st.booleans(),
        kind=st.sampled_from(["all", "some", "none", "one expert", "two mixtures"]),
        pieces=st.tuples(st.integers(1, 4), st.integers(1, 20)),
        few=st.sampled_from([0, 2, LARGE]),
        large=st.sampled_from([0, LARGE]),
    )
    def test_it_equals_every_samples_own_matrix(
        self,
        shape: tuple[int, int],
        batch: tuple[int, int],
        n_tasks: int,
        by_row: bool,
        kind: str,
        pieces: tuple[int, int],
        few: int,
        large: int,
    ) -> None:
        base, vectors, x = random(*shape, seed=1), random(n_tasks, *shape, seed=2), random(*batch, shape[1])
        weights = chosen(kind, random(*batch[: 1 + by_row], n_tasks, seed=3))
        names = ("_SAMPLES", "_ENTRIES", "_FEW", "_LARGE")
        with pytest.MonkeyPatch.context() as patch:
            for name, value in zip(names, (*pieces, few, large), strict=True):
                patch.setattr(activations, name, value)
            found = apply_dense(base, vectors, x, weights)
        assert_close(found, literal(base, vectors, x, weights), rtol=1e-5, atol=1e-5)

    @pytest.mark.usefixtures("_small")
    @pytest.mark.parametrize("by_row", [False, True], ids=["by sample", "by row"])
    @pytest.mark.parametrize("learnt", [(True, False), (False, True), (True, True)], ids=str)
    def test_gradients_are_those_of_the_formula(self, by_row: bool, learnt: tuple[bool, bool]) -> None:
        base, vectors, x, weights = given_inputs(by_row)
        weights[0] = 0  # zeros have gradients too
        gradients = []
        for function in (apply_dense, literal):
            leaves = [
                t.clone().requires_grad_(wanted) for t, wanted in zip((x, weights), learnt, strict=True)
            ]
            function(base, vectors, *leaves).square().sum().backward()
            gradients.append([leaf.grad for leaf in leaves])
        for found, expected in zip(*gradients, strict=True):
            assert (found is None) == (expected is None)
            if found is not None:
                assert_close(found, expected, rtol=1e-4, atol=1e-3)

    @pytest.mark.usefixtures("_small")
    @pytest.mark.parametrize("by_row", [False, True], ids=["by sample", "by row"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_autocast_computes_in_half_precision(self, by_row: bool, dtype: torch.dtype) -> None:
        base, vectors, x, weights = given_inputs(by_row)
        x.requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            found = apply_dense(base, vectors, x.to(dtype), weights)
        assert found.dtype == torch.bfloat16
        assert_close(found.float(), literal(base, vectors, x, weights), rtol=0.1, atol=0.2)
        found.float().sum().backward()
        (expected,) = torch.autograd.grad(literal(base, vectors, x, weights).sum(), x)
        assert_close(x.grad, expected, rtol=0.1, atol=0.2)

    def test_half_precision_vectors_serve_fp32_activations(self) -> None:
        base, vectors, x, weights = given_inputs()
        found = apply_dense(base.bfloat16(), vectors.bfloat16(), x, weights)
        assert_close(found, literal(base.bfloat16().float(), vectors.bfloat16().float(), x, weights))

    def test_rows_go_through_none_but_their_own_experts(self) -> None:
        base, vectors, x, weights = given_inputs(by_row=True)
        weights[..., 1] = 0
        vectors[1] = torch.nan
        assert apply_dense(base, vectors, x, weights).isfinite().all()

    def test_a_mixture_that_many_samples_share_is_made_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        made = []

        def counted(*given: Any) -> Tensor:
            made.append(given)
            return sample_values(*given)

        monkeypatch.setattr(activations, "sample_values", counted)
        base, vectors, x, weights = given_inputs()
        shared = weights[:1].expand(5, -1)
        found = apply_dense(base, vectors, x, shared)
        assert len(made) == 1
        assert_close(found, literal(base, vectors, x, shared))


class TestProduct:
    @pytest.fixture(params=[0, LARGE], ids=["oneDNN", "torch"])
    def _large(self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(activations, "_LARGE", request.param)

    @pytest.mark.usefixtures("_large")
    @pytest.mark.parametrize("shape", [(6,), (4, 6), (5, 4, 6)], ids=str)
    def test_it_is_the_product_with_the_transpose(self, shape: tuple[int, ...]) -> None:
        x, matrix, onto = random(*shape), random(7, 6, seed=1), random(*shape[:-1], 7, seed=2)
        assert_close(product(x, matrix), x @ matrix.T)
        assert_close(product(x, random(6, 7, seed=1).T), x @ random(6, 7, seed=1))
        assert_close(product(x, matrix, onto.clone()), onto + x @ matrix.T)

    @pytest.mark.usefixtures("_large")
    def test_it_is_differentiable(self) -> None:
        x, matrix = random(4, 6).requires_grad_(), random(7, 6, seed=1).requires_grad_()
        product(x, matrix, torch.zeros(4, 7)).sum().backward()
        assert_close(x.grad, matrix.detach().sum(0).expand(4, -1))
        assert_close(matrix.grad, x.detach().sum(0).expand(7, -1))

    @pytest.mark.usefixtures("_large")
    def test_low_rank_blocks_are_multiplied_by_it(self) -> None:
        base, vectors, x, weights = given_inputs()
        block = LowRankCodec(fraction=1.0).encode(base, vectors)
        assert_close(block.apply(x, weights), literal(base, vectors, x, weights), rtol=1e-5, atol=1e-5)

    @pytest.mark.usefixtures("_large")
    def test_autocast_holds_here_too(self) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            assert product(random(4, 6), random(7, 6)).dtype == torch.bfloat16

    @needs_onednn
    @pytest.mark.parametrize(("count", "expected"), [(2**21 - 1, False), (2**21, True)])
    def test_onednn_is_asked_for_large_products_in_inference(self, count: int, expected: bool) -> None:
        x = random(2, 3)
        assert activations._suits_onednn(count, x) == expected
        assert not activations._suits_onednn(count, x.double())
        assert not activations._suits_onednn(count, x.requires_grad_())
        with torch.no_grad():
            assert activations._suits_onednn(count, x) == expected


@pytest.mark.parametrize("batch", [(), (4,), (4, 2)], ids=str)
@pytest.mark.parametrize("shape", [(), (5,), (3, 2, 2)], ids=str)
def test_values_are_each_samples_own_tensor(batch: tuple[int, ...], shape: tuple[int, ...]) -> None:
    base, vectors, weights = random(*shape).bfloat16(), random(3, *shape, seed=1), random(*batch, 3, seed=2)
    with torch.autocast("cpu", torch.bfloat16):
        found = sample_values(base, vectors.bfloat16(), weights)
    assert (found.shape, found.dtype) == ((*batch, *shape), torch.float32)
    assert_close(found, base.float() + torch.tensordot(weights, vectors.bfloat16().float(), 1))
