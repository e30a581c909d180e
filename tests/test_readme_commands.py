"""Every command line of the README runs as it stands there; only steps are cut and placeholders filled in."""

import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from benchmarks.test_own_models import mine  # noqa: F401  # the folder that the README's example speaks of
from builders import REPOSITORY
from hub_mirror import write_mirror
from safetensors.torch import load_file

from adamerge.cli import main

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
BASE = yaml.safe_load((REPOSITORY / "configs/benchmarks/mine.yaml").read_text())["model"]["base"]
GIVEN = f"--base {BASE} --experts cars=models/birds --experts pets=models/boats --out merged"
PLACEHOLDERS = {
    "--base B": f"--base {BASE}",
    "cars=PATH": "cars=models/birds",
    "pets=PATH": "pets=models/boats",
    "--expert PATH": "--expert models/birds",
    "PHOTOS": "images/boats",
    "runs/bench/A runs/bench/B": "runs/bench/mine runs/mine",
}
FEW = " --trainer.max_steps 2"
NOT_HERE = ("git clone", "bash scripts/", "source ")  # what sets up, and the tests themselves


def command_lines() -> list[str]:
    """Return the command lines of all shell blocks, in order, without comments."""
    blocks = re.findall(r"```sh\n(.*?)```", README, re.S)
    lines = [line.partition("  #")[0].strip() for block in blocks for line in block.splitlines()]
    return [part.strip() for line in lines if line for part in line.split(";")]


def filled(line: str, number: int) -> str:
    """Fill in placeholders, a folder of its own for each merge, and few steps."""
    line = line.replace("...", GIVEN)
    for name, value in PLACEHOLDERS.items():
        line = line.replace(name, value)
    line = line.replace("--out merged", f"--out merged-{number}")
    learns = line.startswith("adamerge bench") or (line.startswith("adamerge fit"))
    return line + FEW * learns


@pytest.fixture
def home(mine: dict, clip: Path) -> Path:  # noqa: F811
    """A folder with everything that the command lines name."""
    shutil.copytree(REPOSITORY / "configs", "configs")
    state = {
        f"model.{name}": tensor for name, tensor in load_file(clip / "experts/circles.safetensors").items()
    }
    torch.save(state, "old.pt")
    write_mirror(Path("DIR"))
    return Path.cwd()


def code_of(line: str) -> int:
    try:
        return main(shlex.split(line)[1:])
    except SystemExit as end:  # of --help
        return int(end.code or 0)


@pytest.mark.slow
@pytest.mark.no_cover
@pytest.mark.filterwarnings("ignore:task .* adaptation images, fewer than a batch of")
@pytest.mark.filterwarnings("ignore:.*task.*is not judged")
def test_every_command_line_runs(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [line for line in command_lines() if not line.startswith(NOT_HERE)]
    assert len(lines) > 20
    for number, line in enumerate(lines):
        command = filled(line, number)
        if "clip8" in command:
            command += " --mirror DIR" * ("--mirror" not in command)
            command += " --expect DIR/expect-clip8.yaml" * command.startswith("adamerge bench")
        expected = 3 if "data check" in command else 0  # the mirror has fewer images than were published
        assert code_of(command) == expected, f"{line}\n{command}\n{capsys.readouterr().err[-2000:]}"


def test_every_script_and_option_that_it_names_exists() -> None:
    commands = re.findall(r"`python (scripts/\w+\.py)([^`]*)`", README)
    assert len(commands) > 8
    for script, options in commands:
        source = (REPOSITORY / script).read_text(encoding="utf-8")
        for option in re.findall(r"--[\w-]+", options):
            name = option.removeprefix("--").replace("-", "_")
            assert f'"{option}"' in source or re.search(rf"\b{name}\b", source), f"{script} {option}"
