"""Objective x optimizer x coefficients: what goes together steps, the rest is refused with the reason."""

import math
from collections.abc import Callable
from functools import partial
from itertools import combinations, product
from pathlib import Path

import pytest
import torch
from builders import make_task, make_trainer, memory_data, noise
from conftest import CLASSES, TASKS

import adamerge
from adamerge import InputError, Learned, Mixed, MultiTaskData, SharpnessAware
from adamerge.coefficients import Coefficients, Routing
from adamerge.objectives import Objective
from adamerge.optimizers import CoefficientOptimizer
from adamerge.spaces import Space

COEFFICIENTS: dict[str, Callable[[], Coefficients]] = {
    "task": lambda: Learned("task"),
    "tensor": lambda: Learned("tensor", clamp="on"),
    "components": lambda: adamerge.Components(rank=0.5),
    "elements": adamerge.Elements,
    "rows": lambda: adamerge.Elements("row"),
    "concrete": adamerge.Concrete,
    "router": lambda: adamerge.Router("linear"),
}
OBJECTIVES: dict[str, Callable[[], Objective]] = {
    "entropy": adamerge.Entropy,
    "reliable": lambda: adamerge.ReliableEntropy(threshold=9.0),
    "balanced": adamerge.Balanced,
    "kl": adamerge.KLTeacher,
    "features": adamerge.FeatureMatching,
    "consistency": adamerge.Consistency,
    "supervised": adamerge.Supervised,
    "error_rate": lambda: adamerge.Supervised("error_rate"),
    "kl_prior": lambda: Mixed([adamerge.KLTeacher(), adamerge.Prior()], [1.0, 0.1]),
    "perturbed": adamerge.Perturbed,
    "prior": adamerge.Prior,
    "task_identity": adamerge.TaskIdentity,
    "routing_entropy": adamerge.RoutingEntropy,
}
OPTIMIZERS: dict[str, Callable] = {
    "adam": torch.optim.Adam,
    "sgd": partial(torch.optim.SGD, lr=0.1, momentum=0.9),
    "sam": SharpnessAware,
    "bilevel": adamerge.BiLevel,
    "fw": adamerge.FrankWolfe,
    "fw_soft": partial(adamerge.FrankWolfe, soft=True),
    "natural": adamerge.NaturalGradient,
    "cmaes": partial(adamerge.CMAES, population=4),
    "random": partial(adamerge.RandomSearch, population=4),
}
SEARCHES = ("cmaes", "random")


def reason_against(objective: str, optimizer: str, coefficients: str) -> str | None:
    """The rules of what goes together, as a user would read them; in the order in which they are told."""
    routed, fine = coefficients == "router", coefficients in ("components", "elements", "rows", "concrete")
    of_a_matrix = optimizer in ("fw", "fw_soft", "natural", *SEARCHES)
    rules = (
        (objective == "prior", "alone moves nothing"),
        (not routed and objective in ("task_identity", "routing_entropy"), "needs a router"),
        (routed and objective in ("consistency", "perturbed"), "needs static coefficients"),
        (not routed and not fine and optimizer == "bilevel", "no masks"),
        (objective == "error_rate" and optimizer not in SEARCHES, "has no gradient"),
        (coefficients != "concrete" and optimizer == "bilevel", "BiLevel needs numbers and masks alone"),
        (routed and of_a_matrix, "a router has none"),
        (fine and of_a_matrix, "needs one matrix"),
        (objective == "perturbed" and optimizer in SEARCHES, "computes no gradient"),
        (objective == "reliable" and optimizer in SEARCHES, "leaves images out"),
        (objective == "balanced" and optimizer == "natural", "needs losses of 0 or more"),
        (objective == "kl_prior" and optimizer in ("fw_soft", "natural"), "Leave out Prior"),
    )
    return next((reason for broken, reason in rules if broken), None)


@pytest.fixture(scope="module")
def labelled() -> MultiTaskData:
    data = memory_data(n_adapt=12, batch_size=2, holdout=0.0)
    for seed, task in enumerate(TASKS):
        data._loaded[task, "labelled adaptation"] = noise(12, seed, len(CLASSES[task]))
    return data


@pytest.fixture(scope="module")
def opened(clip: Path) -> Callable[..., adamerge.MergeTask]:
    """Make a MergeTask of models that are opened once."""
    first = make_task(clip)
    return partial(adamerge.MergeTask, first.vectors, first.backbone, first.heads)


def step(
    opened: Callable[..., adamerge.MergeTask], data: MultiTaskData, names: tuple[str, str, str]
) -> float:
    """Take one step; return how far it went."""
    objective, optimizer, coefficients = names
    task = opened(COEFFICIENTS[coefficients](), OBJECTIVES[objective](), optimizer=OPTIMIZERS[optimizer])
    before = [value.detach().clone() for value in task.coefficients.parameters()]
    data.first_step = 0
    make_trainer(1).fit(task, datamodule=data)
    assert all(math.isfinite(loss) for loss in task.losses.values())
    after = task.coefficients.parameters()
    return sum(float((a.detach() - b).abs().sum()) for a, b in zip(after, before, strict=True))


ALL = tuple(product(OBJECTIVES, OPTIMIZERS, COEFFICIENTS))
REFUSED = tuple(names for names in ALL if reason_against(*names))
ALLOWED = tuple(names for names in ALL if not reason_against(*names))


def pairs_of(names: tuple[str, str, str]) -> set[tuple[tuple[int, str], ...]]:
    """Return the pairs of parts that a combination tries together."""
    return set(combinations(enumerate(names), 2))


def covering() -> list[tuple[str, str, str]]:
    """Choose allowed combinations that try every allowed pair of parts together at least once."""
    missing = set().union(*map(pairs_of, ALLOWED))
    chosen = []
    while missing:
        best = max(ALLOWED, key=lambda names: len(pairs_of(names) & missing))
        chosen.append(best)
        missing -= pairs_of(best)
    return chosen


@pytest.mark.parametrize("names", covering(), ids="-".join)
def test_every_pair_of_parts_that_goes_together_steps(
    opened: Callable, labelled: MultiTaskData, names: tuple[str, str, str]
) -> None:
    assert step(opened, labelled, names) > 0


@pytest.mark.sweep
@pytest.mark.parametrize("names", ALLOWED, ids="-".join)
def test_every_combination_steps(
    opened: Callable, labelled: MultiTaskData, names: tuple[str, str, str]
) -> None:
    assert step(opened, labelled, names) > 0


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_what_does_not_go_together_is_refused_with_the_reason(
    opened: Callable, labelled: MultiTaskData, objective: str
) -> None:
    for names in (names for names in REFUSED if names[0] == objective):
        with pytest.raises(InputError, match=reason_against(*names)):
            step(opened, labelled, names)


def test_the_walk_leaves_out_no_public_part() -> None:
    """A new objective, optimizer or space belongs into the tables above."""

    def kinds(base: type) -> set[str]:
        found = {name: getattr(adamerge, name) for name in adamerge.__all__}
        return {name for name, kind in found.items() if isinstance(kind, type) and issubclass(kind, base)}

    walked = {type(make()).__name__ for make in (*COEFFICIENTS.values(), *OBJECTIVES.values())}
    made = {getattr(make, "func", make).__name__ for make in OPTIMIZERS.values()}
    routings = kinds(Routing) - {"Router"}  # they have nothing to learn
    assert kinds(Objective) <= walked
    assert kinds(Coefficients) - routings <= walked
    assert kinds(CoefficientOptimizer) | {"SharpnessAware", "BiLevel"} <= made
    assert kinds(Space) <= walked
