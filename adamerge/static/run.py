"""Runs a registered method or edit on task vectors."""

import inspect
from collections.abc import Iterator, Mapping

from torch import Tensor

from adamerge.errors import InputError, nearest
from adamerge.progress import track
from adamerge.static.registry import EDITS, METHODS, Method
from adamerge.vectors import TaskVectors


def merge(vectors: TaskVectors, method: str, **options: object) -> dict[str, Tensor]:
    """Merge task vectors by a static method.

    Args:
        vectors: The base and the task vectors.
        method: Name of a registered method: "average", "task_arithmetic", "ties", ...
        options: The method's options; see its docstring.

    Returns:
        All tensors of the merged model, with the base's names and dtypes.

    Raises:
        InputError: The method or an option is unknown, or a value is out of range.
    """
    row = _look_up(METHODS, method, options)
    deltas = track(_apply(row, vectors, options), f"Merging ({method})", len(vectors.blocks))
    merged = dict(vectors.rest)
    for name, delta in deltas:
        base = vectors.blocks[name].base_tensor()
        merged[name] = (base.float() + delta).to(base.dtype)
    return merged


def edit(vectors: TaskVectors, name: str, **options: object) -> TaskVectors:
    """Apply a registered task-vector edit, which gives vectors again.

    Args:
        vectors: The base and the task vectors.
        name: Name of a registered edit: "ties_trim", ...
        options: The edit's options; see its docstring.

    Raises:
        InputError: The edit or an option is unknown, or a value is out of range.
    """
    row = _look_up(EDITS, name, options)
    return vectors.edit(lambda _stacks: _apply(row, vectors, options))


def _look_up(rows: Mapping[str, Method], name: str, options: Mapping[str, object]) -> Method:
    if name not in rows:
        raise InputError(f"method {name!r} is unknown.", nearest(name, rows))
    known = list(inspect.signature(rows[name].function).parameters)[1:]
    for option in options:
        if option not in known:
            hint = nearest(option, known) if known else "It takes no options."
            raise InputError(f"{name} has no option {option!r}.", hint)
    return rows[name]


def _apply(row: Method, vectors: TaskVectors, options: Mapping[str, object]) -> Iterator[tuple[str, Tensor]]:
    if row.scope == "model":
        yield from row.function(vectors.stacks(), **options)
    else:
        for name, stack in vectors.stacks():
            yield name, row.function(stack, **options)
