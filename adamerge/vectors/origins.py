"""Where vectors come from: tells experts of another base, unchanged and repeated ones by their norms."""

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import combinations
from typing import Protocol, runtime_checkable

import torch

from adamerge.errors import AdamergeWarning, InputError
from adamerge.state import State, digest


@runtime_checkable
class Filed(Protocol):
    """A state that stands in files, as a checkpoint does."""

    def file_digest(self) -> str:
        """Hash the files' bytes."""
        ...


@dataclass
class Origins:
    """A base and its experts, and the norms gathered tensor by tensor while they are first read.

    Args:
        base: The base's state.
        experts: The experts' states by task name.
        force: Accept experts that look as if they came from another base.
        base_norms: Norm of the base tensor, by parameter.
        vector_norms: Norm of each task's vector, by parameter.
    """

    base: State
    experts: Mapping[str, State]
    force: bool = False
    base_norms: dict[str, float] = field(default_factory=dict)
    vector_norms: dict[str, list[float]] = field(default_factory=dict)

    def digests(self) -> dict[str, str]:
        """Give the SHA-256 of the base and of each expert: of their files, or of a state in memory."""
        states = {"base": self.base, **self.experts}
        return {r: s.file_digest() if isinstance(s, Filed) else digest(s) for r, s in states.items()}

    def add(self, name: str, base: float, vectors: list[float]) -> None:
        """Note the norms of one parameter's base tensor and of each task's vector."""
        self.base_norms.setdefault(name, base)
        self.vector_norms.setdefault(name, vectors)

    def columns(self) -> dict[str, tuple[float, ...]]:
        """Give each task's norms, tensor by tensor."""
        columns = list(zip(*self.vector_norms.values(), strict=True)) or [()] * len(self.experts)
        return dict(zip(self.experts, columns, strict=True))

    def ratios(self) -> dict[str, float]:
        """Give norm of task vector / norm of base, by task."""
        base = math.hypot(*self.base_norms.values())
        return {t: math.hypot(*column) / base if base else 0.0 for t, column in self.columns().items()}

    def check(self) -> None:
        """Refuse foreign experts and all-zero vectors; warn of an unchanged or repeated expert.

        Raises:
            InputError: An expert is farther from the base than the base is long, or none differs from it.
        """
        self._refuse_foreign()
        unchanged = [task for task, column in self.columns().items() if not any(column)]
        if len(unchanged) == len(self.experts):
            raise InputError("no expert differs from the base.", "Are these the fine-tuned files?")
        for task in unchanged:
            warnings.warn(f"expert {task!r} equals the base.", AdamergeWarning, stacklevel=3)
        for (a, first), (b, second) in combinations(self.columns().items(), 2):
            if first == second and a not in unchanged and self._are_equal(a, b):
                warnings.warn(f"experts {a!r} and {b!r} are equal.", AdamergeWarning, stacklevel=3)

    def _refuse_foreign(self) -> None:
        ratios = self.ratios()
        foreign = sorted(task for task, ratio in ratios.items() if ratio > 1)
        if foreign and not self.force:
            found = ", ".join(f"{task!r} {ratio:.3g}" for task, ratio in ratios.items())
            raise InputError(
                f"experts {foreign} are farther from the base than the base is long; "
                f"norm of task vector / norm of base: {found}.",
                "They look fine-tuned from another base. To merge them: force=True "
                "(--force true; in a configuration model.force).",
            )

    def _are_equal(self, a: str, b: str) -> bool:
        first, second = self.experts[a], self.experts[b]
        return all(torch.equal(first[name], second[name]) for name in self.vector_norms if name in first)
