"""What every registered static method and edit keeps: the invariants G1 to G6 of the specification."""

from types import SimpleNamespace
from typing import cast

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from adamerge.state import State
from adamerge.static import EDITS, METHODS, edit, merge
from adamerge.static.registry import LOCAL_NEEDS
from adamerge.vectors import TaskVectors

EXPERTS = ("a", "b", "c")


def base_state() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    state = {
        "weight": torch.randn(6, 5, generator=generator),
        "bias": torch.randn(6, generator=generator).bfloat16(),
        "scale": torch.randn((), generator=generator).half(),
    }
    tables = {"position_ids": torch.arange(4), "mask": torch.tensor([True, False])}
    return state | tables | {"num_batches_tracked": torch.tensor(7)}


def expert(seed: int, size: float = 0.1) -> dict[str, Tensor]:
    """Move the base's floating tensors a little; an expert's counters differ, and must not matter."""
    generator = torch.Generator().manual_seed(seed)

    def moved(tensor: Tensor) -> Tensor:
        noise = size * torch.randn(tensor.shape, generator=generator)
        return (tensor + noise).to(tensor.dtype) if tensor.is_floating_point() else tensor

    return {n: moved(t) for n, t in base_state().items()} | {"num_batches_tracked": torch.tensor(8)}


def vectors(
    order: tuple[str, ...] = EXPERTS, only: set[str] | None = None, codec: str = "fp32"
) -> TaskVectors:
    experts = {name: expert(EXPERTS.index(name) + 1) for name in order}
    kept = only or set(base_state())
    return TaskVectors.open(
        {n: t for n, t in base_state().items() if n in kept},
        {name: {n: t for n, t in state.items() if n in kept} for name, state in experts.items()},
        codec,
    )


class FakeStatistic:
    """Positive numbers for "fisher", positive definite matrices for "gram": one for every expert's name."""

    order = ("weight", "bias", "scale")

    def __init__(self, kind: str, names: tuple[str, ...]) -> None:
        self.kind, self.seeds = kind, [EXPERTS.index(name) for name in names]

    def __call__(self, name: str, merged: State) -> Tensor | None:
        tensor = base_state()[name]
        shape = tuple(tensor.shape) if self.kind == "fisher" else (8, tensor.shape[-1] if tensor.dim() else 1)
        rows = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in self.seeds]
        if self.kind == "fisher":
            return torch.stack(rows).square()
        return torch.stack([row.T @ row for row in rows]) if tensor.dim() == 2 else None


class FakeBlocks:
    """One linear block, which reads noise that belongs to every expert's name."""

    order, device = ("weight", "bias"), torch.device("cpu")
    block = SimpleNamespace(names=order, files={"w": "weight", "b": "bias"})

    def __init__(self, _: str, names: tuple[str, ...]) -> None:
        self.tasks = names

    def __call__(self, name: str, merged: State) -> None:
        pass

    def units(self) -> list[SimpleNamespace]:
        return [self.block]

    def calls(self, unit: SimpleNamespace, task: str, merged: State, shots: int) -> list[Tensor]:
        return [torch.randn(4, 5, generator=torch.Generator().manual_seed(EXPERTS.index(task)))]

    def expert(self, unit: SimpleNamespace, task: str) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(EXPERTS.index(task))
        state = {name: base_state()[name].float() for name in self.order}
        return {name: x + 0.1 * torch.randn(x.shape, generator=generator) for name, x in state.items()}

    def run(self, unit: SimpleNamespace, weights: State, call: Tensor) -> list[Tensor]:
        return [call @ weights["weight"].T + weights["bias"]]


FAKES = {"blocks": FakeBlocks}


def merged(method: str, vectors: TaskVectors) -> dict[str, Tensor]:
    """Merge with the statistics that the method needs."""
    needs = [need for need in METHODS[method].needs if need not in LOCAL_NEEDS]
    statistics = {need: FAKES.get(need, FakeStatistic)(need, vectors.tasks) for need in needs}
    return merge(vectors, method, **({"statistics": statistics} if needs else {}))


def assert_same(found: State, expected: State, **tolerance: float) -> None:
    for name, tensor in expected.items():
        assert_close(found[name], tensor, **tolerance)


@pytest.mark.parametrize("method", METHODS)
class TestMethods:
    def test_g1_the_order_of_experts_does_not_matter(self, method: str) -> None:
        if METHODS[method].ordered:
            pytest.skip("the method takes the experts in the order given")
        reordered = merged(method, vectors(EXPERTS[::-1]))
        assert_same(reordered, merged(method, vectors()), rtol=1e-2, atol=1e-3)  # one unit of bf16

    def test_g2_experts_equal_to_the_base_give_the_base(self, method: str) -> None:
        still = vectors().edit(lambda _, stack: torch.zeros_like(stack))
        assert_same(merged(method, still), base_state(), rtol=0, atol=0)

    def test_g3_integer_tensors_are_the_bases(self, method: str) -> None:
        found = merged(method, vectors())
        for name in ("position_ids", "mask", "num_batches_tracked"):
            assert torch.equal(found[name], base_state()[name])

    def test_g4_the_same_call_gives_the_same_bits(self, method: str) -> None:
        assert_same(merged(method, vectors()), merged(method, vectors()), rtol=0, atol=0)

    def test_g5_names_and_dtypes_are_the_bases(self, method: str) -> None:
        found = merged(method, vectors())
        assert {n: t.dtype for n, t in found.items()} == {n: t.dtype for n, t in base_state().items()}

    def test_vectors_in_files_give_what_vectors_in_memory_give(self, method: str) -> None:
        streamed = vectors(codec="stream")
        assert_same(merged(method, streamed), merged(method, vectors()), rtol=0, atol=0)

    def test_every_row_is_complete(self, method: str) -> None:
        row = METHODS[method]
        assert row.name == method
        assert row.title
        assert row.source.startswith("arXiv:")
        assert "Returns:" in cast(str, row.function.__doc__)


@pytest.mark.parametrize("method", [name for name, row in METHODS.items() if row.scope != "model"])
def test_g6_only_a_method_of_model_scope_looks_beyond_one_tensor(method: str) -> None:
    alone = merged(method, vectors(only={"weight"}))
    assert torch.equal(alone["weight"], merged(method, vectors())["weight"])


@pytest.mark.parametrize("method", [name for name, row in METHODS.items() if row.scope == "entry"])
def test_a_method_of_entry_scope_treats_each_entry_alone(method: str) -> None:
    stack = vectors().blocks["weight"].dense()
    halves = [METHODS[method].function(half) for half in stack.chunk(2, dim=1)]
    assert torch.equal(torch.cat(halves), METHODS[method].function(stack))


@pytest.mark.parametrize("method", EDITS)
class TestEdits:
    def stacks(self, vectors: TaskVectors, method: str) -> dict[str, Tensor]:
        return dict(edit(vectors, method).stacks())

    def test_the_order_of_experts_is_kept(self, method: str) -> None:
        if EDITS[method].ordered:
            pytest.skip("the edit treats experts by their position")
        found = self.stacks(vectors(EXPERTS[::-1]), method)
        expected = self.stacks(vectors(), method)
        assert_same(found, {n: s.flip(0) for n, s in expected.items()}, rtol=1e-5, atol=1e-6)

    def test_names_shapes_and_the_base_stay(self, method: str) -> None:
        edited = edit(vectors(), method)
        assert {n: s.shape for n, s in edited.stacks()} == {n: s.shape for n, s in vectors().stacks()}
        assert_same(edited.base_state(), base_state(), rtol=0, atol=0)
