"""Processes of their own for runs that are killed: forked from a server that has imported everything once."""

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["adamerge.fitting", "adamerge.commands.merge", "open_clip"])


def start(arguments: list[str], log: Path, at: tuple[int, signal.Signals] | None = None) -> ForkServerProcess:
    """Start a command as `adamerge` does.

    Args:
        arguments: The command line.
        log: Where its output goes.
        at: A step of a run, and the signal that the process gets soon after it.
    """
    process = _SERVER.Process(target=_run, args=(arguments, log, at, dict(os.environ), os.getcwd()))
    process.start()
    return process


def exit_code(process: ForkServerProcess, seconds: float = 120) -> int:
    """Wait for a process."""
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
        raise TimeoutError(f"the process did not end within {seconds} s")
    return process.exitcode


def launch(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a command in a process whose program it is: what is distributed starts itself again."""
    command = [sys.executable, "-m", "adamerge", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)


def _run(
    arguments: list[str], log: Path, at: tuple[int, signal.Signals] | None, environment: Any, folder: str
) -> None:
    os.chdir(folder)
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background ignores Ctrl-C
    with log.open("wb") as stream:
        for descriptor in (1, 2):
            os.dup2(stream.fileno(), descriptor)
    sys.argv = ["adamerge", *arguments]
    from adamerge.cli import main

    if at is not None:
        _signal_after(*at)
    sys.exit(main(arguments))


def _signal_after(step: int, sign: signal.Signals) -> None:
    """Send this process a signal at some moment of the steps that follow the given one."""
    from adamerge.callbacks import Curves

    append, delay = Curves.on_train_batch_end, random.uniform(0, 0.05)

    def appended(self: Curves, trainer: Any, *more: Any) -> None:
        append(self, trainer, *more)
        if trainer.global_step == step:
            threading.Timer(delay, os.kill, (os.getpid(), sign)).start()

    Curves.on_train_batch_end = appended


def kill_after(process: ForkServerProcess, seconds: float) -> None:
    """Kill a process that may have ended."""
    time.sleep(seconds)
    process.kill()
    process.join()
