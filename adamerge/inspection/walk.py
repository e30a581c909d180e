"""One walk over all vectors that can be made, tensors that are not finite left out."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations

from adamerge.errors import InputError
from adamerge.inspection.checks import Misfit, NonFinite, Selection, nonfinite_of
from adamerge.inspection.geometry import Geometry, geometry
from adamerge.inspection.measures import Measured, measure
from adamerge.state import State
from adamerge.vectors import TaskVectors


def comparable(
    base: State, experts: Mapping[str, State], rows: Sequence[Misfit], exclude: Sequence[str]
) -> TaskVectors:
    """Give the vectors of all tensors that can be subtracted."""
    bad = {role: {row.tensor for row in rows if row.role == role} for role in ("base", *experts)}
    ours = Selection.without(base, bad["base"])
    theirs = {
        task: Selection.without(state, bad[task] | (set(state) - set(ours)))
        for task, state in experts.items()
    }
    return TaskVectors.open(ours, theirs, "stream", allow_missing=["*"], exclude=exclude)


@dataclass(frozen=True)
class Walk:
    """A walk over all vectors; `repeated` and `zero` as in `Report`.

    Attributes:
        vectors: The vectors.
        measured: What each parameter gave; a value that is not finite counts its tensor out.
        nonfinite: Those tensors.
        equal: Pairs of tasks, by index, whose vectors are equal throughout.
    """

    vectors: TaskVectors
    measured: dict[str, Measured]
    nonfinite: list[NonFinite]
    equal: frozenset[tuple[int, int]]

    @classmethod
    def of(cls, vectors: TaskVectors, *, rank: bool) -> "Walk":
        """Measure every parameter."""
        measured: dict[str, Measured] = {}
        nonfinite: list[NonFinite] = []
        equal = frozenset(combinations(range(len(vectors.tasks)), 2))
        for name, block in vectors.stacks("Inspecting").walk():
            try:
                found = measure(block, rank=rank, pairs=equal)
            except InputError:
                rows = nonfinite_of(name, {"base": vectors.origins.base, **vectors.origins.experts})
                if not rows:
                    raise
                nonfinite += rows
                found = _measure_rest(vectors, name, {row.role for row in rows}, rank=rank, pairs=equal)
            if found:
                measured[name], equal = found, found.equal
        return cls(vectors, measured, nonfinite, equal)

    @cached_property
    def compared(self) -> tuple[str, ...]:
        """The tasks of which at least one tensor was measured."""
        out = {(row.role, row.tensor) for row in self.nonfinite}
        experts = self.vectors.origins.experts.items()
        return tuple(t for t, s in experts if any(n in s and (t, n) not in out for n in self.measured))

    @cached_property
    def geometry(self) -> Geometry | None:
        """What the vectors look like."""
        if not self.measured:
            return None
        shapes = {name: tuple(self.vectors.blocks[name].shape[1:]) for name in self.measured}
        return geometry(self.vectors.tasks, shapes, self.measured, self.vectors.origins.base_norms)

    @cached_property
    def zero(self) -> tuple[str, ...]:
        """The tasks whose vector is zero."""
        return tuple(task for task in self.compared if self.geometry and not self.geometry.norm[task])

    @cached_property
    def repeated(self) -> tuple[tuple[str, str], ...]:
        """The pairs of equal experts that differ from the base."""
        moved = set(self.compared) - set(self.zero)
        pairs = [(self.vectors.tasks[a], self.vectors.tasks[b]) for a, b in sorted(self.equal)]
        return tuple(pair for pair in pairs if moved.issuperset(pair))


def _measure_rest(
    vectors: TaskVectors, name: str, bad: Collection[str], *, rank: bool, pairs: Iterable[tuple[int, int]]
) -> Measured | None:
    """Measure one parameter without the experts in which it is not finite; None where none is left."""
    base, experts = vectors.origins.base, vectors.origins.experts
    left = {t: Selection(s, [name] if name in s and t not in bad else []) for t, s in experts.items()}
    if "base" in bad or not any(left.values()):
        return None
    alone = TaskVectors.open(Selection(base, [name]), left, "stream", allow_missing=["*"])
    found = measure(alone.blocks[name], rank=rank, pairs=pairs)
    origins = alone.origins
    vectors.origins.add(name, origins.base_norms[name], origins.vector_norms[name])
    return found
