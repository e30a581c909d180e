"""The staged step against plain autograd, and the memory that it promises."""

import gc
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import CLASSES, SIZE, TASKS
from torch import Tensor

from adamerge.coefficients import GROUPINGS, Learned
from adamerge.models import Head, OpenClipBackbone
from adamerge.objectives import entropy_of
from adamerge.state import State
from adamerge.vectors import StepResult, TaskVectors, staged, staged_step

Pass = Callable[[State], Tensor]


@pytest.fixture(autouse=True, params=[2**17, 1], ids=["add up", "at once"])
def _projection(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients add up over the passes and are projected once, or are projected as they come."""
    monkeypatch.setattr(staged, "_LARGE", request.param)


@pytest.fixture(scope="module")
def vectors(clip: Path) -> TaskVectors:
    experts = {task: clip / "experts" / f"{task}.safetensors" for task in TASKS}
    return TaskVectors.open(clip / "base", experts, allow_missing=["*"])


@pytest.fixture(scope="module")
def backbone(clip: Path) -> OpenClipBackbone:
    return OpenClipBackbone(clip / "base")


@pytest.fixture(scope="module")
def passes(backbone: OpenClipBackbone) -> list[Pass]:
    """The entropies of two batches of every task."""
    generator = torch.Generator().manual_seed(0)
    heads = {t: Head(10 * torch.randn(len(CLASSES[t]), 12, generator=generator)) for t in TASKS}

    def one(task: str) -> Pass:
        shape = (4, 3, SIZE, SIZE)
        images = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        return lambda weights: entropy_of(heads[task].logits(backbone.features(weights, images))).mean()

    return [one(task) for task in TASKS for _ in range(2)]


def plain_merge(vectors: TaskVectors, matrix: Tensor) -> dict[str, Tensor]:
    """Give base + sum of coefficient x vector in ordinary torch operations."""
    stacks = dict(vectors.stacks())
    return {
        name: vectors.blocks[name].base_tensor() + torch.tensordot(matrix[:, i], stacks[name], 1)
        for i, name in enumerate(vectors.names)
    }


def assert_close_in_norm(found: Tensor, expected: Tensor, relative: float = 1e-5) -> None:
    assert expected.norm() > 0
    assert float((found - expected).norm() / expected.norm()) < relative


@pytest.mark.parametrize("clamp", ["off", "on", "projected"])
@pytest.mark.parametrize("grouping", GROUPINGS)
def test_its_gradient_equals_plain_autograd(
    vectors: TaskVectors, passes: list[Pass], grouping: str, clamp: str
) -> None:
    learned = Learned(grouping, [-0.1, 0.3, 0.6], clamp)
    learned.build(vectors.tasks, vectors.names)
    result = staged_step(vectors, learned(), passes)
    learned().backward(result.gradient)
    staged, learned.values.grad = learned.values.grad, None

    losses = [loss_of(plain_merge(vectors, learned())) for loss_of in passes]
    torch.stack(losses).sum().backward()
    assert_close_in_norm(staged, learned.values.grad)
    assert torch.stack(result.losses).tolist() == pytest.approx([loss.item() for loss in losses], rel=1e-4)
    if clamp == "on":  # below 0 the clamp has no gradient
        assert torch.equal(staged[0], torch.zeros_like(staged[0]))


def test_its_gradient_equals_a_finite_difference(vectors: TaskVectors, passes: list[Pass]) -> None:
    direction = staged_step(vectors, vectors.uniform(0.3), passes).gradient.sum()
    with torch.no_grad():
        high, low = (
            sum(float(loss_of(vectors.merge(vectors.uniform(x)))) for loss_of in passes) for x in (0.4, 0.2)
        )
    assert (high - low) / 0.2 == pytest.approx(float(direction), rel=2e-2)


def test_only_tensors_that_are_read_get_a_gradient(
    vectors: TaskVectors, backbone: OpenClipBackbone, passes: list[Pass]
) -> None:
    read = set(backbone.names) - {"visual.proj"}
    fixed = vectors.base_state()
    named = [lambda weights, f=loss_of: f({**fixed, **weights}) for loss_of in passes]
    gradient = staged_step(vectors, vectors.uniform(0.3), named, names=sorted(read)).gradient
    assert gradient.shape == (len(TASKS), len(vectors.names))
    for column, name in zip(gradient.unbind(1), vectors.names, strict=True):
        assert bool(column.abs().sum() > 0) == (name in read)


@pytest.mark.parametrize("passes_without_gradient", [[], [lambda weights: torch.tensor(2.0)]])
def test_losses_that_no_weight_influences_give_zeros(
    vectors: TaskVectors, passes_without_gradient: list[Pass]
) -> None:
    result = staged_step(vectors, vectors.uniform(0.3), passes_without_gradient)
    assert torch.equal(result.gradient, torch.zeros(len(TASKS), len(vectors.names)))
    assert result.losses == [torch.tensor(2.0)] * len(passes_without_gradient)


def test_a_loss_scale_is_taken_out_again(vectors: TaskVectors, passes: list[Pass]) -> None:
    plain = staged_step(vectors, vectors.uniform(0.3), passes).gradient
    scaled = staged_step(vectors, vectors.uniform(0.3), passes, scale=1024.0).gradient
    assert_close_in_norm(scaled, plain)


def test_merge_and_projection_stay_in_fp32_under_autocast(vectors: TaskVectors) -> None:
    def loss_of(weights: State) -> Tensor:
        return 1e6 * sum(w.square().sum() for w in weights.values())

    def step() -> StepResult:
        return staged_step(vectors, vectors.uniform(0.3), [loss_of])

    expected = step().gradient
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            found = step().gradient
        assert torch.equal(found, expected)


@pytest.mark.parametrize("codec", ["bf16", "fp16"])
def test_half_precision_vectors_give_nearly_the_same_gradient(
    clip: Path, vectors: TaskVectors, passes: list[Pass], codec: str
) -> None:
    experts = {task: clip / "experts" / f"{task}.safetensors" for task in TASKS}
    half = TaskVectors.open(clip / "base", experts, codec, allow_missing=["*"])
    assert half.n_bytes < vectors.n_bytes
    expected = staged_step(vectors, vectors.uniform(0.3), passes).gradient
    found = staged_step(half, half.uniform(0.3), passes).gradient
    assert_close_in_norm(found, expected, relative=1e-2)


def test_a_large_gradient_is_gone_when_its_backward_ends(
    monkeypatch: pytest.MonkeyPatch, vectors: TaskVectors, passes: list[Pass]
) -> None:
    """No copy of the model's gradients is ever whole in memory."""
    monkeypatch.setattr(staged, "_LARGE", 1)
    left = []

    def look(weights: State) -> Tensor:
        left.extend(name for name, weight in weights.items() if weight.grad is not None)
        return passes[0](weights)

    staged_step(vectors, vectors.uniform(0.3), [passes[0], look, look])
    assert left == []


class Saved:
    """A tensor that autograd keeps for a backward pass."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


@pytest.mark.parametrize("repetitions", [1, 4])
def test_each_graph_is_freed_before_the_next_begins(
    vectors: TaskVectors, passes: list[Pass], repetitions: int
) -> None:
    alive: weakref.WeakSet[Saved] = weakref.WeakSet()
    at_start, at_end = [], []

    def keep(tensor: Tensor) -> Saved:
        saved = Saved(tensor)
        alive.add(saved)
        return saved

    def watched(loss_of: Pass) -> Pass:
        def loss(weights: State) -> Tensor:
            at_start.append(len(alive))
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved.tensor):
                value = loss_of(weights)
            at_end.append(len(alive))
            return value

        return loss

    gc.collect()
    staged_step(vectors, vectors.uniform(0.3), [watched(loss_of) for loss_of in passes] * repetitions)
    assert set(at_start) == {0}
    assert len(set(at_end)) == 1
    assert at_end[0] > 0
