"""Vectors that stay in their files give what vectors in memory give."""

import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.testing import assert_close

from adamerge.checkpoints import open_checkpoint
from adamerge.errors import InputError
from adamerge.state import State
from adamerge.vectors import Block, TaskVectors, streamed
from adamerge.vectors.dense import DenseBlock
from adamerge.vectors.origins import Origins
from adamerge.vectors.streamed import EditedBlock, StreamedBlock
from adamerge.vectors.streamed import _reader as reader

SHAPE, DTYPES = (5, 7), (torch.float32, torch.bfloat16, torch.float16)


class Adapter(dict[str, Tensor]):
    """An expert that knows its difference exactly."""

    def delta(self, name: str) -> Tensor | None:
        return self.get(name)


class LowRank(Mapping[str, Tensor]):
    """An expert that makes a tensor's difference whenever it is asked."""

    def __init__(self, **deltas: Tensor) -> None:
        self.deltas = deltas

    def delta(self, name: str) -> Tensor:
        return self.deltas[name].clone()

    def __getitem__(self, name: str) -> Tensor:
        return self.deltas[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.deltas)

    def __len__(self) -> int:
        return len(self.deltas)


def saved(path: Path, seed: int, dtype: torch.dtype, change: Callable[[Tensor], object] = id) -> State:
    tensor = torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))
    change(tensor)
    save_file({"w": tensor.to(dtype), "other": torch.ones(2)}, path / f"{seed}.safetensors")
    return open_checkpoint(path / f"{seed}.safetensors")


@pytest.fixture(params=[1, 8, 20, 2**19])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(streamed, "_CHUNK", request.param)
    return request.param


@pytest.fixture
def block(tmp_path: Path) -> StreamedBlock:
    """Two files, one expert in memory, one that lacks the tensor, and an adapter."""
    base = saved(tmp_path, 0, torch.float32)
    lacking, adapter = {"other": torch.zeros(2)}, Adapter(w=torch.full(SHAPE, 0.25))
    experts = {"a": saved(tmp_path, 1, torch.bfloat16), "b": saved(tmp_path, 2, torch.float16)}
    memory = {"w": torch.arange(35.0).reshape(SHAPE).T.reshape(7, 5).T}
    return StreamedBlock("w", Origins(base, {**experts, "m": memory, "none": lacking, "lora": adapter}))


def expected(block: StreamedBlock) -> DenseBlock:
    base = block.origins.base["w"]
    tensors = [block.origins.experts[task]["w"] for task in ("a", "b", "m")]
    files = [tensor.float() - base.to(tensor.dtype).float() for tensor in tensors]
    return DenseBlock(base, torch.stack([*files, torch.zeros(SHAPE), torch.full(SHAPE, 0.25)]))


def require_same(block: Block, dense: Block) -> None:
    coefficients, gradient = torch.tensor([0.5, -1.0, 2.0, 3.0, 1.0]), torch.randn(SHAPE)
    assert isinstance(block, Block)
    assert block.shape == dense.shape
    assert_close(block.dense(), dense.dense(), rtol=0, atol=0)
    assert_close(block.base_tensor(), dense.base_tensor(), rtol=0, atol=0)
    assert_close(block.combine(coefficients), dense.combine(coefficients))
    assert_close(block.project(gradient), dense.project(gradient), rtol=1e-4, atol=1e-4)
    spans, pieces = zip(*((span, piece.clone()) for span, piece in block.pieces()), strict=True)
    assert [i for span in spans for i in range(35)[span]] == list(range(35))
    assert_close(torch.cat(pieces, dim=1), dense.dense().reshape(5, -1), rtol=0, atol=0)


@pytest.mark.usefixtures("chunk")
class TestAgainstVectorsInMemory:
    def test_as_they_are(self, block: StreamedBlock) -> None:
        require_same(block, expected(block))

    def test_what_counts_nothing_is_read_once(
        self, block: StreamedBlock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        alone, dense, read = torch.tensor([0.0, 1.0, 0.0, 0.0, 0.0]), expected(block), []
        assert_close(block.combine(alone), dense.combine(alone))
        monkeypatch.setattr(
            streamed, "_reader", lambda state, name: read.append(state) or reader(state, name)
        )
        assert_close(block.combine(alone), dense.combine(alone))
        assert read == [block.origins.base, block.origins.experts["b"]]

    def test_experts_that_make_whole_tensors_are_never_there_together(
        self, block: StreamedBlock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        tasks = ("x", "y", "z")
        experts = {task: LowRank(w=torch.randn(SHAPE)) for task in tasks}
        alike = StreamedBlock("w", Origins(block.origins.base, experts))
        dense = DenseBlock(block.base_tensor(), torch.stack([experts[task]["w"] for task in tasks]))
        alive, most = weakref.WeakSet(), []

        def watched(state: State, name: str) -> object:
            alive.add(found := reader(state, name))
            most.append(sum(isinstance(each, Tensor) for each in alive))
            return found

        monkeypatch.setattr(streamed, "_reader", watched)
        for _ in range(2):  # the first walk notes norms
            assert_close(alike.combine(torch.ones(3)), dense.combine(torch.ones(3)))
            assert_close(alike.project(torch.ones(SHAPE)), dense.project(torch.ones(SHAPE)))
        assert len(most) == 4 * 3 * 2
        assert max(most) == 1
        assert_close(torch.tensor(alike.origins.vector_norms["w"]), dense.dense().flatten(1).norm(dim=1))

    @pytest.mark.parametrize("entrywise", [True, False])
    def test_edited(self, block: StreamedBlock, entrywise: bool) -> None:
        dense = expected(block)
        halved = DenseBlock(dense.base_tensor(), dense.dense() / 2)
        require_same(EditedBlock(block, lambda vectors: vectors / 2, entrywise), halved)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_a_base_of_each_dtype(self, tmp_path: Path, dtype: torch.dtype) -> None:
        base, expert = saved(tmp_path, 0, dtype), saved(tmp_path, 1, dtype)
        block = StreamedBlock("w", Origins(base, {"a": expert}))
        assert torch.equal(block.dense()[0], expert["w"].float() - base["w"].float())
        assert block.base_tensor().dtype == dtype

    def test_nan_in_the_last_entry_is_refused_where_it_is(self, tmp_path: Path) -> None:
        faulty = saved(tmp_path, 1, torch.float32, lambda tensor: tensor[-1, -1:].fill_(torch.nan))
        block = StreamedBlock("w", Origins(saved(tmp_path, 0, torch.float32), {"a": faulty}))
        with pytest.raises(InputError, match=r"expert 'a': 1 non-finite value\(s\) in w, first at \[4, 6\]"):
            block.dense()

    def test_norms_are_noted_by_the_first_walk_alone(self, block: StreamedBlock) -> None:
        vectors = expected(block).dense()
        block.dense()
        noted = block.origins.vector_norms["w"]
        assert_close(torch.tensor(noted), vectors.reshape(5, -1).norm(dim=1))
        block.dense()
        assert block.origins.vector_norms["w"] is noted

    def test_huge_finite_values_pass(self, tmp_path: Path) -> None:
        base, huge = (saved(tmp_path, k, torch.float32, lambda t: t.fill_(1e30)) for k in (0, 1))
        block = StreamedBlock("w", Origins(base, {"a": {"w": huge["w"] * 2}}))
        assert torch.equal(block.dense()[0], huge["w"])


def test_a_file_that_is_cut_off_meanwhile_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streamed, "_CHUNK", 8)
    block = StreamedBlock(
        "w", Origins(saved(tmp_path, 0, torch.float32), {"a": saved(tmp_path, 1, torch.float32)})
    )
    walk, file = block.pieces(), tmp_path / "1.safetensors"
    next(walk)
    with file.open("r+b") as stream:
        stream.truncate(file.stat().st_size - 8)
    with pytest.raises(InputError, match="was cut off"):
        list(walk)


class TestHalfPrecision:
    """An expert in half precision is compared with the base as that precision has it."""

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("codec", ["stream", "fp32"])
    def test_a_tensor_that_training_left_alone_has_no_vector(self, dtype: torch.dtype, codec: str) -> None:
        base = {"w": torch.randn(SHAPE), "v": torch.randn(SHAPE)}
        expert = {"w": base["w"].to(dtype), "v": (base["v"] + 1).to(dtype)}
        vectors = TaskVectors.open(base, {"x": expert}, codec, force=True)
        assert not vectors.blocks["w"].dense().any()
        merged = vectors.merge(vectors.one_hot("x"))
        assert torch.equal(merged["w"], base["w"])
        assert_close(merged["v"], base["v"] + 1, atol=0.02, rtol=0.01)
        assert vectors.origins.vector_norms["w"] == [0.0]

    def test_what_half_precision_cannot_hold_is_not_rounded(self) -> None:
        base, expert = {"w": torch.tensor([1e6, 1.0001])}, {"w": torch.tensor([60000.0, 2.0]).half()}
        dense = TaskVectors.open(base, {"x": expert}, "stream", force=True).blocks["w"].dense()
        assert_close(dense, torch.tensor([[60000.0 - 1e6, 1.0]]))

    def test_a_wider_expert_is_compared_with_the_base_as_it_is(self) -> None:
        base, expert = {"w": torch.ones(3).bfloat16()}, {"w": torch.ones(3) + 1e-5}
        dense = TaskVectors.open(base, {"x": expert}, "stream").blocks["w"].dense()
        assert_close(dense, torch.full((1, 3), 1e-5), atol=1e-7, rtol=0)
