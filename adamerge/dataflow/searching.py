"""The search for a path: generations of CMA-ES or of random points, resumable, no path judged twice."""

import hashlib
import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from adamerge.atomic import atomic_file
from adamerge.dataflow.flow import Flow
from adamerge.dataflow.genome import Genome
from adamerge.errors import InputError
from adamerge.optimizers import CMAES, CoefficientOptimizer, RandomSearch
from adamerge.progress import track

Method = Literal["cmaes", "random"]
_METHODS: dict[str, type[CMAES] | type[RandomSearch]] = {"cmaes": CMAES, "random": RandomSearch}


class Found(NamedTuple):
    """What a search found.

    Attributes:
        flow: The best path of all that were judged; model A itself is one of them.
        loss: Its loss.
        history: The best loss so far, at the start and after each generation.
        judged: Number of different paths that were judged.
    """

    flow: Flow
    loss: float
    history: list[float]
    judged: int


def search(
    fitness: Callable[[Flow], float],
    blocks: str,
    genome: Genome,
    generations: int,
    *,
    method: Method = "cmaes",
    population: int | None = None,
    sigma: float = 0.1,
    seed: int = 0,
    state: Path | None = None,
    inputs: Any = None,
    settings: Mapping[str, Any] | None = None,
) -> Found:
    """Search for the path of least loss.

    Args:
        fitness: Gives a path's loss; it must be a function of the path alone.
        blocks: Name of the list of blocks.
        genome: What is varied.
        generations: How many.
        method: "cmaes", or "random": independent points around the start, to compare with.
        population: Points of a generation; default: 4 + floor(3 ln n) for n genes.
        sigma: Standard deviation of the first points around the start.
        seed: Seed of the points.
        state: A file that holds the search after each generation; a search that finds it goes on there.
        inputs: What the fitness depends on, as JSON writes it: another one refuses to go on.
        settings: More of it, which searches of older versions have not kept and are not asked for.

    Raises:
        InputError: An option is out of its range, or the file is of another search.
        EnvironmentProblem: `cmaes` is not installed.
    """
    if method not in _METHODS or generations < 1:
        raise InputError(
            f"method={method!r}, generations={generations}.", f"Methods are {', '.join(_METHODS)}; 1 or more."
        )
    values = nn.Parameter(genome.start(abs(sigma)))
    optimizer = _METHODS[method]([values], sigma, population=population, seed=seed)
    asked = [repr(genome), blocks, method, optimizer.size(genome.size), sigma, seed, inputs]
    run = _Run(fitness, partial(genome.flow, blocks), values, optimizer)
    run.key = _digest(json.dumps(asked, sort_keys=True))
    run.settings = json.dumps(settings or {}, sort_keys=True)
    if state is not None and state.exists():
        run.resume(state)
    else:
        run.judge()
        run.history.append(run.least)
    for _ in track(range(generations - len(run.history) + 1), "Searching paths"):
        optimizer.step(run.judge)
        run.history.append(run.least)
        if state is not None:
            run.save(state)
    return Found(run.best, run.least, run.history, len(run.losses))


class _Run:
    """A search under way: the values that an optimizer moves, what was judged, and the best of it."""

    def __init__(
        self,
        fitness: Callable[[Flow], float],
        flow_of: Callable[[Any], Flow],
        values: nn.Parameter,
        optimizer: CoefficientOptimizer,
    ) -> None:
        self.fitness, self.flow_of, self.values, self.optimizer = fitness, flow_of, values, optimizer
        self.key, self.settings, self.least = "", "{}", float("inf")
        self.best = Flow("", ())
        self.losses: dict[str, float] = {}
        self.history: list[float] = []

    def judge(self) -> float:
        """Give the loss of the path that the values stand for."""
        flow = self.flow_of(self.values.detach()[0].numpy())
        name = _digest(repr(flow))
        if name not in self.losses:
            self.losses[name] = self.fitness(flow)
        if self.losses[name] < self.least or not self.best.steps:
            self.least, self.best = self.losses[name], flow
        return self.losses[name]

    def save(self, file: Path) -> None:
        """Write all that the next generation depends on."""
        saved = {name: getattr(self, name) for name in ("key", "settings", "least", "losses", "history")}
        saved |= {"values": self.values.detach(), "optimizer": self.optimizer.state_dict()}
        with atomic_file(file) as temporary:
            torch.save(saved | {"best": json.dumps(self.best.document())}, temporary)

    def resume(self, file: Path) -> None:
        """Go on where `save` was called.

        Raises:
            InputError: The file is damaged, or of another search.
        """
        try:
            saved = torch.load(file, weights_only=True)
            if saved["key"] != self.key:
                raise InputError(
                    f"{file} is of another search.", "Choose another folder, or remove the file."
                )
            if saved.get("settings", self.settings) != self.settings:
                raise InputError(
                    f"{file}: configurations of the models have changed since the search began.",
                    "Restore them, choose another folder, or remove the file.",
                )
            self.optimizer.load_state_dict(saved["optimizer"])
            self.best = Flow.read(json.loads(saved["best"]))
            self.least, self.losses, self.history = (saved[n] for n in ("least", "losses", "history"))
            with torch.no_grad():
                self.values.copy_(saved["values"])
        except InputError:
            raise
        except Exception as error:  # whatever torch stumbles over, the file is what is wrong
            raise InputError(f"{file} is damaged: {type(error).__name__}.", "Remove it.") from error


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
