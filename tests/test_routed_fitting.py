"""`adamerge fit` of per-input methods: what a run leaves, what it refuses, and how it is resumed."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import fit, fit_arguments, noise, write_benchmark
from conftest import CLASSES, TASKS, draw, nudge, rows_of
from PIL import Image
from processes import exit_code, launch, start
from safetensors.torch import save_file
from torch import Tensor
from torch.testing import assert_close

import adamerge
from adamerge import InputError
from adamerge.checkpoints import open_checkpoint
from adamerge.cli import main
from adamerge.commands.runs import reproduce, verify
from adamerge.fitting import RunCLI, run

MLP = r"\.mlp\."
TWO = ("--trainer.devices", "2", "--trainer.strategy", "ddp", "--trainer.accelerator", "cpu")
SMALL = ("--data.batch_size", "4", "--data.eval_batch_size", "4")


@pytest.fixture
def benchmark(tmp_path: Path, clip: Path, rows: dict) -> Path:
    return write_benchmark(tmp_path, clip, rows)


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory, clip: Path) -> Path:
    """A benchmark file with enough held-out images for the guard to judge by."""
    folder = tmp_path_factory.mktemp("many")
    for t, task in enumerate(TASKS):
        (folder / task).mkdir()
        for i in range(40):
            draw(5000 + 100 * t + i, i % len(CLASSES[task])).save(folder / task / f"{i}.png")
    rows = {task: {"adapt": str(folder / task), "classes": CLASSES[task]} for task in TASKS}
    return write_benchmark(folder, clip, rows, holdout=0.5)


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory, clip: Path, pictures: Path) -> RunCLI:
    """A run of Twin-Merging that has ended."""
    folder = tmp_path_factory.mktemp("twin")
    benchmark = write_benchmark(folder, clip, rows_of(pictures))
    return run(fit_arguments(benchmark, folder / "run", *SMALL, name="twin_merging"))


def router_of(run: Path) -> dict[str, Tensor]:
    """Read the router of a run's merged model."""
    found = open_checkpoint(run / "merged" / "model.safetensors")
    return {name: found[name].clone() for name in found if name.startswith("router/")}


def same_router(a: Path, b: Path) -> bool:
    first, second = router_of(a), router_of(b)
    return set(first) == set(second) and all(torch.equal(first[name], second[name]) for name in first)


def same_end(a: Path, b: Path) -> bool:
    """Tell whether two runs ended with the same router, and learned the same before going back."""
    ends = [torch.load(run / "checkpoints" / "last.ckpt") for run in (a, b)]
    first, second = (end["callbacks"]["Selector"]["last"] for end in ends)
    assert first
    return same_router(a, b) and all(torch.equal(value, second[name]) for name, value in first.items())


def row_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "result.json").read_text())


class TestARun:
    def test_leaves_a_model_that_predicts_like_the_trained_one(self, twin: RunCLI) -> None:
        loaded, images = adamerge.load(twin.folder / "merged"), noise(7, 0).images
        for task in (None, *TASKS):
            found, expected = loaded.predict(images, task), twin.model.mixture.predict(images, task)
            assert torch.equal(found.probability, expected.probability)
            assert torch.equal(found.weights, expected.weights)
            assert (found.task, found.class_name) == (expected.task, expected.class_name)

    def test_writes_a_row_that_its_model_confirms(self, twin: RunCLI, pictures: Path) -> None:
        model, row = adamerge.load(twin.folder / "merged"), row_of(twin.folder)
        for task in TASKS:
            files = sorted((pictures / task / "test").rglob("*.png"))
            found = model.predict([Image.open(file) for file in files], task)
            names = [file.parent.name.split("_")[1] for file in files]
            right = sum(a == b for a, b in zip(found.class_name, names, strict=True))
            assert row["accuracy"][task] == pytest.approx(100 * right / len(files))
            weights = found.weights.mean(0).tolist()
            assert row["details"]["routing"][task] == pytest.approx(weights, abs=1e-6)

    def test_tells_routing_baselines_bytes_and_time(self, twin: RunCLI) -> None:
        row = row_of(twin.folder)
        details = row["details"]
        assert all(row["unknown"][task] <= row["accuracy"][task] for task in TASKS)
        assert details["experts"] == list(TASKS)
        assert all(sum(weights) == pytest.approx(1, abs=1e-5) for weights in details["routing"].values())
        assert set(details["baselines"]) == {"oracle", "hard_top_1", "uniform", "shared"}
        assert all(set(found) == set(TASKS) for found in details["baselines"].values())
        assert all(seconds > 0 for seconds in details["seconds_per_batch"].values())
        size = (twin.folder / "merged" / "model.safetensors").stat().st_size
        stored = sum(part["n_bytes"] for part in details["stored"].values())
        assert stored <= size <= stored + 30_000  # names and shapes

    def test_can_be_tested_from_its_checkpoint_and_made_again(
        self, twin: RunCLI, capsys: pytest.CaptureFixture[str]
    ) -> None:
        where = ["--config", str(twin.folder / "config.yaml"), "--ckpt_path", "last"]
        assert main(["test", *where]) == 0
        assert f"{row_of(twin.folder)['mean']:.1f}" in capsys.readouterr().out
        assert verify(str(twin.folder)) == 0
        assert reproduce(str(twin.folder)) == 0


def test_an_oracle_has_no_accuracy_with_the_task_unknown(benchmark: Path, tmp_path: Path) -> None:
    assert fit(benchmark, tmp_path / "run", "--trainer.max_steps", "0", name="oracle") == 0
    row = row_of(tmp_path / "run")
    assert row["unknown"] == {}
    assert row["details"]["routing"] == {t: [float(t == other) for other in TASKS] for t in TASKS}
    assert not (tmp_path / "run" / "coefficients.safetensors").exists()
    assert reproduce(str(tmp_path / "run")) == 0


def test_steps_are_for_what_can_be_learned(
    benchmark: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit(benchmark, tmp_path / "a", "--trainer.max_steps", "0", name="twin_merging") == 2
    assert "trainer.max_steps=0.\nIt must be 1 or more" in capsys.readouterr().err
    for name, kind in (("oracle", "Oracle"), ("smile", "Subspace")):
        assert fit(benchmark, tmp_path / "b", name=name) == 2
        assert f"{kind} has nothing to learn.\nSet trainer.max_steps to 0" in capsys.readouterr().err


def test_bf16_trains_a_router_in_fp32(benchmark: Path, tmp_path: Path) -> None:
    options = [*SMALL, "--trainer.precision", "bf16-mixed", "--model.objective", "adamerge.Entropy"]
    assert fit(benchmark, tmp_path / "run", *options, name="twin_merging") == 0
    dtypes = {value.dtype for value in router_of(tmp_path / "run").values()}
    assert dtypes == {torch.float32, torch.int64}


class TestResuming:
    """A run that was cut off ends with the router of one that was not, bit for bit."""

    @staticmethod
    def options(name: str, steps: int) -> list[str]:
        teacher = ["--model.objective", "adamerge.KLTeacher", "--model.optimizer.init_args.lr", "0.01"]
        selector = ["--selector.every_n_steps", "5", "--selector.max_images", "20"]
        selector += ["--selector.lost_agreement", "9", "--selector.top_share", "1.0"]
        selector += ["--selector.marginal", "0"]
        more = [*selector, "--save_every", "4", "--trainer.max_steps", str(steps)]
        return [*SMALL, *more, *(teacher if name == "wemoe" else [])]

    @pytest.mark.no_cover
    @pytest.mark.parametrize(
        ("name", "sign", "steps"), [("twin_merging", signal.SIGKILL, 32), ("wemoe", signal.SIGINT, 32)]
    )
    def test_after_an_interruption(
        self, name: str, sign: signal.Signals, steps: int, many: Path, tmp_path: Path
    ) -> None:
        options = self.options(name, steps)
        assert fit(many, tmp_path / "whole", *options, name=name) == 0
        arguments = fit_arguments(many, tmp_path / "cut", *options, name=name)
        process = start(arguments, tmp_path / "log", at=(13, sign))
        assert exit_code(process) == (-sign if sign == signal.SIGKILL else 130)
        assert not (tmp_path / "cut" / "result.json").exists()
        assert fit(many, tmp_path / "cut", *options, "--ckpt_path", "last", name=name) == 0
        assert same_end(tmp_path / "whole", tmp_path / "cut")

    @pytest.mark.parametrize("name", ["twin_merging", "wemoe"])
    def test_after_its_end(self, name: str, many: Path, tmp_path: Path) -> None:
        assert fit(many, tmp_path / "whole", *self.options(name, 12), name=name) == 0
        assert fit(many, tmp_path / "cut", *self.options(name, 7), name=name) == 0
        more = [*self.options(name, 12), "--ckpt_path", "last"]
        assert fit(many, tmp_path / "cut", *more, name=name) == 0
        assert same_end(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.no_cover
def test_two_processes_learn_the_router_that_one_does(benchmark: Path, tmp_path: Path) -> None:
    linear = ["--model.coefficients.init_args.network", "linear", "--model.objective", "adamerge.Entropy"]
    options = [*SMALL, *linear, "--model.optimizer.init_args.lr", "0.01"]
    assert fit(benchmark, tmp_path / "one", *options, name="twin_merging") == 0
    arguments = fit_arguments(benchmark, tmp_path / "two", *options, *TWO, name="twin_merging")
    done = launch(arguments)
    assert done.returncode == 0, done.stderr
    one, two = router_of(tmp_path / "one"), router_of(tmp_path / "two")
    for name, value in one.items():
        assert_close(value, two[name], rtol=0, atol=1e-6)
    assert fit(benchmark, tmp_path / "start", *options, "--trainer.max_steps", "1", name="twin_merging") == 0
    assert not same_router(tmp_path / "one", tmp_path / "start")


@pytest.mark.no_cover
def test_normalisation_over_tasks_needs_them_in_one_process(benchmark: Path, tmp_path: Path) -> None:
    arguments = fit_arguments(benchmark, tmp_path / "run", *SMALL, *TWO, name="twin_merging")
    done = launch(arguments)
    assert done.returncode == 2
    assert "each process has some tasks alone.\nUse network='linear'" in done.stderr


def test_a_checkpoint_is_among_the_inputs(
    benchmark: Path, clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "m.safetensors"
    save_file(dict(open_checkpoint(clip / "base")), file)
    options = [*SMALL, "--model.shared", str(file), "--model.shared_options", "null"]
    assert fit(benchmark, tmp_path / "run", *options, name="twin_merging") == 0
    digest = open_checkpoint(file).file_digest()
    assert row_of(tmp_path / "run")["provenance"]["weights"]["shared model"] == digest
    assert verify(str(tmp_path / "run")) == 0
    save_file(nudge(dict(open_checkpoint(clip / "base")), 9), file)
    with pytest.raises(InputError, match="weights shared model: changed since the run"):
        verify(str(tmp_path / "run"))
    more = ["--ckpt_path", "last", "--trainer.max_steps", "8"]
    assert fit(benchmark, tmp_path / "run", *options, *more, name="twin_merging") == 2
    assert "weights.shared model" in capsys.readouterr().err
