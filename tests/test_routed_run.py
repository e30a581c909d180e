"""What `adamerge fit` of a router leaves behind: who was routed where, honest baselines, a card, a model."""

import csv
import json
from pathlib import Path

import pytest
import yaml
from builders import fit, write_benchmark
from conftest import TASKS, rows_of
from pyarrow import parquet

from adamerge.cli import main
from adamerge.commands.runs import verify
from adamerge.results import ResultRow, read_row

_SIZES = ("--data.batch_size", "8", "--trainer.max_steps", "3")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, clip: Path, pictures: Path) -> Path:
    """A finished run of Twin-Merging, with W&B as its guest."""
    pytest.importorskip("wandb")
    folder = tmp_path_factory.mktemp("routed")
    run = folder / "run"
    logger = ("--trainer.logger", "adamerge.tracking.SafeWandbLogger", "--trainer.logger.save_dir", str(run))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        assert (
            fit(write_benchmark(folder, clip, rows_of(pictures)), run, *_SIZES, *logger, name="twin_merging")
            == 0
        )
    return run


@pytest.fixture(scope="module")
def row(run: Path) -> ResultRow:
    return read_row(run / "result.json")


def test_routing_is_written_and_belongs_to_the_verified_run(run: Path, row: ResultRow) -> None:
    with (run / "routing.csv").open(newline="") as stream:
        header, *lines = csv.reader(stream)
    assert header == ["task", *TASKS, "entropy"]
    routing = {task: [float(w) for w in weights] for task, *weights, _ in lines}
    assert routing == row.details["routing"]
    assert all(0 < float(line[-1]) <= 1 for line in lines)
    manifest = json.loads((run / "manifest.json").read_text())
    assert {"routing.csv", "routing.png", "merged/README.md"} <= set(manifest)
    assert verify(str(run)) == 0


def test_the_picture_reaches_wandb(run: Path) -> None:
    media = run / "wandb" / "latest-run" / "files" / "media"
    assert list(media.rglob("map_*.png"))


def test_the_card_tells_how_to_load_baselines_and_costs(run: Path, row: ResultRow) -> None:
    card = (run / "merged" / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["tags"] == ["merge", "adamerge"]
    assert 'adamerge.load("FOLDER")' in card
    assert "one static model" not in card
    assert f"| twin_merging | {row.accuracy['circles']:.1f} |" in card
    for name, accuracy in row.details["baselines"].items():
        cells = [*accuracy.values(), sum(accuracy.values()) / len(TASKS)]
        assert f"| {name} | {' | '.join(f'{value:.1f}' for value in cells)} | - |" in card
        assert f"- {name}: " in card
    assert f"| {sum(size['n_bytes'] for size in row.details['stored'].values()):,} |" in card
    assert "ms instead of" in card


def test_predict_gives_the_accuracy_of_the_run(
    run: Path, row: ResultRow, pictures: Path, tmp_path: Path
) -> None:
    for task in TASKS:
        where = ["--data", str(pictures / task / "test"), "--out", str(tmp_path / f"{task}.parquet")]
        assert main(["predict", "--model", str(run / "merged"), *where, "--task", task]) == 0
        found = parquet.read_table(tmp_path / f"{task}.parquet").to_pylist()
        right = [Path(line["path"]).parent.name == f"{line['class']}_{line['class_name']}" for line in found]
        assert 100 * sum(right) / len(right) == pytest.approx(row.accuracy[task])
        for i, expert in enumerate(TASKS):
            mean = sum(line[f"weight_{expert}"] for line in found) / len(found)
            assert mean == pytest.approx(row.details["routing"][task][i], abs=1e-5)
