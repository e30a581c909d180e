"""Three models and three folders of images with names of one's own: the shipped example, as it stands."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
import yaml
from builders import REPOSITORY, method
from hub_mirror import BASE, draw, logits_of, write_base, zero_shot_head
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPModel, CLIPVisionModel

from adamerge.cli import main

EXAMPLE = REPOSITORY / "configs" / "benchmarks" / "mine.yaml"
N_TEST = 12


def nudged(state: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """An image tower near the base's."""
    noise = torch.Generator().manual_seed(seed)
    own = {name: tensor for name, tensor in state.items() if name.startswith("vision_model.")}
    return {
        n: t + 0.05 * torch.randn(t.shape, generator=noise) * t.std().nan_to_num() for n, t in own.items()
    }


def write_labelled(folder: Path, base: CLIPModel, expert: Mapping[str, Tensor], classes: list[str]) -> None:
    """Sort images into one folder per class as the expert does, but for one image."""
    tower = CLIPVisionModel(base.config.vision_config).eval()
    tower.load_state_dict({name.removeprefix("vision_model."): t for name, t in expert.items()})
    head = zero_shot_head(Path(BASE), base, classes, ["a photo of a {}."])
    images = [draw(900 + i) for i in range(N_TEST)]
    labels = logits_of(images, Path(BASE), base, tower, head).argmax(-1).tolist()
    labels[0] = 1 - labels[0]
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        (folder / classes[label]).mkdir(parents=True, exist_ok=True)
        image.save(folder / classes[label] / f"{i}.png")


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict:
    """A folder with what the example names; the base's hub id is a local folder here."""
    monkeypatch.chdir(tmp_path)
    example = yaml.safe_load(EXAMPLE.read_text())
    base = write_base(Path(BASE))
    for seed, (task, model) in enumerate(example["model"]["experts"].items()):
        expert = nudged(base.state_dict(), seed)
        Path(model).mkdir(parents=True)
        save_file(expert, Path(model) / "model.safetensors")
        row = example["data"]["tasks"][task]
        Path(row["adapt"]).mkdir(parents=True)
        for i in range(20):
            draw(100 * seed + i).save(Path(row["adapt"]) / f"{i}.png")
        if "test" in row:
            write_labelled(Path(row["test"]), base, expert, row["classes"])
    shutil.copy(EXAMPLE, "mine.yaml")
    return example


def test_one_file_of_at_most_25_lines_is_all_that_is_needed(mine: dict) -> None:
    assert len(EXAMPLE.read_text().splitlines()) <= 25
    methods = "individual,average,adamerging_layer_wise"
    given = ["--methods", methods, "--out", "table", "--trainer.max_steps", "2"]
    assert main(["bench", "run", "mine.yaml", *given]) == 0
    rows = {row["method"]: row for row in json.loads(Path("table/results.json").read_text())["rows"]}
    assert rows["individual"]["accuracy"]["bikes"] == pytest.approx(100 * (N_TEST - 1) / N_TEST)
    assert set(rows["adamerging_layer_wise"]["accuracy"]) == {"bikes"}
    assert "bikes: expert 91.50 %, reached 91.67 %" in Path("table/report.md").read_text()


def test_the_same_file_adapts_and_writes_a_model(mine: dict) -> None:
    files = ["--config", "mine.yaml", "--config", str(method("adamerging_layer_wise"))]
    assert main(["fit", *files, "--trainer.max_steps", "2", "--run_dir", "run"]) == 0
    assert Path("run/merged/model.safetensors").exists()
    assert main(["verify", "run"]) == 0
