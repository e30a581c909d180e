"""The front of the command line: instant, terse, and with exit codes that scripts can rely on."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
from builders import method, write_benchmark

import adamerge
from adamerge import cli
from adamerge.cli import main


def test_help_is_instant_and_imports_nothing_heavy() -> None:
    program = (
        "import sys; from adamerge.cli import main; code = main(['--help']);"
        "heavy = {'torch', 'pytorch_lightning', 'numpy', 'jsonargparse'} & set(sys.modules);"
        "sys.exit(code or len(heavy))"
    )
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert time.monotonic() - began < 1
    assert done.returncode == 0, done.stderr
    assert "usage: adamerge" in done.stdout
    assert all(name in done.stdout for name in ("fit", "demo", "verify", "reproduce"))


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"adamerge {adamerge.__version__}\n"


WRONG = [
    (["--model.coefs", "3"], "unknown key model.coefs.", "model."),
    (["--trainer.max_stepz", "3"], "unknown key trainer.max_stepz.", "Did you mean 'trainer.max_steps'?"),
    (["--model.codec", "fp33"], "codec 'fp33' is unknown.", "Did you mean 'fp32'?"),
    (["--data.batch_size", "abc"], "data.batch_size: expected int, found 'abc'.", ""),
    (["--data.batch_size", "0"], "batch_size=0 is out of range.", "Use a whole number in [1, 1e6]."),
    (["--save_every", "0"], "save_every=0", "must be 1 or more"),
    (
        ["--selector.every_n_steps", "-3"],
        "every_n_steps=-3 is out of range.",
        "Use a whole number in [0, 1e9].",
    ),
    (["--model.coefficients.init_args.initial", ".nan"], "initial=nan is not finite.", "Use a number"),
    (["--ckpt_path", "nowhere.ckpt"], "checkpoint nowhere.ckpt does not exist.", "--ckpt_path last"),
    (["--trainer.precision", "bf17-mixed"], "trainer.precision=bf17-mixed", "Did you mean 'bf16-mixed'?"),
    (["--model.objective", "Entropi"], "there is no class 'Entropi'", "Did you mean 'adamerge.Entropy'?"),
    (
        ["--model.coefficients.init_args.grouping", "tensorr"],
        "model.coefficients.grouping=tensorr is not a valid value.",
        "Did you mean 'tensor'?",
    ),
    (
        ["--model.coefficients.init_args.initail", "0.2"],
        "adamerge.Learned has no option 'initail'.",
        "Did you mean 'initial'?",
    ),
    (["--model.edit", "ties_trimm"], "method 'ties_trimm' is unknown.", "Did you mean 'ties_trim'?"),
    (["--config", "nowhere.yaml"], "nowhere.yaml", ""),
]


@pytest.mark.parametrize(("wrong", "reason", "hint"), WRONG, ids=lambda value: str(value)[:40])
def test_a_wrong_key_or_value_costs_three_lines_at_most(
    wrong: list[str],
    reason: str,
    hint: str,
    tmp_path: Path,
    clip: Path,
    rows: dict,
    capsys: pytest.CaptureFixture[str],
) -> None:
    benchmark = write_benchmark(tmp_path, clip, rows)
    files = ["--config", str(benchmark), "--config", str(method("adamerging_layer_wise"))]
    assert main(["fit", *files, "--run_dir", str(tmp_path / "run"), *wrong]) == 2
    complaint = capsys.readouterr().err.replace("Seed set to 0\n", "")
    assert reason in complaint
    assert hint in complaint
    assert len(complaint.strip().splitlines()) <= 3
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("modell: {base: x}\n", "unknown key modell.base."),
        ("model: {coefs: 1}\n", "unknown key model.coefs."),
        ("model: {objective: {class_path: adamerge.Entropy, init_args: {normalise: none}}}\n", "'normalise'"),
        ("data: {tasks: {cars: {adept: x}}}\n", "adamerge.TaskSpec has no option 'adept'."),
        ("model: [1\n", "wrong.yaml is no YAML: line 2,"),
        ("model:\n  experts: {a: b}\n  experts: {c: d}\n", "key 'experts' stands twice, in lines 2 and 3."),
    ],
)
def test_a_wrong_file_is_as_terse(
    text: str, reason: str, tmp_path: Path, clip: Path, rows: dict, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "wrong.yaml").write_text(text)
    benchmark = write_benchmark(tmp_path, clip, rows)
    assert main(["fit", "--config", str(benchmark), "--config", str(tmp_path / "wrong.yaml")]) == 2
    complaint = capsys.readouterr().err
    assert reason in complaint
    assert len(complaint.strip().splitlines()) <= 3


def test_a_missing_gpu_is_a_matter_of_the_machine(
    tmp_path: Path, clip: Path, rows: dict, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    benchmark = write_benchmark(tmp_path, clip, rows)
    for name in ("gpu", "cuda"):
        assert main(["fit", "--config", str(benchmark), "--trainer.accelerator", name]) == 5
        assert "Add --trainer.accelerator cpu" in capsys.readouterr().err


def test_commands_and_their_options_are_checked(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fitt"]) == 2
    assert "Did you mean 'fit'?" in capsys.readouterr().err
    assert main(["verify"]) == 2
    assert main(["verify", "nowhere"]) == 2
    assert main(["reproduce", "nowhere"]) == 2
    assert "nowhere has no manifest.json" in capsys.readouterr().err
    assert main(["demo", "--outt", "x"]) == 2
    assert "outt" in capsys.readouterr().err
    assert main(["fit"]) == 2
    assert "data.tasks is missing.\nGive it in a file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (KeyboardInterrupt(), 130, "Resume with: adamerge fit --x 1 --ckpt_path last"),
        (type("OutOfMemoryError", (RuntimeError,), {})("CUDA"), 5, "data.batch_size"),
        (OSError(28, "No space left on device"), 5, "the disk is full"),
        (RuntimeError("value cannot be converted to type float without overflow"), 2, "learning rate"),
        (RuntimeError("PytorchStreamReader failed finding central directory"), 2, "cut off"),
        (type("MisconfigurationException", (Exception,), {})("first\nsecond"), 2, "adamerge: first\n"),
    ],
)
def test_what_libraries_raise_becomes_a_reason_and_a_code(
    error: BaseException,
    code: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(_: list[str]) -> int:
        raise error

    monkeypatch.setattr(cli, "_dispatch", fail)
    assert main(["fit", "--x", "1"]) == code
    assert said in capsys.readouterr().err


def test_an_error_that_nobody_foresaw_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: list[str]) -> int:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(cli, "_dispatch", fail)
    with pytest.raises(ZeroDivisionError):
        main(["demo"])


def test_an_interrupted_demo_says_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def lightning_leaves(_: list[str]) -> int:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            sys.exit(1)

    monkeypatch.setattr(cli, "_dispatch", lightning_leaves)
    assert main(["demo"]) == 130
    assert "Start again with: adamerge demo" in capsys.readouterr().err


def test_a_command_that_is_too_long_to_be_shown_whole_is_not_cut(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(_: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_dispatch", interrupted)
    assert main(["fit", "--config", "x" * 700]) == 130
    assert capsys.readouterr().err == (
        "adamerge: interrupted. Resume with the same command and --ckpt_path last.\n"
    )
    assert main(["merge", "ties", "--base", "x" * 700]) == 130
    assert capsys.readouterr().err == "adamerge: interrupted. Start again with the same command.\n"


@pytest.mark.parametrize("kind", [FileNotFoundError, IsADirectoryError, PermissionError])
def test_a_file_that_cannot_be_opened_is_a_message_not_a_traceback(
    kind: type[OSError], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_: list[str]) -> int:
        raise kind(2, "No such file or directory", "runs/lost.json")

    monkeypatch.setattr(cli, "_dispatch", fail)
    assert cli.main(["table", "runs"]) == 2
    assert capsys.readouterr().err.startswith("adamerge: runs/lost.json: No such file or directory.\n")


def test_the_root_lists_its_public_names() -> None:
    assert {"MergeTask", "TaskVectors", "load", "merge", "__version__"} <= set(dir(adamerge))
    assert all(hasattr(adamerge, name) for name in dir(adamerge))
