"""Accuracy with the task known and unknown, and routing, on numbers that can be counted by hand."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from adamerge.data.datasets import Images
from adamerge.data.module import MultiTaskData
from adamerge.data.tasks import TaskSpec
from adamerge.evaluation import Evaluation, evaluate
from adamerge.models import Head

# Each image is one pixel: the index of a row of features, which heads read as they are.
HEADS = {
    "pets": Head(torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]), normalize=False),
    "cars": Head(torch.tensor([[0.0, 0.0, 1.0], [0.0, 1.0, 1.0], [1.0, 1.0, 1.0]]), normalize=False),
}
CLASSES = {"pets": ["cat", "dog"], "cars": ["bus", "van", "cab"]}
FEATURES = {  # what the heads make of them: pet 0, pet 1 | car 0, car 1, car 2
    "pets": torch.tensor(
        [
            [2.0, 1.0, 0.0],  # 2 1 | 0 1 3
            [0.0, 3.0, -1.0],  # 0 3 | -1 2 2
            [1.0, 0.0, 5.0],  # 1 0 | 5 5 6
        ]
    ),
    "cars": torch.tensor(
        [
            [0.0, -1.0, 4.0],  # 0 -1 | 4 3 3
            [9.0, 1.0, -8.0],  # 9 1 | -8 -7 2
            [-1.0, 2.0, 2.0],  # -1 2 | 2 4 3
            [-3.0, -2.0, -1.0],  # -3 -2 | -1 -3 -6
        ]
    ),
}
LABELS = {"pets": [0, 1, 1], "cars": [0, 2, 1, 1]}
WEIGHTS = {
    "pets": [[1.0, 0.0], [0.5, 0.5], [0.9, 0.1]],
    "cars": [[0.2, 0.8], [0.0, 1.0], [0.4, 0.6], [0.2, 0.8]],
}


@pytest.fixture
def data() -> MultiTaskData:
    specs = {task: TaskSpec("memory", "memory", CLASSES[task]) for task in HEADS}
    found = MultiTaskData(specs, eval_batch_size=2)
    for task, labels in LABELS.items():
        images = torch.arange(len(labels), dtype=torch.uint8).reshape(-1, 1, 1, 1).expand(-1, 3, 1, 1)
        found._loaded[task, "test"] = Images(images, torch.tensor(labels))
    return found


def run(data: MultiTaskData, *, routed: bool = True, **options: bool) -> Evaluation:
    def features(batch: Tensor, task: str) -> tuple[Tensor, Tensor | None]:
        rows = batch[:, 0, 0, 0].long()
        return FEATURES[task][rows], torch.tensor(WEIGHTS[task])[rows] if routed else None

    def walk(function: Callable[[Tensor], Tensor], task: str) -> Tensor:
        return torch.cat([function(batch["images"]) for batch in data.loader(data.test(task))])

    return evaluate(features, HEADS, data, walk, **options)


def test_a_known_task_is_judged_by_its_own_head(data: MultiTaskData) -> None:
    assert run(data).known == pytest.approx({"pets": 200 / 3, "cars": 75})


def test_an_unknown_task_must_be_found_too(data: MultiTaskData) -> None:
    assert run(data).unknown == pytest.approx({"pets": 100 / 3, "cars": 50})


def test_a_model_that_is_told_the_task_has_no_accuracy_without(data: MultiTaskData) -> None:
    found = run(data, told=True)
    assert found.unknown == {}
    assert found.known == pytest.approx({"pets": 200 / 3, "cars": 75})


def test_routing_is_the_mean_over_all_images_of_a_task(data: MultiTaskData) -> None:
    assert run(data).routing == {"pets": pytest.approx([0.8, 0.2]), "cars": pytest.approx([0.2, 0.8])}
    assert run(data, routed=False).routing == {}


def test_the_entropy_of_routing_is_that_of_an_image(data: MultiTaskData) -> None:
    mean = torch.tensor([0.0, 1.0, 0.469]).mean().item()  # of weights 1, 1/2 and 0.9, in bits
    assert run(data).entropy["pets"] == pytest.approx(mean, abs=1e-3)
    assert run(data, routed=False).entropy == {}


def test_tasks_without_test_images_are_passed_over(data: MultiTaskData) -> None:
    data.tasks["pets"] = TaskSpec("memory", None, CLASSES["pets"])
    found = run(data)
    assert set(found.known) == set(found.unknown) == {"cars"}
    assert found.unknown["cars"] == pytest.approx(50)  # pets' classes are still to be told from
