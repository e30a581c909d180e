"""`adamerge fit | validate | test | predict` as a user runs them, on tiny models."""

import csv
import json
import os
from pathlib import Path

import open_clip
import pytest
import torch
import yaml
from builders import coefficients_of, fit, fit_arguments, method, write_benchmark
from conftest import TASKS, draw, nudge, rows_of, write_clip
from safetensors.torch import save_file
from torch import Tensor

from adamerge.checkpoints import open_checkpoint
from adamerge.cli import main
from adamerge.commands.runs import reproduce, verify
from adamerge.errors import AdamergeWarning, InputError, NumericError


@pytest.fixture
def benchmark(tmp_path: Path, clip: Path, rows: dict) -> Path:
    return write_benchmark(tmp_path, clip, rows)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, clip: Path, pictures: Path) -> tuple[Path, Path]:
    """A benchmark file and the folder of a run that has ended."""
    folder = tmp_path_factory.mktemp("finished")
    benchmark = write_benchmark(folder, clip, rows_of(pictures))
    assert fit(benchmark, folder / "run") == 0
    return benchmark, folder / "run"


def test_a_run_leaves_everything_named_in_the_readme(finished: tuple[Path, Path]) -> None:
    _, run = finished
    names = {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()}
    assert names >= {
        "checkpoints/last.ckpt",
        "coefficients.csv",
        "coefficients.png",
        "coefficients.safetensors",
        "config.yaml",
        "curves.csv",
        "curves.png",
        "inputs.json",
        "manifest.json",
        "merged/README.md",
        "merged/open_clip_config.json",
        "merged/open_clip_model.safetensors",
        "result.json",
    }
    assert all(oct(path.stat().st_mode)[-3:] == "644" for path in (run / "merged").iterdir())
    assert (run / "checkpoints" / "last.ckpt").stat().st_size < 40_000


def test_the_result_row_holds_accuracies_and_digests(finished: tuple[Path, Path], clip: Path) -> None:
    _, run = finished
    row = json.loads((run / "result.json").read_text())
    assert set(row["accuracy"]) == set(TASKS)
    assert row["mean"] == pytest.approx(sum(row["accuracy"].values()) / 3)
    assert row["transductive"] == []
    expected = open_checkpoint(clip / "experts" / "bars.safetensors").file_digest()
    assert row["provenance"]["weights"]["bars"] == expected
    assert set(row["provenance"]) == {
        "schema_version",
        "folder",
        "files",
        "tasks",
        "weights",
        "data",
        "preprocessing",
        "config",
        "code",
    }


def test_plain_open_clip_loads_the_merged_model(finished: tuple[Path, Path]) -> None:
    _, run = finished
    model = open_clip.create_model(f"local-dir:{run / 'merged'}")
    weights = open_checkpoint(run / "merged")
    assert torch.equal(model.visual.proj, weights["visual.proj"])
    card = (run / "merged" / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["tags"] == ["merge", "adamerge"]
    assert "base_model" not in front  # which the hub takes for ids, and these are local files


def test_the_other_subcommands_read_the_last_checkpoint(
    finished: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    benchmark, run = finished
    files = ["--config", str(benchmark), "--config", str(method("adamerging_layer_wise"))]
    where = [*files, "--run_dir", str(run), "--ckpt_path", "last"]
    assert main(["test", *where]) == 0
    mean = json.loads((run / "result.json").read_text())["mean"]
    assert f"{mean:.1f}" in capsys.readouterr().out
    assert main(["validate", *where]) == 0
    assert "val/entropy/bars: " in capsys.readouterr().err
    assert main(["predict", *where]) == 0
    lines = list(csv.DictReader((run / "predictions.csv").read_text().splitlines()))
    assert len(lines) == 27
    assert {line["class_name"] for line in lines if line["task"] == "dots"} <= {"one", "two"}
    (run / "predictions.csv").unlink()
    without = [*where[:2], *where[4:]]  # then the default recipe is meant, whose coefficients are others
    assert main(["test", *without]) == 2
    assert "the checkpoint has other coefficients" in capsys.readouterr().err


def test_verify_and_reproduce(finished: tuple[Path, Path], tmp_path: Path) -> None:
    import shutil

    _, run = finished
    assert verify(str(run)) == 0
    assert reproduce(str(run)) == 0
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    (copy / "coefficients.csv").write_text("task\n")
    (copy / "curves.png").unlink()
    with pytest.raises(InputError, match=r"coefficients.csv: changed\ncurves.png: missing"):
        verify(str(copy))
    inputs = json.loads((copy / "inputs.json").read_text())
    inputs["weights"]["dots"] = "0" * 64
    (copy / "inputs.json").write_text(json.dumps(inputs))
    with pytest.raises(InputError, match="weights dots: changed since the run"):
        verify(str(copy))
    save_file({t: v + 1 for t, v in coefficients_of(copy).items()}, copy / "coefficients.safetensors")
    with pytest.raises(NumericError, match="was not reproduced"):
        reproduce(str(copy))


def test_a_run_of_relative_paths_is_verified_from_anywhere(
    benchmark: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = benchmark.read_text()
    document = yaml.safe_load(text)
    for task, path in document["model"]["experts"].items():
        document["model"]["experts"][task] = os.path.relpath(path, tmp_path)
    benchmark.write_text(yaml.safe_dump(document, sort_keys=False))
    monkeypatch.chdir(tmp_path)
    assert fit(benchmark, Path("run")) == 0
    monkeypatch.chdir(tmp_path.parent)
    assert verify(str(tmp_path / "run")) == 0
    inputs = json.loads((tmp_path / "run" / "inputs.json").read_text())
    (tmp_path / "run" / "inputs.json").write_text(json.dumps(inputs | {"folder": "/gone"}))
    with pytest.raises(InputError, match="the run began in /gone, which is gone"):
        verify(str(tmp_path / "run"))


def test_a_changed_test_image_is_found(tmp_path: Path, clip: Path, rows: dict, pictures: Path) -> None:
    import shutil

    shutil.copytree(pictures / "dots" / "test", tmp_path / "test")
    rows["dots"]["test"] = str(tmp_path / "test")
    assert fit(write_benchmark(tmp_path / "b", clip, rows), tmp_path / "run") == 0
    draw(77, 1).save(next((tmp_path / "test").rglob("*.png")))
    with pytest.raises(InputError, match="data dots test: changed since the run"):
        verify(str(tmp_path / "run"))


def test_a_hub_id_that_cannot_be_reached_is_a_matter_of_the_machine(
    benchmark: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert fit(benchmark, tmp_path / "run", "--model.base", "nobody/nothing") == 5
    assert "'nobody/nothing' is no local path" in capsys.readouterr().err


def test_two_runs_never_share_a_folder(
    finished: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    benchmark, run = finished
    before = (run / "result.json").read_bytes()
    assert fit(benchmark, run) == 2
    assert "holds a run already.\nResume it with --ckpt_path last" in capsys.readouterr().err
    assert (run / "result.json").read_bytes() == before


def test_without_a_checkpoint_there_is_nothing_to_test(
    benchmark: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--config", str(benchmark), "--run_dir", str(tmp_path / "no"), "--ckpt_path", "last"]
    assert main(["test", *where]) == 2
    assert "has no checkpoint" in capsys.readouterr().err


def test_adapting_on_the_test_images_is_called_transductive(
    benchmark: Path, tmp_path: Path, rows: dict, clip: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows["bars"]["adapt"] = rows["bars"]["test"]
    assert fit(write_benchmark(tmp_path / "t", clip, rows), tmp_path / "run") == 0
    assert json.loads((tmp_path / "run" / "result.json").read_text())["transductive"] == ["bars"]
    assert "* transductive" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["wrong_width", "missing", "nan", "config"])
def test_experts_that_do_not_fit_stop_before_any_work(
    name: str, tmp_path: Path, clip: Path, rows: dict, capsys: pytest.CaptureFixture[str]
) -> None:
    state: dict[str, Tensor] = nudge(dict(open_checkpoint(clip / "base")), 9)
    path = tmp_path / "expert.safetensors"
    expected = {
        "wrong_width": "tensors differ from the base in shape: visual.proj",
        "missing": "lacks 1 of",
        "nan": "expert 'bars': 1 non-finite value(s) in visual.proj, first at [0, 0]",
        "config": "activation differs: base gelu, expert 'bars' quick_gelu",
    }[name]
    if name == "wrong_width":
        state["visual.proj"] = state["visual.proj"][:8].contiguous()
    if name == "missing":
        del state["visual.proj"]
    if name == "nan":
        state["visual.proj"][0, 0] = float("nan")
    if name == "config":
        path = tmp_path / "folder"
        write_clip(path)
        config = json.loads((path / "open_clip_config.json").read_text())
        config["model_cfg"]["quick_gelu"] = True
        (path / "open_clip_config.json").write_text(json.dumps(config))
    else:
        save_file(state, path)
    benchmark = write_benchmark(tmp_path, clip, rows)
    assert fit(benchmark, tmp_path / "run", "--model.experts.bars", str(path)) == 2
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_an_empty_folder_of_images_is_a_data_problem(
    tmp_path: Path, clip: Path, rows: dict, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    rows["dots"]["adapt"] = str(tmp_path / "empty")
    assert fit(write_benchmark(tmp_path, clip, rows), tmp_path / "run") == 3
    assert "task 'dots', adaptation images" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_finite_ends_with_code_4_and_good_coefficients(
    benchmark: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = fit(benchmark, tmp_path / "run", "--model.optimizer.init_args.lr", "1e30")
    assert code == 4
    assert "step 1: " in capsys.readouterr().err
    assert all((row == 0.3).all() for row in coefficients_of(tmp_path / "run").values())
    saved = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt")["state_dict"]["coefficients.values"]
    assert (saved == 0.3).all()
    assert not (tmp_path / "run" / "result.json").exists()


def test_one_task_is_enough(tmp_path: Path, clip: Path, rows: dict) -> None:
    benchmark = write_benchmark(tmp_path, clip, {"dots": rows["dots"]})
    document = yaml.safe_load(benchmark.read_text())
    document["model"]["experts"] = {"dots": document["model"]["experts"]["dots"]}
    benchmark.write_text(yaml.safe_dump(document))
    assert fit(benchmark, tmp_path / "run") == 0
    files = ["--config", str(benchmark), "--config", str(method("adamerging_layer_wise"))]
    where = [*files, "--run_dir", str(tmp_path / "run"), "--ckpt_path", "last"]
    assert main(["predict", *where]) == 0
    assert len((tmp_path / "run" / "predictions.csv").read_text().splitlines()) == 10


def test_without_test_images_a_run_tells_how_far_it_agrees_with_the_experts(
    tmp_path: Path,
    clip: Path,
    rows: dict,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("adamerge.callbacks.selector._FEWEST", 10)  # images of a task
    for row in rows.values():
        del row["test"]
    benchmark, run = write_benchmark(tmp_path, clip, rows), tmp_path / "run"
    assert fit(benchmark, run) == 0
    row = json.loads((run / "result.json").read_text())
    assert row["accuracy"] == {}
    assert row["mean"] is None
    share = row["details"]["agreement"]["dots"]
    told = f"dots: agrees with its expert on {share['now']:.1f} % of held-out adaptation images"
    assert told in capsys.readouterr().out
    assert told in (run / "merged" / "README.md").read_text()
    assert main(["test", *fit_arguments(benchmark, run)[1:], "--ckpt_path", "last"]) == 2
    assert "no task has test images" in capsys.readouterr().err


@pytest.mark.parametrize(("precision", "reason"), [("16-mixed", "needs a GPU"), ("bf16-true", "would round")])
def test_precisions_that_cannot_work_are_refused(
    precision: str, reason: str, benchmark: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if torch.cuda.is_available() and precision == "16-mixed":
        pytest.skip("there is a GPU")
    assert fit(benchmark, tmp_path / "run", "--trainer.precision", precision) == 2
    assert reason in capsys.readouterr().err


def test_unusual_coefficients_are_pointed_at_where_no_selector_judged_them(
    benchmark: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fast = ("--model.optimizer.init_args.lr", "1.0")
    with pytest.warns(AdamergeWarning, match="no selector has compared this state with the start"):
        assert fit(benchmark, tmp_path / "unjudged", *fast, "--selector.every_n_steps", "0") == 0
    last = [line for line in capsys.readouterr().err.splitlines() if "Load it" in line]
    assert len(last) == 1
    assert "mean accuracy" in last[0]
    assert "6 steps" in last[0]
