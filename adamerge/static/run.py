"""Runs a registered method or edit on task vectors, parameter by parameter."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from adamerge.errors import InputError, NumericError, nearest
from adamerge.static.registry import EDITS, LOCAL_NEEDS, METHODS, SEQUENTIAL, Method, look_up
from adamerge.vectors import Block, Stacks, TaskVectors

_PIECE = 2**18  # entries


@runtime_checkable
class Statistic(Protocol):
    """A statistic of the experts, one parameter at a time."""

    @property
    def order(self) -> Sequence[str]:
        """Names in the order in which they should be asked for."""
        ...

    def __call__(self, name: str, merged: Mapping[str, Tensor]) -> Tensor | None:
        """Give a parameter's statistic, task first; None where it has none.

        Args:
            name: The parameter.
            merged: Tensors that are merged already, for statistics that depend on them.
        """
        ...


def merge(vectors: TaskVectors, method: str, **options: Any) -> dict[str, Tensor]:
    """Merge task vectors by a static method.

    Args:
        vectors: The base and the task vectors.
        method: Name of a registered method: "average", "task_arithmetic", "ties", ...
        options: The method's options (see its docstring), and those of `merged_tensors`.

    Returns:
        All tensors of the merged model, with the base's names and dtypes.

    Raises:
        InputError: The method or an option is unknown, or a value is out of range.
        NumericError: A merged value does not fit the base's dtype.
    """
    merged = dict(merged_tensors(vectors, method, **options))
    for name, tensor in merged.items():
        if tensor.dtype == torch.float16 and not torch.isfinite(tensor).all():
            raise NumericError(
                f"the merged {name} has values beyond 65504, which float16 cannot hold.",
                "Open the base in another dtype, or write bfloat16: adamerge merge ... --dtype bfloat16.",
            )
    return merged


def merged_tensors(
    vectors: TaskVectors,
    method: str,
    *,
    dtype: torch.dtype | None = None,
    statistics: Mapping[str, Statistic] | None = None,
    of: str = "task_arithmetic",
    of_options: Mapping[str, Any] | None = None,
    **options: Any,
) -> Iterator[tuple[str, Tensor]]:
    """Merge task vectors by a static method, one parameter in memory at a time.

    Args:
        vectors: The base and the task vectors.
        method: Name of a registered method.
        dtype: Dtype of merged tensors; default: the base's own.
        statistics: Where a method that needs statistics of the experts finds them: from a parameter's
            name, and the tensors merged so far, to one tensor for all tasks; None where there is none.
        of: The method whose result is corrected, for methods that correct one ("lines", "svc").
        of_options: That method's options.
        options: The method's own options.

    Yields:
        Name and tensor, first of all that is merged, then the base's rest. What does not fit ``dtype`` is
        infinite there.
    """
    row = look_up(METHODS, method, options)
    context = _Context(vectors, statistics, of, of_options)
    rule = context.rule(row, options)
    blocks = dict(vectors.blocks)
    if SEQUENTIAL in row.needs:
        order = context.statistics[SEQUENTIAL].order
        blocks = {name: blocks[name] for name in [*order, *blocks] if name in blocks}
    for name, block in Stacks(blocks, f"Merging ({method})").walk():
        tensor = context.tensor(rule, name, block, dtype)
        if SEQUENTIAL in row.needs:
            context.merged[name] = tensor
        yield from vectors.with_aliases({name: tensor}).items()
    yield from vectors.rest.items()


def expert_tensors(
    vectors: TaskVectors, task: str, *, dtype: torch.dtype | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Give the model of one task, base + its vector, one parameter in memory at a time.

    Args:
        vectors: The base and the task vectors, as an edit gave them.
        task: The task.
        dtype: Dtype of the tensors that have vectors; default: the base's own.

    Yields:
        Name and tensor, as `merged_tensors` does.

    Raises:
        InputError: There is no such task.
    """
    if task not in vectors.tasks:
        raise InputError(f"there is no task {task!r}.", nearest(task, vectors.tasks))
    one_hot = torch.tensor([float(name == task) for name in vectors.tasks])
    for name, block in vectors.stacks(f"Merging for {task}").walk():
        tensor = block.combine(one_hot).to(dtype or block.base_tensor().dtype)
        yield from vectors.with_aliases({name: tensor}).items()
    yield from vectors.rest.items()


def edit(vectors: TaskVectors, name: str, **options: Any) -> TaskVectors:
    """Apply a registered task-vector edit, which gives vectors again.

    Args:
        vectors: The base and the task vectors.
        name: Name of a registered edit: "ties_trim", ...
        options: The edit's options; see its docstring.

    Raises:
        InputError: The edit or an option is unknown, or a value is out of range.
    """
    row, context = look_up(EDITS, name, options), _Context(vectors)
    rule = context.rule(row, options)

    def apply(parameter: str, stack: Tensor) -> Tensor:
        return context.vector(rule, parameter, vectors.blocks[parameter], stack)

    return vectors.edit(apply, entrywise=row.entrywise)


class _Rule(NamedTuple):
    """What is done to every parameter: a function, the needs that it is given, and its options."""

    function: Callable[..., Tensor]
    needs: tuple[str, ...]
    entrywise: bool
    options: Mapping[str, Any]


class _Context:
    """What rules may ask for besides the vectors."""

    def __init__(
        self,
        vectors: TaskVectors,
        statistics: Mapping[str, Statistic] | None = None,
        of: str = "task_arithmetic",
        of_options: Mapping[str, Any] | None = None,
    ) -> None:
        self.vectors, self.statistics = vectors, statistics or {}
        self.of, self.of_options = of, of_options or {}
        self.merged: dict[str, Tensor] = {}

    def rule(self, row: Method, options: Mapping[str, Any]) -> "_Rule":
        """Give the function of one parameter; what a method must know of the whole model is measured now."""
        missing = [n for n in row.needs if n not in (*LOCAL_NEEDS, *self.statistics)]
        if missing:
            raise InputError(
                f"{row.name} needs statistics of the experts ({', '.join(missing)}), which come from data.",
                "Pass statistics=adamerge.Statistics(...), or --data BENCHMARK.yaml on the command line.",
            )
        if row.scope != "model":
            return _Rule(row.function, row.needs, row.entrywise, options)
        measured: dict[str, Any] = {n: self.statistics[n] for n in row.needs if n not in LOCAL_NEEDS}
        if "merged" in row.needs:
            measured["merged"] = self._corrected
        function = row.function(self.vectors.stacks(f"Measuring for {row.name}"), **measured, **options)
        return _Rule(function, tuple(n for n in row.needs if n in LOCAL_NEEDS), row.entrywise, {})

    @cached_property
    def inner(self) -> "_Rule":
        """The rule of the method that is corrected."""
        row = look_up(METHODS, self.of, self.of_options)
        if "merged" in row.needs or SEQUENTIAL in row.needs:
            raise InputError(f"what {row.name} gives cannot be corrected.", "Use of='ties', for example.")
        return self.rule(row, self.of_options)

    def vector(self, rule: "_Rule", name: str, block: Block, stack: Tensor) -> Tensor:
        """Give what a rule makes of one parameter's vectors."""
        return rule.function(
            stack, **{n: self._known(n, name, block, stack) for n in rule.needs}, **rule.options
        )

    def tensor(self, rule: "_Rule", name: str, block: Block, dtype: torch.dtype | None) -> Tensor:
        """Give base + merged vector, piece by piece where every entry is on its own."""
        base = block.base_tensor()
        out = torch.empty(base.shape, dtype=dtype or base.dtype)
        flat, flat_base = out.reshape(-1), base.reshape(-1)
        if rule.entrywise and not rule.needs:
            merged = ((span, rule.function(piece, **rule.options)) for span, piece in block.pieces())
        else:
            merged = _cut(self.vector(rule, name, block, block.dense()).reshape(-1))
        for span, piece in merged:
            flat[span] = piece + flat_base[span]
        return out

    def _known(self, need: str, name: str, block: Block, stack: Tensor) -> Any:
        if need == "name":
            return name
        if need == "base":
            return block.base_tensor().float()
        if need == "merged":
            return self.vector(self.inner, name, block, stack)
        return self.statistics[need](name, self.merged)

    def _corrected(self) -> Iterator[tuple[str, Tensor]]:
        """Walk the vectors that the corrected method gives."""
        for name, block in self.vectors.stacks(f"Merging ({self.of})").walk():
            yield name, self.vector(self.inner, name, block, block.dense())


def _cut(flat: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Walk a flat tensor in pieces that stay in a core's cache."""
    for start in range(0, len(flat), _PIECE):
        yield slice(start, start + _PIECE), flat[start : start + _PIECE]
