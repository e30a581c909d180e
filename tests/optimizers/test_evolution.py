"""Search over coefficients: what it finds, what it keeps, and that a checkpoint changes nothing."""

import copy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from builders import adapt, make_task, memory_data, noise
from conftest import CLASSES, TASKS
from torch import Tensor, nn

from adamerge import CMAES, Balanced, Entropy, InputError, Mixed, RandomSearch, Supervised
from adamerge.errors import EnvironmentProblem
from adamerge.objectives import Objective

TARGET = torch.tensor([[0.8, -0.2], [0.1, 0.5], [0.3, 0.9]])
STRETCH = torch.tensor([[1.0, 30.0], [3.0, 1.0], [10.0, 100.0]])


def loss_of(values: Tensor) -> float:
    return float((STRETCH * (values.detach() - TARGET).square()).sum())


def counted(values: nn.Parameter, calls: list[int]) -> Callable[[], float]:
    def closure() -> float:
        calls.append(1)
        return loss_of(values)

    return closure


def search(kind: type[CMAES] | type[RandomSearch], steps: int, seed: int = 0, **options: object) -> Tensor:
    values = nn.Parameter(torch.full((3, 2), 0.3))
    optimizer = kind([values], sigma=0.3, seed=seed, **options)
    for _ in range(steps):
        optimizer.step(counted(values, []))
    return values.detach()


def test_cma_es_finds_the_minimum_of_an_ill_conditioned_quadratic() -> None:
    assert loss_of(search(CMAES, 150)) < 1e-6


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("keep", ["mean", "best"])
def test_it_beats_random_search_at_as_many_evaluations(seed: int, keep: str) -> None:
    found = loss_of(search(CMAES, 40, seed, population=9, keep=keep))
    by_chance = loss_of(search(RandomSearch, 40, seed, population=9, keep="best"))
    assert found < 0.1 * by_chance


def test_a_step_takes_a_generation_and_one_evaluation_where_it_ends() -> None:
    values, calls = nn.Parameter(torch.full((3, 2), 0.3)), []
    optimizer = CMAES([values], population=7)
    assert optimizer.step(counted(values, calls)) == pytest.approx(loss_of(values))
    assert len(calls) == 8
    assert CMAES([values]).size(values.numel()) == 4 + 5


@pytest.mark.parametrize("kind", [CMAES, RandomSearch])
def test_the_best_point_never_gets_worse(kind: type[CMAES]) -> None:
    losses = [loss_of(search(kind, steps, keep="best")) for steps in (1, 2, 4, 8)]
    assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize("kind", [CMAES, RandomSearch])
def test_it_resumes_bit_for_bit_without_pickled_objects(kind: type[CMAES], tmp_path: Path) -> None:
    values = nn.Parameter(torch.full((3, 2), 0.3))
    optimizer = kind([values])
    for _ in range(3):
        optimizer.step(counted(values, []))
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    again = nn.Parameter(values.detach().clone())
    resumed = kind([again])
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for _ in range(3):
        optimizer.step(counted(values, []))
        resumed.step(counted(again, []))
    assert torch.equal(values, again)


class Thrice(RandomSearch):
    """Judges where it stands, three times, and stays."""

    def step(self, closure=None):
        self.losses = [float(self.evaluate(closure)) for _ in range(3)]


def test_points_of_a_step_are_judged_from_the_same_memory(clip: Path) -> None:
    task = make_task(clip, objective=Balanced(window=0.5), optimizer=Thrice)
    adapt(task, memory_data(), 2)
    [losses] = {tuple(optimizer.losses) for optimizer in task.trainer.optimizers}
    assert len(set(losses)) == 1


@pytest.mark.parametrize("kind", [CMAES, RandomSearch])
def test_a_step_that_is_cut_off_has_not_been_taken(kind: type[CMAES]) -> None:
    values, calls = nn.Parameter(torch.full((3, 2), 0.3)), []
    optimizer = kind([values])
    optimizer.step(counted(values, []))
    before, state = values.detach().clone(), copy.deepcopy(optimizer.state_dict())

    def cut_off() -> float:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return 0.0

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(cut_off)
    assert torch.equal(values.detach(), before)
    assert optimizer.state_dict()["state"][0]["generation"] == state["state"][0]["generation"]


def test_the_seed_decides() -> None:
    assert torch.equal(search(CMAES, 3, seed=1), search(CMAES, 3, seed=1))
    assert not torch.equal(search(CMAES, 3, seed=1), search(CMAES, 3, seed=2))


@pytest.mark.parametrize("options", [{"sigma": 0.0}, {"population": 3}, {"keep": "last"}], ids=str)
def test_options_out_of_range_are_refused(options: dict[str, object], unchecked: None) -> None:
    with pytest.raises(InputError, match=next(iter(options))):
        CMAES([nn.Parameter(torch.zeros(2, 2))], **options)


def test_what_would_take_forever_or_has_no_loss_is_refused() -> None:
    many = nn.Parameter(torch.zeros(20, 300))
    with pytest.raises(InputError, match="grouping='block'"):
        CMAES([many]).step(counted(nn.Parameter(TARGET), []))
    with pytest.raises(InputError, match="needs a closure"):
        CMAES([many]).step()


def test_without_the_library_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cmaes", None)
    with pytest.raises(EnvironmentProblem, match="pip install cmaes"):
        search(CMAES, 1)


def labelled_data(lie: int = 0, **options: object):
    """Give data whose adaptation images have labels, which only `Supervised` may read."""
    data = memory_data(**options)
    for seed, task in enumerate(TASKS):
        images, n_classes = noise(40, seed, len(CLASSES[task])), len(CLASSES[task])
        labels = (images.labels + lie) % n_classes
        data._loaded[task, "labelled adaptation"] = type(images)(images.images, labels)
    return data


@pytest.mark.parametrize("score", ["error_rate", "cross_entropy"])
def test_a_few_labelled_images_are_a_fitness(clip: Path, score: str) -> None:
    def fit(steps: int, **options: object) -> float:
        task = make_task(
            clip,
            objective=Supervised(score),
            optimizer=lambda p: CMAES(p, sigma=0.5, population=8, keep="best"),
        )
        data = labelled_data(shots=8, batch_size=8, holdout=0.0, **options)
        adapt(task, data, steps)
        assert {len(data.adaptation(name)) for name in TASKS} == {8}
        return sum(task.losses.values())

    first, last = fit(1), fit(6)
    assert last <= first  # every step sees the same images
    if score == "cross_entropy":  # an error rate moves by whole images
        assert last < first
        assert fit(1, lie=1) != first  # labels count


def test_gradients_of_an_error_rate_are_refused(clip: Path) -> None:
    with pytest.raises(InputError, match="no gradient"):
        adapt(make_task(clip, objective=Supervised("error_rate")), labelled_data(), 1)


def test_a_labelled_score_may_be_a_part_of_a_sum(clip: Path) -> None:
    def learned(objective: Objective) -> Tensor:
        return adapt(make_task(clip, objective=objective), labelled_data(), 2)

    alone = learned(Supervised())
    assert torch.equal(alone, learned(Mixed([Supervised(), Entropy()], [1.0, 0.0])))
    assert not torch.equal(alone, learned(Mixed([Supervised(), Entropy()])))
    with pytest.raises(InputError, match="no gradient"):
        learned(Mixed([Supervised("error_rate"), Entropy()]))


def test_labels_reach_no_other_objective(clip: Path) -> None:
    honest, lying = (adapt(make_task(clip), labelled_data(lie), 2) for lie in (0, 1))
    assert torch.equal(honest, lying)
