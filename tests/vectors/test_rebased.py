"""Shared and exclusive: the identities of Twin-Merging's split, and what it stores."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from adamerge import merge
from adamerge.errors import InputError
from adamerge.vectors import LowRankBlock, LowRankCodec, Size, TaskVectors, rebase, storage

State = dict[str, Tensor]
SHAPES = {"conv": (4, 3, 2, 2), "ln": (6,), "scale": (), "w": (6, 10)}
LOSSLESS = ["fp32", LowRankCodec(fraction=1.0)]


def base() -> State:
    generator = torch.Generator().manual_seed(0)
    state = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    return state | {"steps": torch.tensor(7)}


def expert(seed: int) -> State:
    generator = torch.Generator().manual_seed(seed)
    changed = {
        n: t + 0.1 * torch.randn(t.shape, generator=generator) for n, t in base().items() if n in SHAPES
    }
    return base() | changed


@pytest.fixture
def vectors() -> TaskVectors:
    return TaskVectors.open(base(), {"a": expert(1), "b": expert(2)})


@pytest.fixture
def shared(vectors: TaskVectors) -> State:
    return vectors.merge(vectors.uniform(0.3))


@pytest.mark.parametrize("codec", LOSSLESS, ids=["fp32", "all factors"])
def test_one_hot_coefficients_give_back_the_experts(
    vectors: TaskVectors, shared: State, codec: str | LowRankCodec
) -> None:
    exclusive = rebase(vectors, shared, codec)
    for task, seed in (("a", 1), ("b", 2)):
        found = exclusive.state(exclusive.one_hot(task))
        for name, tensor in expert(seed).items():
            assert_close(found[name], tensor, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("codec", ["fp32", "bf16", "ternary", "low_rank", "magnitude", "bernoulli"])
def test_zero_coefficients_give_the_shared_model_whatever_the_codec(
    vectors: TaskVectors, shared: State, codec: str
) -> None:
    exclusive = rebase(vectors, shared, codec)
    found = exclusive.merge(exclusive.uniform(0.0))
    assert found.keys() == shared.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in shared.items())


@pytest.mark.parametrize("codec", ["fp32", "low_rank"])
def test_one_expert_that_is_the_shared_model_has_nothing_of_its_own(codec: str) -> None:
    alone = TaskVectors.open(base(), {"a": expert(1)})
    exclusive = rebase(alone, alone.merge(alone.uniform(1.0)), codec)
    assert not any(stack.any() for _, stack in exclusive.stacks())
    block = exclusive.blocks["w"]
    assert codec == "fp32" or (isinstance(block, LowRankBlock) and block.n_scalars == 0)


def test_any_merge_is_a_shared_model_and_the_rest_stays(vectors: TaskVectors) -> None:
    exclusive = rebase(vectors, merge(vectors, "ties", scale=1.0))
    assert exclusive.codec == LowRankCodec()
    assert exclusive.tasks == vectors.tasks
    assert exclusive.digests == vectors.digests
    assert exclusive.rest == vectors.rest


def test_the_shared_model_stays_in_its_dtype(vectors: TaskVectors, shared: State) -> None:
    half = {name: tensor.bfloat16() for name, tensor in shared.items()}
    exclusive = rebase(vectors, half, "fp32")
    assert all(
        torch.equal(tensor, half[name]) for name, tensor in exclusive.base_state().items() if name in half
    )
    assert_close(exclusive.merge(exclusive.one_hot("a"))["w"], expert(1)["w"])


def test_tied_tensors_keep_both_names() -> None:
    tied = base()
    tied["head"] = tied["w"]
    other = expert(1)
    other["head"] = other["w"]
    vectors = TaskVectors.open(tied, {"a": other})
    exclusive = rebase(vectors, vectors.merge(vectors.uniform(0.5)), "fp32")
    assert exclusive.aliases == vectors.aliases
    found = exclusive.merge(exclusive.one_hot("a"))
    assert_close(found["head"], other["w"])
    assert found["head"] is found["w"]


def test_edits_work_on_exclusive_experts(vectors: TaskVectors, shared: State) -> None:
    exclusive = rebase(vectors, shared, "low_rank")
    doubled = exclusive.edit(lambda _, stack: 2 * stack)
    assert_close(doubled.blocks["w"].dense(), 2 * exclusive.blocks["w"].dense(), rtol=1e-5, atol=1e-6)


WRONG = {
    "lacking": ({"w": None}, r"the merged model lacks w\."),
    "misshapen": ({"w": torch.zeros(3)}, r"has w of shape \[3\], the experts of \[6, 10\]"),
    "diverged": ({"ln": torch.full((6,), torch.nan)}, r"non-finite value in ln, first at \[0\]"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_merged_model_that_does_not_fit_is_refused(vectors: TaskVectors, shared: State, kind: str) -> None:
    change, problem = WRONG[kind]
    changed = {n: t for n, t in (shared | change).items() if t is not None}
    with pytest.raises(InputError, match=problem):
        rebase(vectors, changed, "fp32")


def test_exclusive_experts_cannot_stay_in_files(vectors: TaskVectors, shared: State) -> None:
    with pytest.raises(InputError, match="codec 'stream' stores nothing"):
        rebase(vectors, shared, "stream")


def test_storage_is_counted_part_by_part(vectors: TaskVectors, shared: State) -> None:
    sizes = storage(rebase(vectors, shared, LowRankCodec(rank=2, dtype="bf16")))
    factors, kernels, others = 2 * 2 * (6 + 10), 2 * 48, 2 * (6 + 1)
    assert sizes == {
        "base": Size(48 + 6 + 1 + 60, 4 * (48 + 6 + 1 + 60)),
        "rest": Size(1, 8),
        "matrices": Size(factors, 2 * factors),
        "kernels": Size(kernels, 2 * kernels),
        "others": Size(others, 2 * others),
    }


@pytest.mark.parametrize("codec", ["fp32", "bf16", "ternary", "low_rank", "magnitude", "bernoulli"])
def test_parts_add_up_to_the_whole_in_every_codec(vectors: TaskVectors, codec: str) -> None:
    stored = rebase(vectors, vectors.merge(vectors.uniform(0.3)), codec)
    sizes = storage(replace(stored, rest={}))
    assert sum(size.n_bytes for size in sizes.values()) == stored.n_bytes


def test_a_tenth_of_the_rank_is_a_fifth_of_a_square_matrix() -> None:
    matrix = torch.randn(96, 96, generator=torch.Generator().manual_seed(0))
    vectors = TaskVectors.open({"w": torch.ones(96, 96)}, {"a": {"w": 1 + 0.1 * matrix}}, "low_rank")
    assert storage(vectors)["matrices"].scalars == 9 * (96 + 96)
