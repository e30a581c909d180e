"""What the README shows, run as it stands there."""

import re
import shutil
from pathlib import Path

import open_clip
import pytest
from builders import REPOSITORY
from conftest import draw
from safetensors.torch import load_file, save_file

from adamerge.cli import main

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
        "max_steps=100", "max_steps=2, logger=False, enable_checkpointing=False"
    )
    exec(program, {})
    assert open_clip.create_model("local-dir:merged").visual.proj.shape == (16, 12)


def test_the_one_yaml(home: Path) -> None:
    Path("mine.yaml").write_text(block("yaml"))
    assert len(block("yaml").splitlines()) <= 25
    assert main(["fit", "--config", "mine.yaml", "--trainer.max_steps", "2"]) == 0
    assert main(["verify", "runs/mine"]) == 0
    assert (home / "runs/mine/merged/open_clip_model.safetensors").exists()


def test_every_file_that_it_names_exists() -> None:
    for path in re.findall(r"\b((?:configs|scripts|docs|tests|adamerge)/[\w/]+(?:\.\w+)?)", README):
        if "/X" not in path and "/Y" not in path:
            assert (REPOSITORY / path).exists(), path
