"""What the README shows, run as it stands there."""

import re
import shutil
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import open_clip
import pytest
import torch
from builders import REPOSITORY
from conftest import draw
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from adamerge.cli import main
from adamerge.static import METHODS

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")


def block(language: str) -> str:
    """Give the README's first block of a language."""
    found = re.search(rf"```{language}\n(.*?)```", README, re.S)
    assert found
    return found[1]


@pytest.fixture
def home(tmp_path: Path, clip: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the models and images that the README speaks of."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(clip / "base", "models/base")
    for task, expert in (("cars", "circles"), ("pets", "bars")):
        shutil.copytree(clip / "base", f"models/{task}")
        tower = load_file(clip / "experts" / f"{expert}.safetensors")
        complete = load_file(clip / "base" / "open_clip_model.safetensors") | tower
        save_file(complete, f"models/{task}/open_clip_model.safetensors")
        for i in range(20):
            for folder in (f"images/{task}", f"labelled/{task}/{i % 2}"):
                Path(folder).mkdir(parents=True, exist_ok=True)
                draw(i + 50 * ("labelled" in folder), i % 2).save(f"{folder}/{i}.png")
    return tmp_path


def test_the_ten_lines_of_python(home: Path) -> None:
    program = block("python").replace(
        "max_steps=400", "max_steps=2, logger=False, enable_checkpointing=False"
    )
    exec(program, {})
    assert open_clip.create_model("local-dir:merged").visual.proj.shape == (16, 12)


def test_the_one_yaml_is_the_shipped_example() -> None:  # which tests/benchmarks/test_own_models.py runs
    assert block("yaml") == (REPOSITORY / "configs/benchmarks/mine.yaml").read_text()


@pytest.fixture
def median(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Register the README's own method, and take it back."""
    found = re.search(r"```python\n([^`]*@static_method.*?)```", README, re.S)
    assert found
    assert len([line for line in found[1].splitlines() if line.strip()]) <= 15
    (tmp_path / "median_of_experts.py").write_text(found[1])
    monkeypatch.syspath_prepend(tmp_path)
    import_module("median_of_experts")
    yield
    del METHODS["median"]


@pytest.mark.usefixtures("median")
def test_the_method_of_fifteen_lines_is_a_command_and_can_be_corrected(home: Path) -> None:
    given = ["--base", "models/base", "--experts", "cars=models/cars", "pets=models/pets", "--scale", "0.5"]
    assert main(["merge", "median", *given, "--out", "merged"]) == 0
    base, cars, pets = (
        load_file(f"models/{m}/open_clip_model.safetensors") for m in ("base", "cars", "pets")
    )
    lower = torch.minimum(cars["visual.proj"], pets["visual.proj"])  # of two, torch's median is the lower
    expected = base["visual.proj"] + 0.5 * (lower - base["visual.proj"])
    assert_close(load_file("merged/open_clip_model.safetensors")["visual.proj"], expected)
    assert main(["merge", "lines", *given[:-2], "--of", "median", "--out", "corrected"]) == 0


def test_every_file_that_it_names_exists() -> None:
    for path in re.findall(r"\b((?:configs|scripts|docs|tests|adamerge)/[\w/]+(?:\.\w+)?)", README):
        if "/X" not in path and "/Y" not in path:
            assert (REPOSITORY / path).exists(), path
