"""The contract of stored task vectors. A new codec subclasses `BlockContract` and gives two methods."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from adamerge.vectors import (
    BernoulliCodec,
    Block,
    Codec,
    DenseCodec,
    LowRankCodec,
    MagnitudeCodec,
    dense,
    low_rank,
    sparse,
    ternary,
)
from adamerge.vectors.block import Merge
from adamerge.vectors.ternary import TernaryCodec

SHAPES = [(), (5,), (5, 7), (3, 2, 4), (2, 3, 2, 2)]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class BlockContract:
    def codec(self) -> Codec:
        raise NotImplementedError

    def storage_error(self) -> float:
        """Give the relative error of one stored entry."""
        raise NotImplementedError

    @pytest.fixture(params=SHAPES, ids=str)
    def shape(self, request: pytest.FixtureRequest) -> tuple[int, ...]:
        return request.param

    @pytest.fixture(params=[1, 2, 8], ids="T{}".format)
    def n_tasks(self, request: pytest.FixtureRequest) -> int:
        return request.param

    @pytest.fixture
    def vectors(self, n_tasks: int, shape: tuple[int, ...]) -> Tensor:
        return random(n_tasks, *shape, seed=1)

    @pytest.fixture
    def block(self, vectors: Tensor, shape: tuple[int, ...]) -> Block:
        return self.codec().encode(random(*shape, seed=2), vectors)

    def test_dense_gives_back_what_was_encoded(self, block: Block, vectors: Tensor) -> None:
        assert block.dense().dtype == torch.float32
        assert_close(block.dense(), vectors, rtol=self.storage_error(), atol=self.storage_error())

    def test_combine_equals_its_dense_formula(self, block: Block, n_tasks: int) -> None:
        coefficients = random(n_tasks, seed=3)
        expected = block.base_tensor() + torch.tensordot(coefficients, block.dense(), 1)
        assert_close(block.combine(coefficients), expected)

    def test_project_equals_its_dense_formula(self, block: Block, shape: tuple[int, ...]) -> None:
        gradient = random(*shape, seed=4)
        expected = torch.stack([(vector * gradient).sum() for vector in block.dense()])
        assert_close(block.project(gradient), expected, rtol=1e-5, atol=1e-5)

    def test_project_is_the_adjoint_of_combine(self, block: Block, n_tasks: int) -> None:
        coefficients, gradient = random(n_tasks, seed=5), random(*block.base_tensor().shape, seed=6)
        step = block.combine(coefficients) - block.base_tensor()
        assert_close((step * gradient).sum(), coefficients @ block.project(gradient), rtol=1e-4, atol=1e-5)

    def test_the_autograd_rule_equals_autograd_through_the_dense_formula(
        self, block: Block, n_tasks: int
    ) -> None:
        fused = random(n_tasks, 1, seed=7).requires_grad_()
        plain = fused.detach().clone().requires_grad_()
        Merge.apply(fused, [block])[0].square().sum().backward()
        (block.base_tensor() + torch.tensordot(plain[:, 0], block.dense(), 1)).square().sum().backward()
        assert_close(fused.grad, plain.grad, rtol=1e-5, atol=1e-4)

    def test_zero_coefficients_give_the_base_exactly(self, block: Block, n_tasks: int) -> None:
        assert torch.equal(block.combine(torch.zeros(n_tasks)), block.base_tensor())

    def test_a_half_precision_base_is_widened_and_kept(self, vectors: Tensor) -> None:
        base = random(*vectors.shape[1:]).bfloat16()
        block = self.codec().encode(base, vectors)
        assert torch.equal(block.base_tensor(), base)
        assert block.base_tensor().dtype == torch.bfloat16
        assert torch.equal(block.combine(torch.zeros(len(vectors))), base.float())

    def test_moving_keeps_the_values(self, block: Block, n_tasks: int) -> None:
        moved, coefficients = block.to(torch.device("cpu")), random(n_tasks)
        assert torch.equal(moved.combine(coefficients), block.combine(coefficients))
        assert moved.n_bytes == block.n_bytes

    def test_its_size_counts_the_base_and_something_per_task(self, block: Block) -> None:
        assert block.n_bytes >= block.base_tensor().nbytes + len(block.dense())


class DenseContract(BlockContract):
    dtype: torch.dtype

    @pytest.fixture(autouse=True, params=[2**21, 3], ids=["whole", "chunks"])
    def _chunk(self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
        """A chunk of three entries puts a boundary inside every tensor."""
        monkeypatch.setattr(dense, "_CHUNK", request.param)

    def codec(self) -> DenseCodec:
        return DenseCodec(self.dtype)

    def storage_error(self) -> float:
        return torch.finfo(self.dtype).eps / 2

    def test_it_stores_one_number_per_entry(self, block: Block, vectors: Tensor) -> None:
        assert block.n_bytes == block.base_tensor().nbytes + vectors.numel() * self.dtype.itemsize


class TestFp32(DenseContract):
    dtype = torch.float32


class TestBf16(DenseContract):
    dtype = torch.bfloat16


class TestFp16(DenseContract):
    dtype = torch.float16


def test_fp16_refuses_what_it_cannot_hold() -> None:
    with pytest.raises(OverflowError, match="a task vector reaches 1e\\+05"):
        DenseCodec(torch.float16).encode(torch.zeros(2), torch.tensor([[1.0, 1e5]]))


class TestTernary(BlockContract):
    """Vectors of three values, whose scales differ by task; one is all zeros where there are several."""

    @pytest.fixture(autouse=True, params=[2**20, 9], ids=["whole", "runs"])
    def _chunk(self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(ternary, "_CHUNK", request.param)

    @pytest.fixture
    def vectors(self, n_tasks: int, shape: tuple[int, ...]) -> Tensor:
        signs = torch.randint(-1, 2, (n_tasks, *shape), generator=torch.Generator().manual_seed(1))
        scales = 0.1 * torch.arange(1, n_tasks + 1) % 0.7
        return signs * scales.reshape(-1, *[1] * len(shape))

    def codec(self) -> TernaryCodec:
        return TernaryCodec()

    def storage_error(self) -> float:
        return 0.0

    def test_it_stores_two_bits_an_entry_and_one_scale(self, block: Block, vectors: Tensor) -> None:
        stored = block.n_bytes - block.base_tensor().nbytes - 4 * len(vectors)
        assert vectors.numel() / 4 <= stored <= vectors.numel() / 4 + vectors.numel()


class TestLowRank(BlockContract):
    """All factors, of matrices and of kernels."""

    @pytest.fixture(autouse=True, params=[2**20, 20], ids=["whole", "rows"])
    def _chunk(self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(low_rank, "_CHUNK", request.param)

    def codec(self) -> LowRankCodec:
        return LowRankCodec(fraction=1.0, kernels=True)

    def storage_error(self) -> float:
        return 1e-5


class TestLowRankInHalfPrecision(TestLowRank):
    """Factors whose products are computed in fp32."""

    def codec(self) -> LowRankCodec:
        return LowRankCodec(fraction=1.0, kernels=True, dtype="fp16")

    def storage_error(self) -> float:
        return 1e-2


class TestMagnitude(BlockContract):
    """All entries."""

    @pytest.fixture(autouse=True, params=[2**20, 9], ids=["whole", "chunks"])
    def _chunk(self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sparse, "_CHUNK", request.param)

    def codec(self) -> Codec:
        return MagnitudeCodec(density=1.0)

    def storage_error(self) -> float:
        return 0.0


class TestBernoulli(TestMagnitude):
    """All entries."""

    def codec(self) -> Codec:
        return BernoulliCodec(density=1.0)
