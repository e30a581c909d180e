"""`adamerge fit` that goes on: after its end, after an interruption, over an old run, in two processes."""

import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import coefficients_of, fit, fit_arguments, write_benchmark
from conftest import TASKS, rows_of
from processes import exit_code, launch, start

from adamerge.callbacks import Curves
from adamerge.commands.runs import verify
from adamerge.ownership import LIST, NEW

STEPS = ("--trainer.max_steps", "60", "--save_every", "5", "--data.num_workers")


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory: pytest.TempPathFactory, clip: Path, pictures: Path) -> Path:
    return write_benchmark(tmp_path_factory.mktemp("benchmark"), clip, rows_of(pictures))


@pytest.fixture(scope="module")
def ended(benchmark: Path) -> Path:
    """A run of six steps, and a copy of it beside."""
    run = benchmark.parent / "ended"
    assert fit(benchmark, run) == 0
    shutil.copytree(run, run.with_name("copy"))
    return run


@pytest.fixture
def run(ended: Path) -> Path:
    """That run as it ended, whatever a test has done to it."""
    shutil.rmtree(ended)
    return Path(shutil.copytree(ended.with_name("copy"), ended))


@pytest.fixture(scope="module")
def whole(benchmark: Path) -> Path:
    """A run that nothing interrupts."""
    assert fit(benchmark, benchmark.parent / "whole", *STEPS, "0") == 0
    return benchmark.parent / "whole"


def test_other_inputs_are_refused_by_name(
    benchmark: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--ckpt_path", "last", "--trainer.max_steps", "8"]
    assert fit(benchmark, run, "--data.batch_size", "3", *more) == 2
    assert "config.data.batch_size: 4 before, 3 now" in capsys.readouterr().err
    assert fit(benchmark, run, "--data.batch_size", "3", "--resume_anyway", "true", *more) == 0
    assert (run / "curves.csv").read_text().splitlines()[-1].startswith("8,")


def test_a_cut_checkpoint_is_named(benchmark: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    last = run / "checkpoints" / "last.ckpt"
    last.write_bytes(last.read_bytes()[:1000])
    assert fit(benchmark, run, "--ckpt_path", "last") == 2
    assert "cut off or no checkpoint" in capsys.readouterr().err


def test_what_is_in_the_way_stays(
    benchmark: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nothing = str(tmp_path / "nothing")
    assert fit(benchmark, run, "--overwrite", "true", "--model.experts.bars", nothing) == 2
    assert (run / "result.json").exists()
    assert fit(benchmark, run, "--overwrite", "true") == 0
    project = tmp_path / "project"
    project.mkdir()
    (project / "config.yaml").write_text("mine")
    for overwrite in ("false", "true"):
        assert fit(benchmark, project, "--overwrite", overwrite) == 2
        assert "is not empty and holds no run" in capsys.readouterr().err
    assert (project / "config.yaml").read_text() == "mine"


def stop_at(step: int, error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a run end with this error once it has taken a step."""
    append = Curves.on_train_batch_end

    def end(self: Curves, trainer: Any, *more: Any) -> None:
        append(self, trainer, *more)
        if trainer.global_step == step:
            raise error

    monkeypatch.setattr(Curves, "on_train_batch_end", end)


def contents(run: Path) -> dict[str, bytes]:
    paths = (path for path in run.rglob("*") if path.is_file() and NEW not in path.parts)
    return {path.relative_to(run).as_posix(): path.read_bytes() for path in paths}


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("a bug")])
def test_an_old_run_stays_until_the_new_one_is_complete(
    error: BaseException, benchmark: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, new = contents(run), ("--overwrite", "true", "--seed_everything", "7", "--save_every", "2")
    for step, is_kept in ((1, False), (3, True)):
        with monkeypatch.context() as patch:
            stop_at(step, error, patch)
            if isinstance(error, KeyboardInterrupt):
                assert fit(benchmark, run, *new) == 130
            else:
                with pytest.raises(RuntimeError, match="a bug"):
                    fit(benchmark, run, *new)
        assert contents(run) == before
        assert (run / NEW / "checkpoints" / "last.ckpt").exists() == is_kept
    assert fit(benchmark, run, *new, "--ckpt_path", "last") == 0
    assert fit(benchmark, run.with_name("new"), *new, "--overwrite", "false") == 0
    expected, found = (coefficients_of(folder) for folder in (run.with_name("new"), run))
    assert all(torch.equal(expected[task], found[task]) for task in TASKS)
    assert (run / "curves.csv").read_text().count("\n") == 7
    assert contents(run).keys() == contents(run.with_name("new")).keys()
    assert verify(str(run)) == 0
    shutil.rmtree(run.with_name("new"))


def test_a_run_of_an_older_version_is_replaced_and_its_stray_checkpoint_goes(
    benchmark: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in (run, run / "merged"):
        (folder / LIST).unlink()
    (run / "checkpoints" / "epoch=0-step=3.ckpt").touch()
    (run / "notes.md").write_text("mine")
    assert fit(benchmark, run, "--overwrite", "true") == 2
    assert "holds what adamerge did not write: notes.md." in capsys.readouterr().err
    (run / "notes.md").unlink()
    again = run.with_name("again")
    shutil.copytree(run, again)
    assert fit(benchmark, run, "--overwrite", "true") == 0
    assert fit(benchmark, again, "--ckpt_path", "last") == 0
    for folder in (run, again):
        assert [path.name for path in (folder / "checkpoints").iterdir()] == ["last.ckpt"]
    shutil.rmtree(again)


def test_projected_coefficients_resume_bit_for_bit(benchmark: Path, tmp_path: Path) -> None:
    how = ["--model.coefficients.init_args.clamp", "projected", "--model.optimizer.init_args.lr", "0.3"]
    how += ["--evaluate_experts", "false"]
    assert fit(benchmark, tmp_path / "whole", *how, "--trainer.max_steps", "9") == 0
    assert fit(benchmark, tmp_path / "cut", *how, "--trainer.max_steps", "4", "--save_every", "2") == 0
    again = ["--trainer.max_steps", "9", "--ckpt_path", "last"]
    assert fit(benchmark, tmp_path / "cut", *how, *again) == 0
    whole, cut = coefficients_of(tmp_path / "whole"), coefficients_of(tmp_path / "cut")
    assert all(torch.equal(whole[task], cut[task]) for task in TASKS)
    assert any((row == 0).any() for row in whole.values())


def test_the_last_checkpoint_is_the_finished_run(benchmark: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert fit(benchmark, run, "--save_every", "4") == 0
    saved = torch.load(run / "checkpoints" / "last.ckpt")
    written = torch.stack([coefficients_of(run)[task] for task in TASKS])
    assert saved["global_step"] == 6
    assert torch.equal(saved["state_dict"]["coefficients.values"], written)


def test_a_kill_after_the_last_step_can_still_be_completed(benchmark: Path, run: Path) -> None:
    expected = coefficients_of(run)
    for name in (
        "coefficients.safetensors",
        "coefficients.csv",
        "curves.png",
        "result.json",
        "manifest.json",
    ):
        (run / name).unlink()
    shutil.rmtree(run / "merged")
    assert fit(benchmark, run, "--ckpt_path", "last") == 0
    assert all(torch.equal(expected[task], row) for task, row in coefficients_of(run).items())
    assert (run / "merged" / "open_clip_model.safetensors").exists()
    assert verify(str(run)) == 0


@pytest.mark.no_cover
@pytest.mark.parametrize(("sign", "workers"), [(signal.SIGKILL, 2), (signal.SIGINT, 0), (signal.SIGTERM, 0)])
def test_an_interrupted_run_resumes_bit_for_bit(
    sign: signal.Signals, workers: int, benchmark: Path, whole: Path, tmp_path: Path
) -> None:
    log, run = tmp_path / "log", tmp_path / "cut"
    process = start(fit_arguments(benchmark, run, *STEPS, str(workers)), log, at=(17, sign))
    assert exit_code(process) == (-sign if sign == signal.SIGKILL else 130), log.read_text()
    assert not (run / "result.json").exists()
    if sign != signal.SIGKILL:
        assert "Resume with: adamerge fit" in log.read_text()
    assert fit(benchmark, run, *STEPS, "0", "--ckpt_path", "last") == 0
    expected, found = coefficients_of(whole), coefficients_of(run)
    assert all(torch.equal(expected[task], found[task]) for task in TASKS)
    assert (whole / "curves.csv").read_text() == (run / "curves.csv").read_text()


@pytest.mark.filterwarnings("ignore:ReliableEntropy found no image")  # of two of the tasks
@pytest.mark.no_cover
@pytest.mark.parametrize("method", ["reliable_layer_wise", "default"])
def test_two_processes_learn_what_one_does(method: str, benchmark: Path, tmp_path: Path) -> None:
    assert fit(benchmark, tmp_path / "one", name=method) == 0
    two = ["--trainer.devices", "2", "--trainer.strategy", "ddp", "--trainer.accelerator", "cpu"]
    arguments = fit_arguments(benchmark, tmp_path / "two", *two, name=method)
    done = launch(arguments)
    assert done.returncode == 0, done.stderr
    one, both = coefficients_of(tmp_path / "one"), coefficients_of(tmp_path / "two")
    for task in TASKS:
        torch.testing.assert_close(one[task], both[task], rtol=0, atol=2e-6)  # sums in another order
        assert (one[task] - 0.3).abs().max() > 1e-3
