"""Search over coefficients by the loss alone: evolution strategies, and the random search to beat."""

from abc import abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

from adamerge.errors import EnvironmentProblem, InputError
from adamerge.optimizers.base import CoefficientOptimizer
from adamerge.ranges import Count, Rate, Seed, checked

Keep = Literal["mean", "best"]
Points = Float64[np.ndarray, "point coefficient"]
_MOST = 5000


class _Search(CoefficientOptimizer):
    """A step is a generation: points around a centre, each merged and judged on the same images.

    It computes no gradient: a generation costs as many merges and forward passes as it has points, and one
    more at the point where the step ends, whose loss is the one that is told.

    Args:
        params: The matrix ``[task, group]``.
        sigma: Standard deviation of the first points around the start.
        population: Points of a generation; default: 4 + floor(3 ln n) for n coefficients.
        keep: The coefficients after a step: "mean", where the search stands, which suits losses that
            differ from batch to batch; or "best", the best point of all, where every step sees the same
            images.
        seed: Seed of the points; each generation's depend on it and on the generation's number alone.

    Raises:
        InputError: An option is out of its range.
    """

    reads = "loss"

    @checked
    def __init__(
        self,
        params: Iterable[Any],
        sigma: Rate = 0.1,
        *,
        population: Count | None = None,
        keep: Keep = "mean",
        seed: Seed = 0,
    ) -> None:
        if not sigma > 0:
            raise InputError(f"sigma={sigma} is not positive.", "Use e.g. 0.1.")
        if population is not None and population < 4:  # of three the library makes one parent: 0 / 0
            raise InputError(f"population={population} is below 4.", "Leave it out: it grows with the model.")
        if keep not in ("mean", "best"):
            raise InputError(f"keep={keep!r} is unknown.", "Use 'mean' or 'best'.")
        super().__init__(params, {})
        self.sigma, self.population, self.keep, self.seed = sigma, population, keep, seed

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]  # torch overloads it
        """Judge one generation, and move.

        Returns:
            The loss at the coefficients that it leaves.

        Raises:
            InputError: There is no closure, or the coefficients are too many or not one matrix.
        """
        if closure is None:
            raise InputError(
                f"{type(self).__name__}.step() needs a closure that gives the loss.",
                "It cannot be used with precision '16-mixed', whose scaler passes none.",
            )
        values = self.values
        state = self.state[values]
        before = values.detach().clone()
        if not state:
            state |= {"generation": 0, "least": float("inf"), "best": before.clone()}
        points = self._ask(before, state)
        try:
            losses = [self._judge(closure, values, point) for point in points]
        except BaseException:  # also where a key stops it: the step has not been taken
            _put(values, before)
            raise
        state["generation"] += 1
        best = int(np.argmin(losses))
        if losses[best] < state["least"]:
            state |= {"least": losses[best], "best": torch.from_numpy(points[best]).reshape(values.shape)}
        mean = self._tell(points, losses, state)
        return self._judge(
            closure, values, state["best"].cpu().flatten().numpy() if self.keep == "best" else mean
        )

    def size(self, n: int) -> int:
        """Give the points of a generation over n coefficients."""
        return self.population or 4 + int(3 * np.log(n))

    def _judge(self, closure: Callable[[], Any], values: Tensor, point: np.ndarray) -> float:
        _put(values, torch.from_numpy(point).reshape(values.shape))
        return float(self.evaluate(closure))

    @abstractmethod
    def _ask(self, values: Tensor, state: dict[str, Any]) -> Points:
        """Give a generation's points."""

    @abstractmethod
    def _tell(self, points: Points, losses: list[float], state: dict[str, Any]) -> Float64[np.ndarray, " n"]:
        """Learn from a generation; give where the search stands."""


class CMAES(_Search):
    """Evolutionary merging in parameter space: CMA-ES over coefficients (arXiv:2403.13187).

    The published genome has a weight and a density per model and layer; this one has the weights. The
    strategy is the library `cmaes` (`pip install cmaes`); its covariance is n x n in fp64.

    Raises:
        InputError: An option is out of its range.
        EnvironmentProblem: `cmaes` is not installed.
    """

    def _ask(self, values: Tensor, state: dict[str, Any]) -> Points:
        if "strategy" not in state:
            state["strategy"] = self._begin(values.double().cpu().flatten().numpy())
        strategy = _restored(state["strategy"])
        strategy.reseed_rng(_seed(self.seed, state["generation"]))
        return np.stack([strategy.ask() for _ in range(strategy.population_size)])

    def _tell(self, points: Points, losses: list[float], state: dict[str, Any]) -> Float64[np.ndarray, " n"]:
        strategy = _restored(state["strategy"])
        strategy.tell(list(zip(points, losses, strict=True)))
        state["strategy"] = _stored(strategy)
        return strategy.mean.copy()

    def _begin(self, start: np.ndarray) -> dict[str, Any]:
        if len(start) > _MOST:
            raise InputError(
                f"CMAES over {len(start)} coefficients would take hours per step.",
                "Share coefficients: grouping='block' or 'task'.",
            )
        return _stored(_library().CMA(start, self.sigma, population_size=self.size(len(start)), seed=0))


class RandomSearch(_Search):
    """Independent points around the start: what every search must beat at as many evaluations."""

    def _ask(self, values: Tensor, state: dict[str, Any]) -> Points:
        start = state.setdefault("start", values.double().cpu())
        generator = np.random.default_rng((self.seed, state["generation"]))
        noise = generator.standard_normal((self.size(start.numel()), start.numel()))
        return start.cpu().flatten().numpy() + self.sigma * noise

    def _tell(self, points: Points, losses: list[float], state: dict[str, Any]) -> Float64[np.ndarray, " n"]:
        return state["best"].double().cpu().flatten().numpy()


@torch.no_grad()
def _put(values: Tensor, point: Tensor) -> None:
    values.copy_(point)


def _seed(seed: int, generation: int) -> int:
    return int(np.random.SeedSequence((seed, generation)).generate_state(1)[0])


def _library() -> Any:
    try:
        import cmaes
    except ImportError as error:
        raise EnvironmentProblem("CMAES needs cmaes.", "pip install cmaes") from error
    return cmaes


def _stored(strategy: Any) -> dict[str, Any]:
    """Give a strategy as tensors and plain numbers: no pickled object is in a checkpoint.

    The library's own state lacks the random numbers' and keeps one half of the covariance, so every
    generation starts from it, resumed or not.
    """
    return {name: _plain(value) for name, value in strategy.__getstate__().items()}


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value.copy())
    return value.item() if isinstance(value, np.generic) else value


def _restored(stored: dict[str, Any]) -> Any:
    strategy = _library().CMA.__new__(_library().CMA)
    arrays = {k: v.cpu().numpy().copy() if isinstance(v, Tensor) else v for k, v in stored.items()}
    strategy.__setstate__(arrays)
    return strategy
