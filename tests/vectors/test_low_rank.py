"""Low-rank storage: the error of a truncated SVD and no more, its size, and products by sample."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor
from torch.testing import assert_close

from adamerge.errors import InputError
from adamerge.vectors import DenseBlock, LowRankBlock, LowRankCodec, TaskVectors, low_rank

WIDE, TALL = (12, 30), (30, 12)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def encoded(vectors: Tensor, **options: Any) -> LowRankBlock:
    block = LowRankCodec(**options).encode(random(*vectors.shape[1:], seed=9), vectors)
    assert isinstance(block, LowRankBlock)
    return block


def made(shape: tuple[int, int], ranks: tuple[int, ...]) -> LowRankBlock:
    left, right = random(sum(ranks), shape[0], seed=1), random(sum(ranks), shape[1], seed=2)
    return LowRankBlock(random(*shape, seed=3) / 4, left / 4, right / 4, ranks)


def kept(kind: str, weights: Tensor) -> Tensor:
    """Zero some weights, all, or all but one of each mixture."""
    if kind == "some":
        return weights.relu()
    if kind == "one":
        return weights * (weights == weights.amax(-1, keepdim=True))
    return weights if kind == "all" else torch.zeros_like(weights)


def mixed(block: LowRankBlock, x: Tensor, weights: Tensor) -> Tensor:
    """Every row through its own expanded matrix."""
    if weights.dim() == 2:
        weights = weights[:, None].expand(-1, x.shape[1], -1)
    matrices = block.base + torch.einsum("srt,toi->sroi", weights, block.dense().to(weights.dtype))
    return torch.einsum("sri,sroi->sro", x, matrices)


class TestCodec:
    @pytest.mark.parametrize("shape", [WIDE, TALL, (12, 12)], ids=str)
    @pytest.mark.parametrize("rank", [1, 5, 12, 99])
    def test_the_error_is_the_norm_of_the_singular_values_left_out(
        self, shape: tuple[int, int], rank: int
    ) -> None:
        vectors = 0.01 * random(3, *shape)
        errors = (encoded(vectors, rank=rank).dense() - vectors).flatten(1).norm(dim=1)
        values = torch.linalg.svdvals(vectors)
        assert_close(errors, values[:, rank:].square().sum(1).sqrt(), rtol=1e-5, atol=1e-7)

    def test_small_singular_values_beside_large_ones_are_kept(self) -> None:
        u, v = (torch.linalg.qr(random(20, 20, seed=seed)).Q for seed in (1, 2))
        vector = u * torch.logspace(0, -6, 20) @ v.T
        assert_close(encoded(vector[None], rank=20).dense()[0], vector, rtol=0, atol=1e-7)

    @pytest.mark.parametrize("shape", [WIDE, TALL], ids=str)
    def test_singular_values_are_in_the_left_factors(self, shape: tuple[int, int]) -> None:
        block = encoded(random(1, *shape), rank=4)
        assert_close(block.right @ block.right.T, torch.eye(4), rtol=0, atol=1e-6)
        assert_close(block.left.norm(dim=1), torch.linalg.svdvals(random(1, *shape))[0, :4])

    def test_a_fraction_is_of_the_shorter_side_rounded_down_but_at_least_one(self) -> None:
        assert encoded(random(2, *WIDE), fraction=0.5).ranks == (6, 6)
        assert encoded(random(1, 40, 100), fraction=0.29).ranks == (11,)
        assert encoded(random(1, 100, 100), fraction=0.29).ranks == (29,)
        assert encoded(random(1, 3, 5)).ranks == (1,)

    def test_energy_asks_for_the_smallest_rank_that_reaches_it(self) -> None:
        vectors = torch.stack([torch.diag(torch.tensor([2.0, 1, 1])), torch.diag(torch.tensor([5.0, 1, 1]))])
        assert encoded(vectors, energy=0.7).ranks == (2, 1)
        assert encoded(vectors, energy=0.9).ranks == (3, 1)
        assert encoded(vectors, energy=1.0).ranks == (3, 3)

    def test_what_is_not_there_takes_no_room(self) -> None:
        product = random(12, 2, seed=1) @ random(2, 30, seed=2)
        block = encoded(torch.stack([torch.zeros(WIDE), product, random(*WIDE)]), rank=8)
        assert block.ranks[0] == 0
        assert block.ranks[1] < 8
        assert block.ranks[2] == 8
        assert_close(block.dense()[:2], torch.stack([torch.zeros(WIDE), product]), rtol=1e-5, atol=1e-5)

    def test_stored_scalars_are_rank_times_both_sides(self) -> None:
        block = encoded(random(2, *WIDE), rank=4, dtype="bf16")
        assert block.n_scalars == 2 * 4 * (12 + 30)
        assert block.n_bytes == 4 * 12 * 30 + 2 * block.n_scalars
        assert block.left.dtype == block.right.dtype == torch.bfloat16

    @pytest.mark.parametrize("shape", [(), (5,), (6, 3, 2, 2)], ids=str)
    def test_vectors_and_kernels_are_stored_whole_in_the_same_dtype(self, shape: tuple[int, ...]) -> None:
        block = LowRankCodec(rank=1, dtype="fp16").encode(random(*shape), random(2, *shape))
        assert isinstance(block, DenseBlock)
        assert block.vectors.dtype == torch.float16

    def test_kernels_are_matrices_where_asked(self) -> None:
        block = encoded(random(2, 6, 3, 2, 2), rank=2, kernels=True)
        assert (block.left.shape, block.right.shape) == ((4, 6), (4, 12))
        assert block.shape == (2, 6, 3, 2, 2)

    @pytest.mark.parametrize("shape", [(0, 4), (4, 0)], ids=str)
    def test_empty_matrices_pass(self, shape: tuple[int, int]) -> None:
        block = encoded(torch.zeros(2, *shape))
        assert block.ranks == (0, 0)
        assert block.dense().shape == (2, *shape)

    def test_fp16_refuses_what_it_cannot_hold(self) -> None:
        with pytest.raises(InputError, match=r"cannot hold w: a singular value is too large"):
            TaskVectors.open(
                {"w": 1e5 * random(9, 9)},
                {"a": {"w": 2e5 * random(9, 9)}},
                LowRankCodec(dtype="fp16"),
                force=True,
            )

    def test_names_tell_the_options(self) -> None:
        assert LowRankCodec().name == "low_rank(fraction=0.1)"
        assert (
            LowRankCodec(rank=8, dtype="bf16", kernels=True).name
            == "low_rank(rank=8, dtype=bf16, kernels=True)"
        )
        assert (
            TaskVectors.open({"w": random(4)}, {"a": {"w": random(4) + 1e-3}}, "low_rank").codec
            == LowRankCodec()
        )

    @pytest.mark.parametrize(
        ("options", "problem"),
        [
            ({"fraction": 0.1, "rank": 3}, "fraction=0.1 and rank=3 both choose the rank"),
            ({"rank": 3, "energy": 0.9}, "rank=3 and energy=0.9 both choose"),
            ({"rank": 0}, "rank=0 is less than 1"),
            ({"fraction": 0.0}, r"fraction=0.0 is outside \(0, 1\]"),
            ({"energy": 1.5}, r"energy=1.5 is outside \(0, 1\]"),
            ({"energy": float("nan")}, "energy=nan is outside"),
            ({"dtype": "fp8"}, "dtype 'fp8' is unknown.\nKnown: bf16, fp16, fp32."),
        ],
    )
    def test_wrong_options_are_refused(self, options: dict[str, Any], problem: str) -> None:
        with pytest.raises(InputError, match=problem):
            LowRankCodec(**options)

    def test_a_lora_expert_is_stored_exactly_as_its_product(self, tmp_path: Path) -> None:
        a, b = random(3, 30, seed=1), random(12, 3, seed=2)
        prefix = "base_model.model.proj"
        save_file(
            {f"{prefix}.lora_A.weight": a, f"{prefix}.lora_B.weight": b},
            tmp_path / "adapter_model.safetensors",
        )
        config = {"peft_type": "LORA", "r": 3, "lora_alpha": 0.06, "target_modules": ["proj"]}
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        base = {"proj.weight": random(12, 30), "proj.bias": random(12)}
        block = TaskVectors.open(base, {"a": tmp_path}, LowRankCodec(rank=3)).blocks["proj.weight"]
        assert isinstance(block, LowRankBlock)
        assert block.n_scalars == 3 * (12 + 30)
        assert_close(block.dense()[0], 0.02 * b @ a, rtol=1e-5, atol=1e-5)


class TestApply:
    @pytest.fixture(params=[-(10**6), 10**6], ids=["gathered", "together"])
    def _gather(self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(low_rank, "_GATHER", request.param)

    @settings(max_examples=200, deadline=None)
    @given(
        ranks=st.lists(st.integers(0, 3), min_size=1, max_size=5).map(tuple),
        shape=st.tuples(st.integers(1, 6), st.integers(1, 6)),
        batch=st.tuples(st.integers(1, 5), st.integers(1, 3)),
        grain=st.sampled_from(["by sample", "by row"]),
        kind=st.sampled_from(["all", "some", "one", "none"]),
        learnt=st.booleans(),
        gather=st.sampled_from([-(10**6), 0, 10**6]),
        seed=st.integers(0, 99),
    )
    def test_it_equals_every_samples_own_matrix(
        self,
        ranks: tuple[int, ...],
        shape: tuple[int, int],
        batch: tuple[int, int],
        grain: str,
        kind: str,
        learnt: bool,
        gather: int,
        seed: int,
    ) -> None:
        block, x = made(shape, ranks), random(*batch, shape[1], seed=4)
        weights = kept(kind, random(*batch[: 1 + (grain == "by row")], len(ranks), seed=seed))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(low_rank, "_GATHER", gather)
            found = block.apply(x, weights.requires_grad_(learnt))
        assert_close(found.detach(), mixed(block, x, weights.detach()), rtol=1e-5, atol=1e-5)

    def test_the_transpose_is_applied_where_asked(self) -> None:
        block, x, weights = made((6, 4), (2, 1)), random(3, 5, 6), random(3, 2)
        flipped = LowRankBlock(block.base.T, block.right, block.left, block.ranks)
        assert_close(block.apply(x, weights, transposed=True), mixed(flipped, x, weights))

    def test_kernels_are_matrices_of_their_first_axis(self) -> None:
        flat = made((6, 12), (2, 1))
        block = LowRankBlock(flat.base.reshape(6, 3, 2, 2), flat.left, flat.right, flat.ranks)
        x, weights = random(3, 5, 12), random(3, 2)
        assert torch.equal(block.apply(x, weights), flat.apply(x, weights))

    @pytest.mark.parametrize("shape", [(3, 3), (3, 2, 3)], ids=["by sample", "by row"])
    def test_weights_and_activations_are_differentiable_at_zero_weights_too(
        self, shape: tuple[int, ...]
    ) -> None:
        block, x, weights = made((4, 5), (2, 0, 1)), random(3, 2, 5).double(), random(*shape).double().relu()
        assert (weights == 0).any()
        assert torch.autograd.gradcheck(block.apply, (x.requires_grad_(), weights.requires_grad_()))

    @pytest.mark.usefixtures("_gather")
    def test_activations_are_differentiable_under_fixed_weights(self) -> None:
        block, x, weights = made((4, 5), (2, 0, 1)), random(3, 2, 5).double(), torch.eye(3).double()
        assert torch.autograd.gradcheck(lambda x: block.apply(x, weights), (x.requires_grad_(),))

    @pytest.mark.usefixtures("_gather")
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_autocast_computes_in_half_precision(self, dtype: torch.dtype) -> None:
        block, x, weights = made((4, 5), (2, 1)), random(3, 2, 5), torch.eye(3)[:, :2]
        with torch.autocast("cpu", torch.bfloat16):
            found = block.apply(x.to(dtype), weights)
        assert found.dtype == torch.bfloat16
        assert_close(found.float(), mixed(block, x, weights), rtol=0.05, atol=0.05)

    def test_half_precision_factors_serve_fp32_activations(self) -> None:
        exact, x, weights = made((4, 5), (2, 1)), random(3, 2, 5), random(3, 2)
        block = LowRankBlock(exact.base, exact.left.bfloat16(), exact.right.bfloat16(), exact.ranks)
        assert_close(block.apply(x, weights), mixed(block, x, weights))

    def test_tasks_without_weight_cost_nothing(self) -> None:
        block, x = made((4, 5), (2, 3, 1)), random(3, 2, 5)
        broken = LowRankBlock(block.base, block.left.clone(), block.right.clone(), block.ranks)
        broken.left[2:5], broken.right[2:5] = torch.nan, torch.nan
        weights = torch.tensor([[1.0, 0, 0], [0.5, 0, 0.5], [0, 0, 0]])
        assert torch.equal(broken.apply(x, weights), block.apply(x, weights))

    @pytest.mark.usefixtures("unchecked")  # the checks of annotations cannot be compiled
    def test_one_graph_is_compiled(self) -> None:
        block, x, weights = made((4, 5), (2, 1)), random(3, 2, 5), torch.eye(3)[:, :2]
        compiled = torch.compile(block.apply, backend="eager", fullgraph=True)
        assert_close(compiled(x, weights), block.apply(x, weights))
