"""Wrong values in every option of every command: a refusal of three lines, soon, with nothing left behind."""

import inspect
import os
import random
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from builders import method, write_benchmark
from conftest import rows_of
from wrong_values import KINDS, Place, cases, changed, ending_of, places_in, write

from adamerge.cli import main
from adamerge.commands.bench import bench
from adamerge.commands.compress import compress, decompress
from adamerge.commands.convert import convert
from adamerge.commands.data import data
from adamerge.commands.evolve import evolve
from adamerge.commands.inspect import inspect as inspect_command
from adamerge.commands.merge import merge
from adamerge.commands.predict import predict
from adamerge.commands.runs import demo, reproduce, verify
from adamerge.commands.table import table
from adamerge.static import METHODS

SAMPLE = 120  # cases of a run of the test suite; the others are marked fuzz
NUMERIC = "model.optimizer"  # an option that is in range may still diverge: that is exit code 4
LONG = {("trainer",)}  # without settings a run takes all its steps


class World:
    """A working folder with a benchmark, a method and what commands read; outputs go to `out`."""

    def __init__(self, root: Path, clip: Path, pictures: Path) -> None:
        self.clip, self.pictures, self.root = clip, pictures, root
        self.benchmark = write_benchmark(root / "inputs", clip, rows_of(pictures))
        self.case, self.folder = root / "inputs" / "case.yaml", root / "work"
        self.folder.mkdir()
        os.mkfifo(root / "inputs" / "pipe.yaml")

    def resolved(self) -> dict[str, Any]:
        """Return the resolved configuration of a run: every key, with a value that works."""
        run = self.root / "inputs" / "run"
        one = ["--trainer.max_steps", "1", "--trainer.accelerator", "cpu"]
        assert main(["fit", "--config", str(self.benchmark), "--run_dir", str(run), *one]) == 0
        return yaml.safe_load((run / "config.yaml").read_text()) | {"run_dir": "out"}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, clip: Path, pictures: Path) -> World:
    return World(tmp_path_factory.mktemp("world"), clip, pictures)


@pytest.fixture(scope="module")
def document(world: World) -> dict[str, Any]:
    return world.resolved()


@pytest.fixture(autouse=True)
def _inside(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in the world's folder, as users see messages: annotations are not checked."""
    monkeypatch.chdir(world.folder)
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)


@pytest.fixture
def whole(request: pytest.FixtureRequest) -> None:
    """Leave out what takes minutes, unless it was asked for."""
    if "fuzz" not in request.config.option.markexpr:
        pytest.skip("all cases: pytest -m fuzz tests/test_wrong_values.py")


def _clean(folder: Path) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _problems(
    world: World, arguments_of: Mapping[str, list[str]], capsys: pytest.CaptureFixture[str], allowed: str = ""
) -> list[str]:
    """Run all cases; return those that did not end as they must."""
    found = []
    for name, arguments in arguments_of.items():
        ending = ending_of(arguments, capsys)
        _clean(world.folder)
        problem = ending.problem()
        if problem and not (ending.code == 4 and allowed and name.startswith(allowed)):
            found.append(f"{name}: {problem}: {ending.message[:300]}")
    return found


def _name(place: Place, kind: str) -> str:
    return f"{'.'.join(place)} <- {kind}"


def _own_places(document: Mapping[str, Any]) -> list[Place]:
    """Return every key once: what holds for one task and expert holds for the others."""
    return [p for p in places_in(document) if not {"bars", "dots"} & set(p) and p not in LONG]


def _fuzz_fit(
    world: World,
    document: Mapping[str, Any],
    chosen: list[tuple[Place, str]],
    capsys: pytest.CaptureFixture[str],
) -> list[str]:
    found = []
    for place, kind in chosen:
        write(world.case, changed(document, place, KINDS[kind]))
        arguments = ["fit", "--config", str(world.case)]
        found += _problems(world, {_name(place, kind): arguments}, capsys, NUMERIC)
    return found


def test_every_key_of_a_run(
    world: World, document: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = cases(_own_places(document), 1, seed=int(os.environ.get("GITHUB_RUN_NUMBER", "1")))
    chosen = random.Random(0).sample(chosen, min(SAMPLE, len(chosen)))
    assert len({kind for _, kind in chosen}) > 20
    problems = _fuzz_fit(world, document, chosen, capsys)
    assert not problems, "\n".join(problems)


@pytest.mark.fuzz
@pytest.mark.usefixtures("whole")
def test_every_key_of_a_run_with_many_kinds(
    world: World, document: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = cases(_own_places(document), 5, seed=0)
    assert len(chosen) > 400
    problems = _fuzz_fit(world, document, chosen, capsys)
    assert not problems, "\n".join(problems)


COMMANDS: dict[str, tuple[Callable[..., int], tuple[str, ...]]] = {
    "bench": (bench, ("run", "{benchmark}", "--methods", "average", "--out", "out")),
    "merge": (merge, ("task_arithmetic", "{base}", "{experts}", "--out", "out")),
    "inspect": (inspect_command, ("{base}", "{experts}", "--rank", "false")),
    "compress": (compress, ("{base}", "{expert}", "--out", "out")),
    "decompress": (decompress, ("{base}", "--file", "{weights}", "--out", "out")),
    "data": (data, ("check", "--benchmark", "{benchmark}")),
    "predict": (predict, ("--model", "nowhere", "--data", "nowhere", "--out", "out.parquet")),
    "table": (table, ("nowhere",)),
    "verify": (verify, ("nowhere",)),
    "reproduce": (reproduce, ("nowhere",)),
    "convert": (convert, ("nowhere.pt",)),
    "evolve": (evolve, ("{benchmark}", "--generations", "1", "--population", "4", "--out", "out")),
    "demo": (demo, ("--out", "nowhere/\0")),
}


def _words(world: World, words: tuple[str, ...]) -> list[str]:
    """Return a command line that works, with the paths of the world."""
    given = {
        "{benchmark}": [str(world.benchmark)],
        "{base}": ["--base", str(world.clip / "base")],
        "{experts}": ["--experts", f"dots={world.clip / 'experts' / 'dots.safetensors'}"],
        "{expert}": ["--expert", str(world.clip / "experts" / "dots.safetensors")],
        "{weights}": [str(world.clip / "experts" / "dots.safetensors")],
    }
    return [part for word in words for part in given.get(word, [word])]


def _as_words(value: Any) -> str:
    """Return a value as a shell could pass it."""
    if isinstance(value, str):
        return value.replace("\0", "")
    return yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("\n...\n").strip()


def _command_cases(world: World, each: int, seed: int) -> dict[str, list[str]]:
    """Put wrong values behind every option of every other command."""
    found: dict[str, list[str]] = {}
    for command, (function, words) in COMMANDS.items():
        options = [name for name in inspect.signature(function).parameters if name != "method"]
        options = [name for name in options if name not in ("action", "options")]
        options = [name for name in options if (command, name) != ("demo", "out")]  # any name is a folder's
        for (option,), kind in cases([(name,) for name in options], each, seed):
            given = [*_words(world, words), f"--{option}={_as_words(KINDS[kind])}"]
            found[_name((command, option), kind)] = [command, *given]
    return found


def _method_cases(world: World, each: int, seed: int) -> dict[str, list[str]]:
    """Put wrong values behind every option of every static method."""
    generator, found = random.Random(seed), {}
    line = _words(world, ("{base}", "{experts}", "--out", "out"))
    more = ["--experts", f"bars={world.clip / 'experts' / 'bars.safetensors'}"]
    for name, row in METHODS.items():
        if row.statistics:
            continue
        for option in row.options:
            for kind in generator.sample(sorted(KINDS), each):
                value = _as_words(KINDS[kind])
                found[_name(("merge", name, option), kind)] = [
                    *("merge", name, *line, *more),
                    f"--{option}={value}",
                ]
    return found


def test_every_option_of_the_other_commands(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = _command_cases(world, 1, 3)
    problems = _problems(world, chosen, capsys)
    assert not problems, "\n".join(problems)


def test_some_options_of_static_methods(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = _method_cases(world, 1, 5)
    names = random.Random(5).sample(sorted(chosen), 25)
    assert _problems(world, {name: chosen[name] for name in names}, capsys) == []


@pytest.mark.fuzz
@pytest.mark.usefixtures("whole")
def test_every_option_of_the_other_commands_with_many_kinds(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = _command_cases(world, 4, 0) | _method_cases(world, 3, 0)
    assert len(chosen) > 400
    problems = _problems(world, chosen, capsys)
    assert not problems, "\n".join(problems)


def _bomb(depth: int = 9) -> str:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, depth)]
    return "\n".join(lines) + "\n"


FILES: dict[str, bytes] = {
    "utf-16": "model: {base: x}\n".encode("utf-16"),
    "latin-1": "model: {base: Bäse}\n".encode("latin-1"),
    "binary": bytes(range(256)) * 4,
    "bomb": _bomb().encode(),
    "deep": b"[" * 5000,
    "deep blocks": ("".join(" " * i + f"k{i}:\n" for i in range(300))).encode(),
    "list": b"- model\n- data\n",
    "scalar": b"model\n",
    "number": b"3\n",
    "twice": b"model: {}\nmodel: {}\n",
    "tab": b"model:\n\tbase: x\n",
    "two documents": b"model: {}\n---\ndata: {}\n",
    "tag": b"model: !!python/object/apply:os.getcwd []\n",
    "numbers as keys": b"1: 2\n",
    "null key": b"null: 2\n",
    "list as key": b"? [1, 2]\n: 3\n",
    "self": b"model: &a {base: *a}\n",
    "unfinished": b"model: {base: 'x\n",
    "merge key": b"<<: 3\n",
    "nul": b"model: {base: \x00}\n",
    "long number": b"seed_everything: " + b"9" * 5000 + b"\n",
}


@pytest.mark.parametrize("content", FILES.values(), ids=list(FILES))
def test_files_that_are_no_configuration(
    content: bytes, world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    world.case.write_bytes(content)
    for line in (
        ["fit", "--config", str(world.benchmark), "--config", str(world.case)],
        ["bench", "run", str(world.case), "--out", "out", "--methods", "average"],
        ["data", "check", "--benchmark", str(world.benchmark), "--manifest", str(world.case)],
        ["merge", "average", "--config", str(world.case)],
    ):
        ending = ending_of(line, capsys)
        assert (ending.problem(), ending.code) == ("", 2), f"{line[0]}: {ending}"


def test_what_is_no_file_is_never_waited_for(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    pipe = world.root / "inputs" / "pipe.yaml"
    for path in (str(pipe), "/dev/zero", str(world.folder), "nowhere.yaml", "x" * 5000):
        for line in (
            ["fit", "--config", path],
            ["bench", "run", path, "--out", "out"],
            ["bench", "run", str(world.benchmark), "--methods", f"{path}.yaml", "--out", "out"],
            ["data", "check", "--benchmark", str(world.benchmark), "--manifest", path],
            ["merge", "average", "--config", path],
        ):
            ending = ending_of(line, capsys, 5)
            assert (ending.problem(), ending.code) == ("", 2), f"{line[0]} {path[:20]}: {ending}"


def test_a_byte_order_mark_changes_nothing_and_an_empty_file_is_told(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    world.case.write_bytes(b"\xef\xbb\xbf" + world.benchmark.read_bytes())
    line = ["bench", "run", str(world.case), "--out", "out", "--methods", "average"]
    assert ending_of(line, capsys).code == 0
    fit_line = ["fit", "--config", str(world.case), "--run_dir", "run", "--trainer.max_steps", "1"]
    ending = ending_of(fit_line, capsys)
    assert ending.code == 0, ending
    world.case.write_bytes(b"# nothing\n")
    ending = ending_of(fit_line, capsys)
    assert (ending.problem(), ending.code) == ("", 2)
    assert "case.yaml is empty." in ending.message
    _clean(world.folder)


NAMES = ["two\nlines", "base", "step", "mean", "nul\0", "", " dots", "a/b", "[red]", ".hidden", "x" * 300]
NAMES += ["shared model", "task", "\u2028", "a:b", 1, True, None, 2.5]


@pytest.mark.parametrize("name", NAMES, ids=repr)
def test_names_that_no_file_or_table_can_have(
    name: object, world: World, document: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    other = changed(document, ("data", "tasks"), {name: document["data"]["tasks"]["dots"]})
    other["model"]["experts"] = {name: document["model"]["experts"]["dots"]}
    write(world.case, other)
    for line in (
        ["fit", "--config", str(world.case)],
        ["bench", "run", str(world.case), "--out", "out", "--methods", "average"],
        ["data", "check", "--benchmark", str(world.case)],
    ):
        ending = ending_of(line, capsys)
        assert (ending.problem(), ending.code) == ("", 2), f"{line[0]}: {ending}"


TOGETHER = [
    (["--trainer.devices", "99"], "99 processes for 3 tasks"),
    (["--trainer.num_nodes", "5"], "5 processes for 3 tasks"),
    (["--trainer.precision", "64-true"], "would round the coefficients"),
    (["--trainer.accumulate_grad_batches", "3"], "a step is one batch of every task"),
    (["--trainer.limit_train_batches", "0"], "trainer.limit_train_batches=0 is out of range"),
    (["--trainer.overfit_batches", "2"], "trainer.overfit_batches=2"),
    (["--trainer.val_check_interval", "0.5"], "trainer.val_check_interval=0.5"),
    (["--trainer.gradient_clip_algorithm", "nonsense"], "gradient_clip"),
    (["--trainer.max_steps", "-1"], "trainer.max_steps=-1"),
    (["--trainer.max_steps", "1" * 30], "trainer.max_steps=1111"),
    (
        ["--seed_everything", "-3"],
        "seed_everything=-3 is out of range.\nUse true or false or a whole",
    ),
    (["--data.num_workers", "-1"], "num_workers=-1 is out of range.\nUse a whole number in [0, 256]"),
    (["--data.cache", "null"], "data.cache is missing."),
    (["--model.optimizer.init_args.lr", ".nan"], "optimizer"),
    (["--model.optimizer.init_args.lr", "-1"], "optimizer: Invalid learning rate: -1"),
    (["--model.optimizer.init_args.weight_decay", ".inf"], "weight_decay=inf is not finite"),
    (["--model.optimizer.init_args.differentiable", "true"], "optimizer"),
    (["--model.objective.init_args.temperature", "1e-300"], "temperature=1e-300 is out of range"),
    (["--model.recalibrate", "-1"], "recalibrate=-1 is out of range"),
    (["--run_dir", ""], "run_dir='' cannot be a path"),
    (["--run_dir", "/dev/null/x"], "/dev/null is no folder"),
    (["--method", "two\nlines"], "cannot be a title"),
]


@pytest.mark.parametrize(("more", "reason"), TOGETHER, ids=lambda value: str(value)[:50])
def test_what_cannot_be_names_key_value_and_range(
    more: list[str], reason: str, world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["fit", "--config", str(world.benchmark), "--run_dir", "run", "--trainer.max_steps", "1", *more]
    ending = ending_of(line, capsys)
    assert (ending.problem(), ending.code) == ("", 2), ending
    assert reason in ending.message


def test_runs_leave_their_process_as_it_was(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    before, generator = os.environ.copy(), torch.get_rng_state()
    line = ["fit", "--config", str(world.benchmark), "--run_dir", "run", "--trainer.max_steps", "1"]
    ending = ending_of([*line, "--trainer.deterministic", "true", "--trainer.detect_anomaly", "true"], capsys)
    assert (ending.problem(), ending.code) == ("", 0), ending
    assert os.environ == before
    assert torch.equal(torch.get_rng_state(), generator)
    _clean(world.folder)


def test_classes_of_ones_own_lie_beside_the_file_or_in_the_working_folder(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    beside = world.root / "inputs" / "beside_it.py"
    beside.write_text("from adamerge import Entropy\n\n\nclass Own(Entropy):\n    pass\n")
    Path("in_folder.py").write_text(beside.read_text())
    Path("broken_module.py").write_text("import no_such_library\n")
    own = yaml.safe_load(method("adamerging_layer_wise").read_text())
    bench_line = ["bench", "run", str(world.benchmark), "--out", "out", "--methods", f"average,{world.case}"]
    short = ["--trainer.max_steps", "1"]
    fit_line = ["fit", "--config", str(world.benchmark), "--config", str(world.case), "--run_dir", "run"]
    expected = {
        "beside_it.Own": "",
        "in_folder.Own": "",
        "beside_it.Owm": "there is no class 'beside_it.Owm'",
        "no_where.Own": "there is no module 'no_where'",
        "broken_module.Own": "module 'broken_module' cannot be imported: ModuleNotFoundError",
        "os.getcwd": "os.getcwd",
    }
    for path, reason in expected.items():
        own["model"]["objective"] = {"class_path": path}
        write(world.case, own)
        for line in ([*bench_line, *short], [*fit_line, *short]):
            ending = ending_of(line, capsys)
            assert (ending.code, ending.problem()) == (2 if reason else 0, ""), f"{line} {ending}"
            assert reason in ending.message
            for folder in ("out", "run"):
                shutil.rmtree(folder, ignore_errors=True)
    own["model"]["objective"] = {"class_path": "beside_it.Own", "init_args": {"nonsense": 1}}
    write(world.case, own)
    ending = ending_of(bench_line, capsys)
    assert (ending.code, ending.problem()) == (2, ""), ending
    assert "no option 'nonsense'" in ending.message
    _clean(world.folder)
