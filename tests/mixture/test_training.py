"""The staged step of a router has the gradient of the plain formula."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from conftest import TASKS
from tiny_mixtures import make_mixture, uint8_images
from torch import Tensor
from torch.testing import assert_close

from adamerge.coefficients import Router, Uniform
from adamerge.errors import InputError
from adamerge.mixture import Gates, Mixture, RouterStep
from adamerge.models import Head
from adamerge.objectives import (
    Balanced,
    Consistency,
    Entropy,
    FeatureMatching,
    KLTeacher,
    Mixed,
    Objective,
    ReliableEntropy,
    RoutingEntropy,
    TaskIdentity,
)

Batch = dict[str, dict[str, Tensor]]
N_IMAGES = 6
ROUTERS: dict[str, Callable[[], Router]] = {
    "linear": Router,
    "twin": lambda: Router("paper"),
    "top p": lambda: Router("linear", select="top_p", p=0.9, renormalize=True),
    "hard": lambda: Router("linear", select="top_1"),
    "wemoe": lambda: Router("mlp", "block", select="none", initial=0.3, groups=r"\.mlp\."),
    "shared gate": lambda: Router("mlp", "block", groups=r"\.mlp\.", shared=True),
}
PREDICTIONS: dict[str, Callable[[], Objective]] = {
    "entropy": Entropy,
    "teacher": KLTeacher,
    "features": FeatureMatching,
    "balanced": Balanced,
    "reliable": lambda: ReliableEntropy(threshold=0.8),
    "mixed": lambda: Mixed(
        [Entropy("log_c"), KLTeacher(), TaskIdentity(), RoutingEntropy()], [1.0, 0.5, 2.0, -0.1]
    ),
}
PASSES = {"a task a pass": [[task] for task in TASKS], "all in one": [list(TASKS)]}


def images_of(task: str) -> Tensor:
    return uint8_images(N_IMAGES, seed=10 + TASKS.index(task))


def make_batch() -> Batch:
    """Batches of other sizes, whose images do not come in order."""
    rows = {task: torch.tensor(index) for task, index in zip(TASKS, ([5, 0, 3], [1, 2], [4, 0]), strict=True)}
    return {task: {"images": images_of(task)[index], "index": index} for task, index in rows.items()}


def teachers(mixture: Mixture) -> dict[str, Tensor]:
    """Features of experts."""
    generator = torch.Generator().manual_seed(3)
    dims = {task: head.weight.shape[1] for task, head in mixture.heads.items()}
    return {task: torch.randn(N_IMAGES, n, generator=generator) for task, n in dims.items()}


def make_step(clip: Path, router: Router, objective: Objective) -> RouterStep:
    objective.build(TASKS)
    step = RouterStep(make_mixture(clip, router, "magnitude").train(), objective)
    for task in TASKS:
        step.prepare(task, [{"images": part} for part in images_of(task).split(4)])
    objective.begin_step()
    return step


def gradients(router: Router, loss: Tensor) -> list[Tensor]:
    found = torch.autograd.grad(loss, list(router.parameters()), allow_unused=True)
    return [torch.zeros(p.shape) if g is None else g for p, g in zip(router.parameters(), found, strict=True)]


def plain(mixture: Mixture, objective: Objective, batch: Batch) -> tuple[dict[str, float], Tensor]:
    """Run all images in one graph, and sum the tasks' objectives."""

    def views(head: Head, features: Tensor) -> dict[str, Tensor]:
        return {"prediction": head.logits(features), "features": features}

    images = torch.cat([part["images"] for part in batch.values()])
    reads_input = mixture.routing.reads == "input"
    gates = Gates(mixture.routing, len(images), mixture.router_features(images) if reads_input else None)
    features, start, losses = mixture.features(images, gates), 0, {}
    for task, part in batch.items():
        rows = slice(start, start := start + len(part["index"]))
        head, expert = mixture.heads[task], teachers(mixture)[task][part["index"]]
        seen = views(head, features[rows]) | {"routing": gates.mean_logits()[rows]}
        losses[task] = objective.loss(seen, task, views(head, expert))
    found = {task: loss for task, loss in losses.items() if loss is not None}
    return {task: float(loss.detach()) for task, loss in found.items()}, torch.stack([*found.values()]).sum()


def assert_step_equals_plain(
    step: RouterStep, passes: list[list[str]], scale: float = 1.0
) -> dict[str, float]:
    router, state, batch = step.routing, deepcopy(step.routing.state_dict()), make_batch()
    memory = step.objective.per_task_state()
    taught = teachers(step.mixture)
    told = {task: part | {"teacher": taught[task][part["index"]]} for task, part in batch.items()}
    result = step(told, passes, scale)
    assert float(result.surrogate.detach()) == 0
    found = gradients(router, result.surrogate)
    after = deepcopy(router.state_dict())
    router.load_state_dict(state)  # statistics and dropout as they were
    step.objective.load_per_task_state(memory)
    step.objective.begin_step()
    losses, total = plain(step.mixture, step.objective, batch)
    assert {task: float(loss) for task, loss in result.losses.items()} == pytest.approx(losses, abs=1e-5)
    expected = gradients(router, total)
    assert max(float(g.abs().max()) for g in expected) > 1e-4
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b, rtol=1e-4, atol=1e-6)
    for name, value in router.state_dict().items():
        assert_close(after[name], value)
    return losses


@pytest.mark.parametrize("passes", PASSES)
@pytest.mark.parametrize("objective", PREDICTIONS)
@pytest.mark.parametrize("router", ROUTERS)
def test_its_gradient_is_that_of_the_plain_formula(
    clip: Path, router: str, objective: str, passes: str
) -> None:
    step = make_step(clip, ROUTERS[router](), PREDICTIONS[objective]())
    assert_step_equals_plain(step, PASSES[passes])


@pytest.mark.parametrize("router", ["linear", "twin", "top p", "hard"])
@pytest.mark.parametrize(
    "objective", [TaskIdentity, lambda: Mixed([TaskIdentity(), RoutingEntropy()], [1.0, 0.2])]
)
def test_the_model_need_not_run_to_tell_tasks_apart(
    clip: Path, router: str, objective: Callable[[], Objective], monkeypatch: pytest.MonkeyPatch
) -> None:
    step = make_step(clip, ROUTERS[router](), objective())
    assert_step_equals_plain(step, PASSES["a task a pass"])
    monkeypatch.setattr(step.mixture, "features", lambda *_: pytest.fail("the model ran"))
    assert set(step(make_batch(), PASSES["all in one"]).losses) == set(TASKS)


def test_a_task_that_is_not_worth_a_step_adds_nothing(clip: Path) -> None:
    step = make_step(clip, Router(), ReliableEntropy(threshold=0.5))
    losses = assert_step_equals_plain(step, PASSES["all in one"])
    assert 0 < len(losses) < len(TASKS)
    nothing = make_step(clip, Router(), ReliableEntropy(threshold=1e-9))
    result = nothing(make_batch(), PASSES["all in one"])
    assert result.losses == {}
    assert all((g == 0).all() for g in gradients(nothing.routing, result.surrogate))


@pytest.mark.parametrize("router", ["twin", "wemoe"])
def test_a_scaled_loss_has_the_same_gradient(clip: Path, router: str) -> None:
    assert_step_equals_plain(
        make_step(clip, ROUTERS[router](), Entropy()), PASSES["all in one"], scale=1024.0
    )


def test_router_logits_of_gates_inside_the_model_cannot_be_the_whole_objective(clip: Path) -> None:
    with pytest.raises(InputError, match="TaskIdentity reads router logits; this router reads blocks"):
        make_step(clip, ROUTERS["wemoe"](), TaskIdentity())


def test_a_second_view_of_images_needs_static_coefficients(clip: Path) -> None:
    with pytest.raises(InputError, match="Mixed with a second view of images needs static coefficients"):
        make_step(clip, Router(), Mixed([Entropy(), Consistency()]))


def test_batch_normalisation_inside_the_model_would_depend_on_the_passes(clip: Path) -> None:
    router = Router("paper", "block", groups=r"\.mlp\.")
    with pytest.raises(InputError, match="normalises over the images of a pass alone.\nUse network='mlp'"):
        make_step(clip, router, Entropy())


def test_routing_without_parameters_can_be_evaluated(clip: Path) -> None:
    mixture = make_mixture(clip, Uniform())
    assert RouterStep(mixture, Entropy()).mixture is mixture
