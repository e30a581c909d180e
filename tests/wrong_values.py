"""Wrong values of every kind, and how a command that was given one must end."""

import os
import random
import signal
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from adamerge.cli import main

SECONDS = 20  # that a refusal may take
Place = tuple[str, ...]


def _deep(depth: int) -> list[Any]:
    nested: list[Any] = []
    for _ in range(depth):
        nested = [nested]
    return nested


KINDS: dict[str, Any] = {
    "null": None,
    "true": True,
    "false": False,
    "zero": 0,
    "minus one": -1,
    "minus many": -(10**9),
    "ten thousand digits": 10**30,
    "half": 0.5,
    "negative": -0.25,
    "nan": float("nan"),
    "infinity": float("inf"),
    "minus infinity": float("-inf"),
    "beyond fp32": 1e300,
    "below fp32": 1e-300,
    "text": "nonsense",
    "nothing": "",
    "spaces": "   ",
    "line break": "two\nlines",
    "nul": "nul\0character",
    "right to left": "\u202etxt",
    "long": "x" * 5000,
    "folder": "/tmp",
    "missing": "/nowhere/at/all",
    "endless": "/dev/zero",
    "input": "/dev/stdin",
    "number as text": "-1",
    "reserved": "step",
    "list": [],
    "numbers": [1, 2.5, -3],
    "mixed": ["a", None, 3],
    "mapping": {},
    "other mapping": {"nonsense": 1},
    "numbered mapping": {1: 2},
    "class": {"class_path": "no.such.Class"},
    "function": {"class_path": "os.getcwd"},
    "deep": _deep(60),
}


@dataclass(frozen=True)
class Ending:
    """How a command ended."""

    code: Any
    message: str
    remains: tuple[str, ...]
    changes: tuple[str, ...]

    def problem(self) -> str:
        """Return what is wrong with it; nothing where all is as it must be."""
        lines = [line for line in self.message.splitlines() if line.strip()]
        if self.changes:
            return f"changed the process: {', '.join(self.changes)}"
        if self.code == 0:
            return ""
        if self.code not in (2, 3):
            return f"ended with {self.code}"
        if "Traceback" in self.message or not 1 <= len(lines) <= 3:
            return f"{len(lines)} lines of message"
        if max(map(len, lines)) > 700:
            return "a line of more than 700 characters"
        return f"left {', '.join(self.remains)}" if self.remains else ""


def places_in(document: Any, start: Place = ()) -> Iterator[Place]:
    """Yield the place of every value of a configuration, mappings and lists included."""
    if start:
        yield start
    if isinstance(document, Mapping):
        for key, value in document.items():
            yield from places_in(value, (*start, key))


def changed(document: Mapping[str, Any], place: Place, value: Any) -> dict[str, Any]:
    """Return a configuration with another value in one place."""
    copy = deepcopy(dict(document))
    part = copy
    for key in place[:-1]:
        part = part[key]
    part[place[-1]] = value
    return copy


def cases(places: Sequence[Place], each: int, seed: int = 0) -> list[tuple[Place, str]]:
    """Draw kinds of wrong value for every place; no place and, over many places, no kind is left out."""
    generator, names = random.Random(seed), list(KINDS)
    return [(place, kind) for place in places for kind in generator.sample(names, min(each, len(names)))]


def write(path: Path, document: Any) -> Path:
    """Write a configuration, whatever is in it."""
    path.write_text(yaml.safe_dump(document, sort_keys=False, allow_unicode=True), encoding="utf-8")
    return path


class TooLong(BaseException):
    """A command that does not end."""


@contextmanager
def _limit(seconds: float) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TooLong

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _state() -> dict[str, Any]:
    """Return what a command must leave to its process as it was."""
    return {
        "signals": (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)),
        "filters": list(warnings.filters),
        "folder": str(Path.cwd()),
        "default dtype": torch.get_default_dtype(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "anomaly": torch.is_anomaly_enabled(),
        "gradients": torch.is_grad_enabled(),
    }


def _files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def ending_of(
    arguments: Sequence[str], capsys: pytest.CaptureFixture[str], seconds: float = SECONDS
) -> Ending:
    """Run a command in the working folder, and tell how it ended and what it left there."""
    folder, state = Path.cwd(), _state()
    before = _files(folder)
    capsys.readouterr()
    code: Any
    said = ""
    try:
        with _limit(seconds), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            code = main(arguments)
    except TooLong:
        code = f"nothing in {seconds} s"
    except SystemExit as leaving:
        code = f"exit {leaving.code}"
    except BaseException as error:
        code = f"{type(error).__name__}: {str(error)[:200]}"
    said = "\n".join(
        line for line in capsys.readouterr().err.splitlines() if not line.startswith("adamerge: warning")
    )
    os.chdir(folder)
    remains = tuple(sorted(_files(folder) - before))
    after = _state()
    return Ending(code, said, remains, tuple(name for name in state if state[name] != after[name]))
