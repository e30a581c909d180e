"""Kills commands at random moments, and tells whether what they leave is whole and can be completed.

    python scripts/kill_runs.py --kills 60 --folder /var/tmp/kills --temporary /dev/shm/kills --json

Commands: short runs of ten method files of configs/methods, a run that replaces another, merge, compress,
convert, bench, demo (three of its rows), predict. Each is run once undisturbed. Then, for every kill, it
starts in a fresh folder, gets SIGKILL, SIGTERM or SIGINT after a random part of the time that it took, and is
started again as its own message says. What is compared with the undisturbed outcome:

- `codes`: -9 of SIGKILL, 130 of the others; 0 where the command was faster than the signal;
- `equal`: coefficients, weights, curves, predictions and tables are the same, bit for bit;
- `stray`: files that the undisturbed command does not leave, in the folder or beside it.

Processes are forked from one that has imported everything; every tenth is one of its own, which may be killed
while it imports. TMPDIR is --temporary, which should lie on another file system than --folder.
"""

import argparse
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

METHODS = (
    "default",
    "adamerging_task_wise",
    "adamerging_layer_wise",
    "adamerging_pp_layer_wise",
    "reliable_layer_wise",
    "kl_prior_layer_wise",
    "fw_layer_wise",
    "concrete_layer_wise",
    "surgery_average",
    "twin_merging",
)
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
TASKS = ("mnist", "digits", "letters")
_COMPARED = (".safetensors", ".csv", ".parquet")
_SERVER = multiprocessing.get_context("forkserver")
_IMPORTS = (
    "adamerge.fitting",
    "adamerge.commands.merge",
    "adamerge.commands.runs",
    "adamerge.commands.bench",
)
_IMPORTS += (
    "adamerge.commands.compress",
    "adamerge.commands.convert",
    "adamerge.commands.predict",
    "open_clip",
)


class Case(NamedTuple):
    """A command, and how it goes on.

    Attributes:
        name: What is killed.
        arguments: Its command line, relative to a folder of its own.
        again: The command line that completes it after a kill.
        before: What is done in the folder first.
    """

    name: str
    arguments: list[str]
    again: Callable[[Path], list[str]]
    before: Callable[[Path], None] = lambda folder: None


def main() -> None:
    """Read the command line, kill, tell."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--only", nargs="*", default=[], help="cases whose names begin so")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "adamerge-kills")
    parser.add_argument("--temporary", type=Path, help="TMPDIR of the commands")
    parser.add_argument("--json", action="store_true", help="print one JSON list instead of a table")
    options = parser.parse_args()
    folder, temporary = options.folder.absolute(), (options.temporary or options.folder / "tmp").absolute()
    folder.mkdir(parents=True)
    temporary.mkdir(parents=True, exist_ok=True)
    try:
        rows = kill_all(options.kills, options.only, options.seed, folder, temporary)
    finally:
        shutil.rmtree(folder)
        shutil.rmtree(temporary, ignore_errors=True)
    print(json.dumps(rows, indent=1) if options.json else table(rows))
    sys.exit(any(row["wrong"] for row in rows))


def kill_all(
    kills: int, only: Sequence[str], seed: int, folder: Path, temporary: Path
) -> list[dict[str, Any]]:
    """Kill in turn, and give a row per case."""
    _SERVER.set_forkserver_preload(list(_IMPORTS))
    os.environ |= {
        "TMPDIR": str(temporary),
        "ADAMERGE_CACHE": str(folder / "cache"),
        "WANDB_MODE": "disabled",
    }
    moments = random.Random(seed)
    world = prepare(folder / "world")
    listed = [case for case in cases(world) if not only or case.name.startswith(tuple(only))]
    rows: dict[str, dict[str, Any]] = {}
    expected: dict[str, tuple[float, dict[str, bytes], set[str]]] = {}
    for kill in range(kills):
        case = listed[kill % len(listed)]
        if case.name not in expected:
            expected[case.name] = undisturbed(case, folder / "expected" / case.name)
            rows[case.name] = {"case": case.name, "kills": 0, "codes": [], "resumed": 0, "wrong": []}
        row, sign = rows[case.name], SIGNALS[(kill % len(listed) + kill // len(listed) + seed) % 3]
        place = folder / f"kill{kill}"
        apart = kill % 10 == 9 and case.name != "demo"  # which is shortened in forked processes alone
        problems = one_kill(case, place, sign, moments, expected=expected[case.name], row=row, apart=apart)
        row["wrong"] += [f"kill {kill}, {sign.name}: {problem}" for problem in problems]
        sys.stderr.write(f"{kill + 1}/{kills} {case.name} {sign.name}: {problems or row['codes'][-1]}\n")
        if not problems:
            shutil.rmtree(place)
    return list(rows.values())


def prepare(world: Path) -> Path:
    """Make the inputs: a benchmark of three tasks, a pickled checkpoint, a merged model."""
    import torch

    from adamerge.checkpoints import locate, open_checkpoint

    world.mkdir()
    tasks = {t: {"adapt": f"embedded:{t}/adapt", "test": f"embedded:{t}/test"} for t in TASKS}
    document = {
        "model": {"base": "embedded:base", "experts": {task: f"embedded:{task}" for task in TASKS}},
        "data": {"batch_size": 4, "shots": 40, "tasks": tasks},
    }
    (world / "benchmark.yaml").write_text(yaml.safe_dump(document))
    state = open_checkpoint(locate("embedded:base"), role="base")
    torch.save({name: state[name].clone() for name in state}, world / "old.pt")
    merge = ["merge", "average", "--base", "embedded:base", *experts(), "--out", str(world / "model")]
    fit = fit_arguments(world, "adamerging_layer_wise")
    for arguments in (merge, [*fit, "--run_dir", str(world / "run")]):
        code, log = ended(start(arguments, world, world / "log")), (world / "log").read_text()
        if code:
            raise RuntimeError(log)
    return world


def experts() -> list[str]:
    """Give the options that name the experts."""
    return [word for task in TASKS for word in ("--experts", f"{task}=embedded:{task}")]


def fit_arguments(world: Path, method: str) -> list[str]:
    """Give the command line of a short run."""
    file = Path(__file__).parents[1] / "configs" / "methods" / f"{method}.yaml"
    learns = yaml.safe_load(file.read_text()).get("trainer", {}).get("max_steps", 1) != 0
    steps = ["--trainer.max_steps", "12" if learns else "0"]
    files = ["--config", str(world / "benchmark.yaml"), "--config", str(file)]
    return ["fit", *files, *steps, "--save_every", "4", "--evaluate_experts", "false"]


def cases(world: Path) -> list[Case]:
    """Give all cases; those of the rarer commands stand between the runs."""

    def resume(*arguments: str) -> Callable[[Path], list[str]]:
        return lambda _: [*arguments, "--ckpt_path", "last"]

    def repeat(*arguments: str) -> Callable[[Path], list[str]]:
        return lambda _: list(arguments)

    runs = []
    for method in METHODS:
        fit = [*fit_arguments(world, method), "--run_dir", "run"]
        runs.append(Case(f"fit {method}", fit, resume(*fit)))
    fit = [*fit_arguments(world, "default"), "--run_dir", "run", "--overwrite", "true"]
    copy = lambda folder: shutil.copytree(world / "run", folder / "run")  # noqa: E731
    rest = [Case("fit over an old run", fit, resume(*fit), copy)]
    merge = ["merge", "ties", "--base", "embedded:base", *experts(), "--out", "merged", "--overwrite"]
    old = lambda folder: shutil.copytree(world / "model", folder / "merged")  # noqa: E731
    rest.append(Case("merge over an old model", merge, repeat(*merge), old))
    compress = ["compress", "--base", "embedded:base", "--expert", "embedded:mnist", "--out", "a.safetensors"]
    rest.append(Case("compress", compress, repeat(*compress, "--overwrite")))
    convert = ["convert", str(world / "old.pt"), "--out", "new.safetensors"]
    rest.append(Case("convert", convert, repeat(*convert, "--overwrite")))
    methods = "individual,average,adamerging_layer_wise,smile"
    bench = ["bench", "run", str(world / "benchmark.yaml"), "--methods", methods, "--out", "table"]
    bench += ["--trainer.max_steps", "8", "--trainer.accelerator", "cpu"]
    rest.append(Case("bench", bench, repeat(*bench)))
    rest.append(Case("demo", ["demo", "--out", "demo"], repeat("demo", "--out", "demo")))
    predict = ["predict", "--model", str(world / "run" / "merged"), "--data", "embedded:mnist/test"]
    predict += ["--out", "found.parquet"]
    rest.append(Case("predict", predict, repeat(*predict, "--overwrite")))
    return [*runs, *rest]


def undisturbed(case: Case, folder: Path) -> tuple[float, dict[str, bytes], set[str]]:
    """Run a case twice, for its time without what only the first start costs; give what it leaves."""
    for _ in range(2):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        case.before(folder)
        began = time.monotonic()
        code = ended(start(case.arguments, folder, folder.with_suffix(".log")))
        seconds = time.monotonic() - began
        if code:
            raise RuntimeError(folder.with_suffix(".log").read_text())
    return seconds, contents(folder), names(folder)


def one_kill(
    case: Case,
    place: Path,
    sign: signal.Signals,
    moments: random.Random,
    *,
    expected: tuple[float, dict[str, bytes], set[str]],
    row: dict[str, Any],
    apart: bool,
) -> list[str]:
    """Kill once, complete, and say what is wrong."""
    seconds, outcome, files = expected
    place.mkdir()
    case.before(place)
    log = place.with_suffix(".log")
    code = killed(case, place, sign, moments.uniform(0, 1.05 * seconds), log, apart=apart)
    told = log.read_text()
    row["kills"] += 1
    row["codes"].append(code)
    problems = [] if code in (0, -9 if sign == signal.SIGKILL else 130) else [f"code {code}: {told[-500:]}"]
    if code == 130 and ("Traceback" in told or "adamerge: interrupted." not in told):
        problems.append(f"told: {told[-300:]}")
    if code:
        row["resumed"] += 1
        code = ended(start(case.again(place), place, log))
        problems += [f"again: code {code}: {log.read_text()[-500:]}"] if code else []
    found = contents(place)
    changed = [name for name in outcome if found.get(name) != outcome[name]]
    problems += [f"not equal: {changed}"] if changed else []
    stray = names(place) - files
    problems += [f"stray: {sorted(stray)[:5]}"] if stray else []
    return problems


def killed(
    case: Case, place: Path, sign: signal.Signals, seconds: float, log: Path, *, apart: bool
) -> int | None:
    """Start a case, send a signal after some time, and give the exit code."""
    if apart:
        command = [sys.executable, "-m", "adamerge", *case.arguments]
        with (
            log.open("wb") as stream,
            subprocess.Popen(command, cwd=place, stdout=stream, stderr=stream) as one,
        ):
            time.sleep(0.3 + seconds)
            one.send_signal(sign)
            return one.wait(300)
    process = start(case.arguments, place, log)
    while process.exitcode is None and not (place / ".begun").exists():
        time.sleep(0.002)
    (place / ".begun").unlink(missing_ok=True)
    time.sleep(seconds)
    if process.exitcode is None and process.pid is not None:
        os.kill(process.pid, sign)
    return ended(process)


def start(arguments: list[str], folder: Path, log: Path) -> Any:
    """Start a command in a process that has imported everything."""
    process = _SERVER.Process(target=_run, args=(arguments, str(folder), str(log), dict(os.environ)))
    process.start()
    return process


def ended(process: Any, seconds: float = 600) -> int | None:
    """Wait for a process, and give its exit code."""
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
    return process.exitcode


def _run(arguments: list[str], folder: str, log: str, environment: dict[str, str]) -> None:
    os.chdir(folder)
    os.environ.update(environment)
    tempfile.tempdir = None
    signal.signal(signal.SIGINT, signal.default_int_handler)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for number in (1, 2):
        os.dup2(descriptor, number)
    sys.argv = ["adamerge", *arguments]
    from adamerge import cli

    if arguments[0] == "demo":
        _shorten_the_demo()
    dispatch = cli._dispatch

    def announced(given: list[str]) -> int:
        Path(folder, ".begun").touch()
        return dispatch(given)

    cli._dispatch = announced
    code = cli.main()
    Path(folder, ".begun").unlink(missing_ok=True)
    sys.exit(code)


def _shorten_the_demo() -> None:
    from adamerge.benchmarks import run
    from adamerge.commands import runs

    fit = run.run
    run.run = lambda arguments: fit([*arguments, "--trainer.max_steps", "4"])
    runs.DEMO_METHODS = ("individual", "average", "default")


def contents(folder: Path) -> dict[str, bytes]:
    """Give what is compared of all files, by their paths."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        is_ours = path.suffix in _COMPARED and "statistics" not in name
        if path.is_file() and not path.is_symlink() and is_ours:
            found[name] = path.read_bytes()
    return found


def names(folder: Path) -> set[str]:
    """Give the paths of all files but the logs of loggers."""
    paths = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}
    return {name for name in paths if "wandb" not in name and name != ".begun"}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Give the rows in Markdown."""
    lines = ["| command | kills | exit codes | completed afterwards | wrong |", "|---|---|---|---|---|"]
    for row in rows:
        codes = {code: row["codes"].count(code) for code in sorted(set(row["codes"]))}
        told = ", ".join(f"{count} of {code}" for code, count in codes.items())
        lines.append(f"| {row['case']} | {row['kills']} | {told} | {row['resumed']} | {len(row['wrong'])} |")
    wrong = [f"- {row['case']}: {problem}" for row in rows for problem in row["wrong"]]
    return "\n".join([*lines, *wrong])


if __name__ == "__main__":
    main()
