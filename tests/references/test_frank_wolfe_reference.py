"""FW-Merging again, literal (methods B11): on whole models instead of coefficients."""

import math
from pathlib import Path

import pytest
import torch
from builders import adapt, make_task, memory_data
from conftest import TASKS
from torch import Tensor
from torch.testing import assert_close

from adamerge import FrankWolfe, MergeTask

Model = dict[str, Tensor]


def task_losses(task: MergeTask, model: Model, batches: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    found = {}
    for name, batch in batches.items():
        p = task.heads[name].logits(task.backbone.features(model, batch["images"])).softmax(-1)
        found[name] = -(p * p.log()).sum(-1).mean()
    return found


def alignment(gradient: Model, candidate: Model, names: list[str]) -> float:
    """Sum of the tensors' inner products of gradient and candidate weights."""
    return sum(float((gradient[n].double() * candidate[n].double()).sum()) for n in names)


def choice(gradient: Model, candidates: list[Model], *, layer_wise: bool) -> Model:
    if not layer_wise:
        return min(candidates, key=lambda candidate: alignment(gradient, candidate, list(gradient)))
    return {n: min(candidates, key=lambda c: alignment(gradient, c, [n]))[n] for n in gradient}


def literal_merge(task: MergeTask, steps: int, lr: float, *, soft: bool, layer_wise: bool) -> Model:
    n_tensors = len(task.vectors.names)
    start = task.vectors.merge(torch.full((len(TASKS), n_tensors), 0.3), task.read_names)
    experts = [task.vectors.merge(task.vectors.one_hot(name), task.read_names) for name in TASKS]
    candidates, model = [*experts, start], start
    data = memory_data()
    streams = {name: iter(data._stream(name)) for name in TASKS}
    for t in range(steps):
        model = {name: tensor.detach().requires_grad_() for name, tensor in model.items()}
        losses = list(task_losses(task, model, {n: next(s) for n, s in streams.items()}).values())
        sums = losses if soft else [torch.stack(losses).sum()]
        gradients = [
            dict(zip(model, torch.autograd.grad(s, list(model.values()), retain_graph=True), strict=True))
            for s in sums
        ]
        chosen = [choice(gradient, candidates, layer_wise=layer_wise) for gradient in gradients]
        share = lr * 2 / (t + 2)
        model = {n: (1 - share) * w.detach() + share * torch.stack([c[n] for c in chosen]).mean(0)
                 for n, w in model.items()}  # fmt: skip
    return model


@pytest.mark.parametrize("layer_wise", [False, True])
@pytest.mark.parametrize("soft", [False, True])
def test_coefficients_make_the_same_model_as_steps_in_weight_space(
    clip: Path, soft: bool, layer_wise: bool
) -> None:
    def optimizer(parameters: list[Tensor]) -> FrankWolfe:
        return FrankWolfe(parameters, lr=0.5, soft=soft, granularity="group" if layer_wise else "task")

    task = make_task(clip, optimizer=optimizer)
    learned = adapt(task, memory_data(), 3)
    expected = literal_merge(make_task(clip), 3, 0.5, soft=soft, layer_wise=layer_wise)
    found = task.weights(task.coefficients())
    for name, tensor in expected.items():
        assert_close(found[name].detach(), tensor.detach(), rtol=0, atol=1e-5)
    assert (learned - 0.3).abs().max() > 0.1


def cosine_choices(gradient: list[list[float]], start: list[list[float]]) -> tuple[list[int], int]:
    """Give the best candidate of each group, and of all groups together; the start is the last."""
    n_tasks, n_groups = len(gradient), len(gradient[0])
    candidates = [[[float(i == t)] * n_groups for i in range(n_tasks)] for t in range(n_tasks)] + [start]

    def cosine(c: list[list[float]], group: int) -> float:
        a, b = [row[group] for row in c], [row[group] for row in gradient]
        product = sum(x * y for x, y in zip(a, b, strict=True))
        return product / (math.hypot(*a) * math.hypot(*b))

    table = [[cosine(c, group) for group in range(n_groups)] for c in candidates]
    each = [min(range(len(table)), key=lambda c: table[c][group]) for group in range(n_groups)]
    return each, min(range(len(table)), key=lambda c: sum(table[c]))


@pytest.mark.parametrize("seed", range(5))
def test_cosines_weigh_every_group_equally(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    gradient = torch.randn(3, 4, generator=generator) * torch.tensor([100.0, 1.0, 1.0, 1.0])
    start = torch.rand(3, 4, generator=generator)
    each, common = cosine_choices(gradient.tolist(), start.tolist())
    candidates = torch.cat([torch.eye(3)[:, :, None].expand(-1, -1, 4), start[None]])
    expected = {
        "group": torch.stack([candidates[c, :, g] for g, c in enumerate(each)], dim=1),
        "task": candidates[common],
    }
    for granularity, target in expected.items():
        values = torch.nn.Parameter(start.clone())
        optimizer = FrankWolfe([values], granularity=granularity, direction="cosine")
        values.grad = gradient
        optimizer.step()  # the first step of lr 1 goes all the way
        assert_close(values.detach(), target)
