"""Every shipped method file runs as it is shipped; only many steps are cut to a few."""

import json
from pathlib import Path

import pytest
import yaml
from builders import REPOSITORY, write_benchmark
from conftest import CLASSES, TASKS, draw

from adamerge.cli import main

FILES = sorted((REPOSITORY / "configs" / "methods").glob("*.yaml"))
_FEW = 2  # steps; a file's own number where that is smaller, such as 0


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory: pytest.TempPathFactory, clip: Path) -> Path:
    """Two tasks with enough images for the selector to judge by."""
    root, rows = tmp_path_factory.mktemp("shipped"), {}
    for t, task in enumerate(TASKS[:2]):
        for part, count in (("adapt", 20), ("test", 6)):
            for i in range(count):
                label = i % len(CLASSES[task])
                file = root / task / part / CLASSES[task][label] / f"{i}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                draw(1000 * t + 100 * len(part) + i, label).save(file)
        classes = sorted(CLASSES[task])
        rows[task] = {
            "adapt": str(root / task / "adapt"),
            "test": str(root / task / "test"),
            "classes": classes,
        }
    return write_benchmark(root, clip, rows, tasks=TASKS[:2])


@pytest.mark.filterwarnings("ignore:the numbers have their turn after")  # few steps reach no second stage
@pytest.mark.filterwarnings("ignore:ReliableEntropy found no image")
@pytest.mark.filterwarnings("ignore:task .* adaptation images, fewer than a batch of")
@pytest.mark.no_cover
@pytest.mark.parametrize("file", FILES, ids=lambda path: path.stem)
def test_a_shipped_method_file_runs_as_it_is(file: Path, tmp_path: Path, benchmark: Path) -> None:
    document = yaml.safe_load(file.read_text())
    assert document["method"] == file.stem
    steps = document["trainer"]["max_steps"]
    cut = ["--trainer.max_steps", str(_FEW)] if steps > _FEW else []
    given = ["fit", "--config", str(benchmark), "--config", str(file), "--run_dir", str(tmp_path / "run")]
    assert main([*given, *cut]) == 0
    row = json.loads((tmp_path / "run" / "result.json").read_text())
    assert row["method"] == file.stem
    assert set(row["accuracy"]) == set(TASKS[:2])
