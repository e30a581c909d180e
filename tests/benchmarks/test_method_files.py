"""Every shipped method file runs: one step where there is something to learn."""

import json
from pathlib import Path

import pytest
import yaml
from builders import REPOSITORY, fit, write_benchmark
from conftest import TASKS

FILES = sorted((REPOSITORY / "configs" / "methods").glob("*.yaml"))
_BARE = ("--evaluate_experts", "false", "--evaluate_baselines", "false", "--data.batch_size", "4")


@pytest.mark.filterwarnings("ignore:the numbers have their turn after")  # one step is too few for two stages
@pytest.mark.filterwarnings("ignore:ReliableEntropy found no image")
@pytest.mark.no_cover
@pytest.mark.parametrize("file", FILES, ids=lambda path: path.stem)
def test_a_method_file_runs_and_is_named_after_its_method(
    file: Path, tmp_path: Path, clip: Path, rows: dict
) -> None:
    document = yaml.safe_load(file.read_text())
    assert document["method"] == file.stem
    steps = ("--trainer.max_steps", str(min(1, document["trainer"]["max_steps"])))
    assert fit(write_benchmark(tmp_path, clip, rows), tmp_path / "run", *steps, *_BARE, name=file.stem) == 0
    row = json.loads((tmp_path / "run" / "result.json").read_text())
    assert row["method"] == file.stem
    assert set(row["accuracy"]) == set(TASKS)
