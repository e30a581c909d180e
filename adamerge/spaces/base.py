"""What a coefficient space finer than a matrix offers to the trainer."""

import re
from abc import abstractmethod
from collections.abc import Collection, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from adamerge.coefficients import Coefficients, Learned
from adamerge.coefficients.learned import Clamp, Grouping
from adamerge.errors import InputError
from adamerge.progress import track
from adamerge.state import State
from adamerge.vectors import TaskVectors

Numbers = Float[Tensor, " task"]


class Space(Coefficients):
    """Coefficients that are tensors: weights = base + sum over tasks of coefficients[task] * vector[task].

    Some tensors are refined: there each task has many coefficients. All tensors have one number per task,
    as `Learned` has them, in ``matrix``.

    Args:
        grouping: Which tensors share a number, as in `Learned`.
        initial: The numbers' start, as in `Learned`.
        clamp: As in `Learned`.
        pattern: Which tensors are refined (`re.search`); None: all that can be.

    Raises:
        InputError: The pattern is no regular expression, or an option is out of its range.
    """

    def __init__(
        self,
        grouping: Grouping = "tensor",
        initial: float | list[float] = 0.3,
        clamp: Clamp = "off",
        *,
        pattern: str | None = None,
    ) -> None:
        super().__init__()
        self.matrix = Learned(grouping, initial, clamp)
        try:
            self._pattern = re.compile(pattern or "")
        except re.error as error:
            raise InputError(f"pattern={pattern!r} is no regular expression: {error}.") from error
        self.fine = ByTensor()
        self._columns: dict[str, int] = {}

    def build(self, tasks: Sequence[str], what: TaskVectors, /) -> None:
        """Create the parameters for these experts.

        Raises:
            InputError: No tensor can be refined.
        """
        self.matrix.build(tasks, what.names)
        self._columns = {name: i for i, name in enumerate(what.names)}
        for name in track(what.names, f"Preparing {type(self).__name__}"):
            if self._pattern.search(name):
                self.refine(name, what)
        if not len(self.fine):
            raise InputError(
                f"{type(self).__name__}: no tensor that pattern {self._pattern.pattern!r} names can be "
                "refined.",
                "Leave the pattern out, or use adamerge.Learned.",
            )

    def forward(self, vectors: TaskVectors, names: Collection[str] | None = None) -> State:
        """Give the merged tensors in fp32, differentiable in the parameters.

        Args:
            vectors: The experts that `build` met, wherever they are now.
            names: Merge only these; default: all.
        """
        matrix = self.matrix()
        kept = [name for name in vectors.names if names is None or name in names]
        plain = [name for name in kept if name not in self.fine]
        merged = vectors.merge(matrix, plain) if plain else {}
        with torch.autocast(matrix.device.type, enabled=False):
            fine = {n: self.merged(n, matrix[:, self._columns[n]], vectors) for n in kept if n in self.fine}
        joined = merged | fine
        return vectors.with_aliases({name: joined[name] for name in kept})

    @abstractmethod
    def refine(self, name: str, vectors: TaskVectors) -> None:
        """Give a tensor parameters in ``self.fine``, unless this space has none for it."""

    @abstractmethod
    def merged(self, name: str, numbers: Numbers, vectors: TaskVectors) -> Float[Tensor, "*param"]:
        """Merge one refined tensor in fp32.

        Args:
            name: Which.
            numbers: One per task, from ``matrix``.
            vectors: Base and experts.
        """

    @abstractmethod
    def effective(self, name: str, numbers: Numbers) -> Numbers:
        """Give the mean of a refined tensor's coefficients, by task, for reports."""

    @abstractmethod
    def start(self, name: str) -> Tensor:
        """Give the initial value of a refined tensor's parameter."""

    @torch.no_grad()
    def reset(self) -> None:
        """Go back to the initial values, in place."""
        self.matrix.reset()
        for name, value in self.fine.items():
            value.copy_(self.start(name))

    def after_step(self) -> None:
        """Repair the numbers."""
        self.matrix.after_step()

    @torch.no_grad()
    def table(self) -> tuple[list[str], Float[Tensor, "task group"]]:
        """Give the tensors' names, and the mean of each task's coefficients there."""
        values = self.matrix().detach().clone()
        for name in self.fine.names:
            column = self._columns[name]
            values[:, column] = self.effective(name, values[:, column])
        return list(self._columns), values.float().cpu()


class ByTensor(nn.Module):
    """Parameters, and constants beside them, by tensor name: names with dots are no attribute names."""

    def __init__(self) -> None:
        super().__init__()
        self._values = nn.ParameterDict()
        self._names: dict[str, str] = {}

    @property
    def names(self) -> list[str]:
        """Names of the tensors that have parameters."""
        return list(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def __getitem__(self, name: str) -> nn.Parameter:
        return self._values[self._names[name]]

    def items(self) -> list[tuple[str, nn.Parameter]]:
        """Give names and parameters."""
        return [(name, self[name]) for name in self._names]

    def add(self, name: str, value: Tensor, **constants: Any) -> None:
        """Add a tensor's parameter, and what goes with it: constants move along and are not saved."""
        self._names[name] = name.replace(".", "/")
        self._values[self._names[name]] = nn.Parameter(value)
        for key, constant in constants.items():
            self.register_buffer(f"{self._names[name]}/{key}", constant, persistent=False)

    def constant(self, name: str, key: str) -> Tensor:
        """Give a constant of a tensor."""
        return self.get_buffer(f"{self._names[name]}/{key}")
