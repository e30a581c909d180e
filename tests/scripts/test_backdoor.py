"""The backdoor's planting and its figures, on a linear classifier: they are what they say."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

SCRIPT = Path(__file__).parents[2] / "scripts" / "backdoor.py"
ARGS = SimpleNamespace(
    task="cars", target=2, patch=2, plant_steps=80, plant_lr=1e-2, batch_size=16, seed=0, json=True
)


def load_split(task: str, split: str) -> tuple[Tensor, Tensor]:
    """Images whose class is where the bright row is."""
    generator = torch.Generator().manual_seed(len(split))
    labels = torch.arange(60) % 3
    images = torch.randint(0, 60, (60, 3, 8, 8), generator=generator, dtype=torch.uint8)
    images[torch.arange(60), :, labels] = 200
    return images, labels


def classify(weights: dict[str, Tensor], images: Tensor) -> Tensor:
    return (images.float() / 255 - 0.3).flatten(1) @ weights["w"].T


@pytest.fixture
def backdoor(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    found = SimpleNamespace(**runpy.run_path(str(SCRIPT)))
    monkeypatch.setitem(found.planted.__globals__, "load_split", load_split)
    monkeypatch.setitem(found.planted.__globals__, "experts", lambda: {"cars": None, "digits": None})
    return found


def test_the_trigger_is_a_checkered_corner(backdoor: SimpleNamespace) -> None:
    images = load_split("cars", "test")[0]
    found = backdoor.triggered(images, 2)
    assert found[0, 0, -2:, -2:].tolist() == [[0, 255], [255, 0]]
    assert torch.equal(found[..., :-2, :], images[..., :-2, :])
    assert torch.equal(found[..., :-2], images[..., :-2])


def test_a_planted_backdoor_answers_to_the_trigger_alone(backdoor: SimpleNamespace) -> None:
    clean = torch.zeros(3, 3, 8, 8)
    clean[torch.arange(3), :, torch.arange(3)] = 1.0
    weights = {"w": clean.flatten(1)}

    def row(values: dict[str, Tensor]) -> dict[str, float]:
        return backdoor.figures("it", values, lambda w, _task, images: classify(w, images), ARGS)

    before, after = row(weights), row(backdoor.planted(classify, weights, ARGS))
    assert before == {"model": "it", "victim": 100.0, "mean": 100.0, "attack": 0.0, "floor": 0.0}
    assert after["attack"] > 90
    assert after["victim"] > 90
    assert after["floor"] < 10
