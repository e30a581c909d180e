"""What adamerge did not write stays, whatever command is to overwrite it; one command writes at a time."""

import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import yaml
from builders import fit_arguments, write_benchmark
from conftest import TASKS
from safetensors.torch import load_file, save_file

from adamerge.benchmarks import Benchmark
from adamerge.cli import main
from adamerge.commands import runs
from adamerge.locks import locked
from adamerge.ownership import LOCK, NEW
from adamerge.shipped import configs

SHORT = ("--trainer.max_steps", "2", "--evaluate_experts", "false")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADAMERGE_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def commands(clip: Path, rows: dict, tmp_path: Path) -> dict[str, list[str]]:
    """Command lines without their outputs, by name."""
    base, expert = clip / "base", clip / "experts" / f"{TASKS[0]}.safetensors"
    benchmark = write_benchmark(tmp_path / "inputs", clip, rows)
    torch.save({"w": torch.ones(2)}, tmp_path / "inputs" / "old.pt")
    experts = [f"--experts={task}={clip / 'experts' / task}.safetensors" for task in TASKS]
    models = ["--base", str(base), *experts]
    compressed = tmp_path / "inputs" / "small.safetensors"
    pair = ["--base", str(base), "--expert", str(expert)]
    assert main(["compress", *pair, "--out", str(compressed)]) == 0
    fit = fit_arguments(benchmark, tmp_path, *SHORT)
    at = fit.index("--run_dir")
    return {
        "fit": [*fit[:at], *fit[at + 2 :], "--overwrite", "true", "--run_dir"],
        "bench": ["bench", "run", str(benchmark), "--methods", "average", "--out"],
        "demo": ["demo", "--overwrite", "--out"],
        "evolve": ["evolve", str(benchmark), "--generations", "1", "--start", "average", "--out"],
        "merge": ["merge", "average", *models, "--overwrite", "--out"],
        "inspect": ["inspect", *models, "--overwrite", "--out"],
        "compress": ["compress", *pair, "--overwrite", "--out"],
        "decompress": [
            *("decompress", "--base", str(base), "--file", str(compressed), "--overwrite", "--out"),
        ],
        "convert": ["convert", str(tmp_path / "inputs" / "old.pt"), "--overwrite", "--out"],
        "predict": ["predict", "--model", str(base), "--data", "embedded:mnist/test", "--overwrite", "--out"],
        "data": ["data", "check", "--benchmark", str(benchmark), "--overwrite", "--write"],
    }


FOLDERS = ("fit", "bench", "demo", "evolve", "merge", "inspect", "decompress")
FILES = {"compress": "a.safetensors", "convert": "a.safetensors", "predict": "a.parquet", "data": "a.yaml"}


def tree(folder: Path) -> dict[str, bytes]:
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def project(folder: Path) -> Path:
    """A project of somebody else, with all names that mean something to us."""
    names = ("checkpoints/a", "methods/b.py", "merged/c", "src/thesis.tex", "results.csv", "report.md")
    names += (
        "inputs.json",
        "config.yaml",
        "benchmark.yaml",
        "notes.safetensors",
        "inspect.json",
        "README.md",
    )
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("years of work")
    (folder / "empty").mkdir()
    return folder


def refused(capsys: pytest.CaptureFixture[str], command: list[str], out: Path) -> str:
    """Run a command that ends with 2 and three lines at most, and return these."""
    capsys.readouterr()
    assert main([*command, str(out)]) == 2
    complaint = capsys.readouterr().err.replace("Seed set to 0\n", "").strip()
    assert len(complaint.splitlines()) <= 3
    return complaint


@pytest.mark.parametrize("name", FOLDERS)
def test_a_project_of_somebody_else_stays(
    name: str, commands: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = project(tmp_path / "project")
    before = tree(folder)
    assert str(folder) in refused(capsys, commands[name], folder)
    assert tree(folder) == before
    assert (folder / "empty").is_dir()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["inputs", "project"]


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_somebody_else_stays(
    name: str, commands: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / FILES[name]
    file.write_text("years of work")
    assert "adamerge did not write it" in refused(capsys, commands[name], file)
    assert file.read_text() == "years of work"


@pytest.mark.parametrize("name", ["fit", "merge", "inspect", "decompress"])
def test_its_own_output_is_replaced_but_not_what_was_added(
    name: str, commands: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if name == "inspect":
        pytest.importorskip("matplotlib")
    out, mine = tmp_path / "out", tmp_path / "mine"
    mine.mkdir()
    for _ in range(2):
        assert main([*commands[name], str(out)]) == 0
    (out / "link").symlink_to(mine)
    assert "holds what adamerge did not write: link." in refused(capsys, commands[name], out)
    (out / "link").unlink()
    (out / "notes").mkdir()
    (out / "notes" / "a.txt").write_text("mine")
    assert "holds what adamerge did not write: notes/." in refused(capsys, commands[name], out)
    assert (out / "notes" / "a.txt").read_text() == "mine"
    (out / "notes" / "a.txt").rename(mine / "a.txt")
    (out / "notes").rmdir()
    assert main([*commands[name], str(out)]) == 0


@pytest.mark.parametrize("name", ["compress", "convert"])
def test_its_own_file_is_replaced(name: str, commands: dict, tmp_path: Path) -> None:
    for _ in range(2):
        assert main([*commands[name], str(tmp_path / FILES[name])]) == 0


def test_no_output_takes_an_inputs_place(
    clip: Path, commands: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also not where the input is of our own making, which `--overwrite` would replace."""
    root = shutil.copytree(clip, tmp_path / "clip")
    ours = root / "experts" / f"{TASKS[0]}.safetensors"
    save_file(load_file(ours), ours, {"adamerge": "{}"})
    moved = {n: [word.replace(str(clip), str(root)) for word in c] for n, c in commands.items()}
    for name in ("compress", "decompress", "merge"):
        for out in (root, root / "base", ours):
            if name != "decompress" or out != ours:
                assert "would replace" in refused(capsys, moved[name], out)
    run = tmp_path / "run"
    assert main([*moved["fit"], str(run)]) == 0
    teacher = ["--model.experts.bars", str(run / "merged")]
    assert "would replace expert 'bars'" in refused(capsys, [*teacher_of(moved["fit"], teacher)], run)
    assert (run / "result.json").exists()


def teacher_of(fit: list[str], more: list[str]) -> list[str]:
    return [fit[0], *fit[1:-1], *more, fit[-1]]


@pytest.fixture
def hold() -> Iterator[Callable[[Path], None]]:
    """Let another thread hold locks until the test's end."""
    done, threads = threading.Event(), []

    def hold_one(path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        is_held = threading.Event()

        def wait() -> None:
            with locked(path, "it"):
                is_held.set()
                done.wait(60)

        threads.append(threading.Thread(target=wait))
        threads[-1].start()
        assert is_held.wait(10)

    yield hold_one
    done.set()
    for thread in threads:
        thread.join()


@pytest.mark.parametrize(
    "name", ["fit", "bench", "demo", "evolve", "merge", "decompress", "compress", "convert"]
)
def test_an_output_that_is_being_written_is_in_use(
    name: str,
    commands: dict,
    hold: Callable[[Path], None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / FILES.get(name, "out")
    hold(out / LOCK if name in ("fit", "bench", "demo", "evolve") else out.with_name(f".{out.name}.lock"))
    assert "is in use by process" in refused(capsys, commands[name], out)
    assert not out.exists() or [path.name for path in out.iterdir()] == [LOCK]


def test_old_and_new_demo_stand_side_by_side_until_the_new_one_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "demo"

    def fill(folder: Path) -> list:
        (folder / "benchmark.yaml").write_text(yaml.safe_dump({}))
        raise KeyboardInterrupt

    Benchmark(configs() / "benchmarks" / "embedded.yaml", out).write([], "a title")
    before = tree(out)
    monkeypatch.setattr(runs, "_fill", fill)
    assert main(["demo", "--out", str(out), "--overwrite"]) == 130
    assert before.items() <= tree(out).items()
    assert (out / NEW / "benchmark.yaml").exists()
