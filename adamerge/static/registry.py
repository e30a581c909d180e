"""Rows of facts about every static method and task-vector edit."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

Scope = Literal["tensor", "model"]
Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class Method:
    """One published method.

    Attributes:
        name: Its name in commands, configurations and reports.
        title: Title of the method, as its paper has it.
        source: Paper id (arXiv), for citations.
        scope: "tensor": the function maps one parameter's ``[task, *param]`` to ``[*param]``;
            "model": it maps all `Stacks` to ``(name, tensor)`` pairs, because it needs a statistic of
            the whole model.
        function: The pure function; its keyword-only arguments are the method's options.
        needs: Statistics of the experts that it reads besides their weights.
    """

    name: str
    title: str
    source: str
    scope: Scope
    function: Callable[..., Any]
    needs: tuple[str, ...] = ()


METHODS: dict[str, Method] = {}
EDITS: dict[str, Method] = {}


def static_method(
    *, title: str, source: str, scope: Scope, needs: tuple[str, ...] = ()
) -> Callable[[Function], Function]:
    """Register the decorated function as a static method under its own name."""
    return _register(METHODS, title, source, scope, needs)


def task_vector_edit(
    *, title: str, source: str, scope: Scope, needs: tuple[str, ...] = ()
) -> Callable[[Function], Function]:
    """Register the decorated function, from vectors to vectors, as an edit under its own name."""
    return _register(EDITS, title, source, scope, needs)


def _register(
    rows: dict[str, Method], title: str, source: str, scope: Scope, needs: tuple[str, ...]
) -> Callable[[Function], Function]:
    def add(function: Function) -> Function:
        name = function.__name__
        if name in rows:
            raise ValueError(f"{name!r} is registered already, by {rows[name].function.__module__}")
        rows[name] = Method(name, title, source, scope, function, needs)
        return function

    return add
