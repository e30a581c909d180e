"""The search over paths: where it starts, what it keeps, and that an interruption changes nothing."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CLASSES
from torch import Tensor, nn

from adamerge import Balanced, Consistency, InputError, KLTeacher, Prior, ReliableEntropy, Supervised
from adamerge.dataflow import Fitness, Flow, Found, Genome, Step, flow_weights, search
from adamerge.models import Head, ModuleBackbone
from adamerge.objectives import Objective

GENOME = Genome(models=2, blocks=3)
A = tuple(Step(0, block) for block in range(3))
GOAL = {(0, 0), (1, 1), (0, 2), (1, 0)}


def loss_of(flow: Flow) -> float:
    """Wants a set of blocks, once each, and scales of 1.2."""
    chosen = [(step.model, step.block) for step in flow.steps]
    scales = sum((step.scale - 1.2) ** 2 for step in flow.steps[1:])
    return len(GOAL ^ set(chosen)) + 0.3 * (len(chosen) - len(set(chosen))) + scales


def run(generations: int = 6, **options: Any) -> Found:
    return search(loss_of, "blocks", GENOME, generations, **{"sigma": 0.2, "population": 10, **options})


def test_the_genes_of_the_start_are_model_a() -> None:
    genes = GENOME.start(0.1)
    assert genes.shape == (1, 2 * 6 + 36)
    assert GENOME.flow("blocks", genes[0].numpy()) == Flow("blocks", A)
    assert (genes[0, :3] == 0.2).all()


def test_a_scale_is_that_of_the_pair_of_blocks_that_follow_each_other() -> None:
    genes = np.concatenate([np.zeros(12), np.arange(36.0)])
    genes[[4, 6, 7]] = 1  # block 1 of model 1, then, in the second round, blocks 0 and 1 of model 0
    steps = GENOME.flow("blocks", genes).steps
    assert steps == (Step(1, 1), Step(0, 0, 4 * 6 + 0.0), Step(0, 1, 0 * 6 + 1.0))
    plain = Genome(2, 3, scales=False)
    assert [step.scale for step in plain.flow("blocks", genes[:12]).steps] == [1, 1, 1]


def test_too_many_genes_and_none_are_refused() -> None:
    with pytest.raises(InputError, match="9 models of 12 blocks have 11880 genes"):
        Genome(9, 12)
    assert Genome(9, 12, scales=False).size == 216
    with pytest.raises(InputError, match="nothing to search"):
        Genome(2, 3, repeats=0)


def test_the_winner_is_a_function_of_the_seed_and_never_worse_than_model_a() -> None:
    first, again, other = run(), run(), run(seed=1)
    assert first == again
    assert first != other
    assert first.history[0] == loss_of(Flow("blocks", A))
    assert first.loss == first.history[-1] == min(first.history) < first.history[0]


@pytest.mark.parametrize("method", ["cmaes", "random"])
def test_a_resumed_search_is_the_uninterrupted_one(tmp_path: Path, method: Any) -> None:
    whole = run(6, method=method)
    run(2, method=method, state=tmp_path / "search.pt")
    assert run(6, method=method, state=tmp_path / "search.pt") == whole
    with pytest.raises(InputError, match="another search"):
        run(6, method=method, state=tmp_path / "search.pt", inputs="other images")
    settings = {"base": {"config.json": {"hidden_act": "gelu"}}}
    with pytest.raises(InputError, match="configurations of the models have changed"):
        run(6, method=method, state=tmp_path / "search.pt", settings=settings)
    saved = torch.load(tmp_path / "search.pt")
    del saved["settings"]  # as older versions wrote it
    torch.save(saved, tmp_path / "search.pt")
    assert run(6, method=method, state=tmp_path / "search.pt", settings=settings) == whole
    (tmp_path / "search.pt").write_bytes(b"nothing")
    with pytest.raises(InputError, match="damaged"):
        run(6, method=method, state=tmp_path / "search.pt")


def test_cma_es_finds_better_paths_than_as_many_random_ones() -> None:
    found = [np.mean([run(30, method=m, seed=seed).loss for seed in range(3)]) for m in ("cmaes", "random")]
    assert found[0] < 0.7 * found[1]


def test_equal_paths_are_judged_once() -> None:
    seen: list[Flow] = []

    def fitness(flow: Flow) -> float:
        seen.append(flow)
        return loss_of(flow)

    found = search(fitness, "blocks", Genome(1, 2, 1, scales=False), 5, population=10)
    assert found.judged == len(seen) == len(set(seen)) <= 4


@pytest.mark.usefixtures("unchecked")
def test_wrong_options_are_refused() -> None:
    for wrong in ({"method": "annealing"}, {"sigma": 0.0}, {"population": 1}):
        with pytest.raises(InputError):
            run(**wrong)


def judge(objective: Objective, **known: Any) -> Fitness:
    torch.manual_seed(0)
    blocks = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5))
    backbone = ModuleBackbone(nn.Sequential(nn.Linear(4, 5), blocks))
    weights = flow_weights(backbone, "1", [dict(backbone.module.state_dict())])
    heads = {task: Head(torch.randn(len(names), 5)) for task, names in CLASSES.items()}
    inputs = {task: torch.randn(6, 4) for task in CLASSES}
    return Fitness(backbone, weights, heads, objective, inputs, **known)


BOTH = Flow("1", (Step(0, 0), Step(0, 1)))


def literal(fitness: Fitness, task: str) -> Tensor:
    with torch.no_grad():
        return fitness.heads[task].logits(fitness.backbone.module(fitness.images[task]))


def test_the_fitness_is_the_mean_error_over_tasks() -> None:
    labels = {task: torch.tensor([0, 1, 1, 0, 1, 0]) for task in CLASSES}
    fitness = judge(Supervised("error_rate"), labels=labels)
    errors = [(literal(fitness, task).argmax(-1) != labels[task]).double().mean() for task in CLASSES]
    assert fitness(BOTH) == pytest.approx(float(sum(errors) / len(errors)))


def test_a_model_is_its_own_perfect_teacher() -> None:
    fitness = judge(KLTeacher())
    with pytest.raises(InputError, match="needs the expert's logits"):
        fitness(BOTH)
    taught = judge(KLTeacher(), expert=lambda _: dict(fitness.backbone.module.state_dict()))
    assert taught(BOTH) == pytest.approx(0, abs=1e-6)
    assert taught(Flow("1", (Step(0, 1),))) > 1e-3


def test_an_objective_remembers_no_path() -> None:
    fitness = judge(Balanced())
    first = fitness(BOTH)
    assert fitness(Flow("1", (Step(0, 1),))) != first
    assert fitness(BOTH) == first


def test_nothing_included_and_values_that_are_not_finite_cost_infinitely() -> None:
    fitness = judge(KLTeacher())
    assert fitness(Flow("1", ())) == float("inf")
    assert fitness(Flow("1", (Step(0, 0), Step(0, 1, 1e39)))) == float("inf")


def test_objectives_that_judge_no_path_are_refused() -> None:
    for objective in (Prior(), Consistency()):
        with pytest.raises(InputError, match="judges no path"):
            judge(objective)
    with pytest.raises(InputError, match="gave no loss for a task"):
        judge(ReliableEntropy(threshold=1e-6))(BOTH)
