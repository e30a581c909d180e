"""Rows of facts about every static method and task-vector edit."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_type_hints

from adamerge.errors import InputError, nearest
from adamerge.ranges import Coefficient, require

Scope = Literal["entry", "tensor", "model"]
Grain = Literal["entry", "tensor"]
Function = TypeVar("Function", bound=Callable[..., Any])

LOCAL_NEEDS = ("name", "base", "merged")  # known of a parameter without any data
SEQUENTIAL = "prefix_gram"  # the statistic that depends on what is merged already


@dataclass(frozen=True)
class Method:
    """One published method, or one task-vector edit.

    Attributes:
        name: Its name in commands, configurations and reports.
        title: Title of the method, as its paper has it.
        source: Paper id (arXiv), for citations.
        scope: "entry": the function maps vectors ``[task, *any]`` to ``[*any]``, each entry on its own, so
            that a parameter may be cut in pieces; "tensor": it maps one parameter's ``[task, *param]``;
            "model": it first looks at the whole model's `Stacks` and gives the function that does so.
            (An edit gives vectors of the shape that it was given.)
        function: The pure function; its keyword-only arguments, but for the needs, are the options.
        needs: What it wants besides the vectors, as keyword arguments: "name" of the parameter, "base"
            (its fp32 base tensor), "merged" (the vector that another method made of it, for methods that
            correct one), or a statistic: "fisher", "gram", ...
        grain: What the function that a "model" function gives is applied to: "entry" or "tensor".
        ordered: Whether the order of the experts matters.
        oracle: Whether the result is one model per task (an edit that needs the task at inference).
    """

    name: str
    title: str
    source: str
    scope: Scope
    function: Callable[..., Any]
    needs: tuple[str, ...] = ()
    grain: Grain = "entry"
    ordered: bool = False
    oracle: bool = False

    @property
    def entrywise(self) -> bool:
        """Whether the function, or what it gives, treats every entry on its own."""
        return (self.grain if self.scope == "model" else self.scope) == "entry"

    @property
    def statistics(self) -> tuple[str, ...]:
        """The needs that come from data."""
        return tuple(need for need in self.needs if need not in LOCAL_NEEDS)

    @property
    def options(self) -> dict[str, inspect.Parameter]:
        """The method's options."""
        parameters = inspect.signature(self.function).parameters
        return {
            name: parameter
            for name, parameter in parameters.items()
            if parameter.kind is inspect.Parameter.KEYWORD_ONLY and name not in self.needs
        }


METHODS: dict[str, Method] = {}
EDITS: dict[str, Method] = {}


def static_method(*, title: str, source: str, scope: Scope, **facts: Any) -> Callable[[Function], Function]:
    """Register the decorated function as a static method, under its own or a given name; see `Method`."""
    return _register(METHODS, title=title, source=source, scope=scope, **facts)


def task_vector_edit(
    *, title: str, source: str, scope: Scope, **facts: Any
) -> Callable[[Function], Function]:
    """Register the decorated function, from vectors to vectors, as an edit, under its own or a given name."""
    return _register(EDITS, title=title, source=source, scope=scope, **facts)


def _register(
    rows: dict[str, Method], *, name: str | None = None, **facts: Any
) -> Callable[[Function], Function]:
    def add(function: Function) -> Function:
        key = name or function.__name__
        if key in rows:
            raise ValueError(f"{key!r} is registered already, by {rows[key].function.__module__}")
        rows[key] = Method(name=key, function=function, **facts)
        return function

    return add


def look_up(rows: Mapping[str, Method], name: str, options: Mapping[str, object]) -> Method:
    """Find a row, and refuse options that it does not have.

    Raises:
        InputError: The method or an option is unknown, or a value has the wrong type.
    """
    if name not in rows:
        raise InputError(f"method {name!r} is unknown.", nearest(name, rows))
    known = list(rows[name].options)
    for option in options:
        if option not in known:
            hint = nearest(option, known) if known else "It takes no options."
            raise InputError(f"{name} has no option {option!r}.", hint)
        hint = get_type_hints(rows[name].function, include_extras=True)[option]
        require(option, options[option], Coefficient if hint is float else hint)
    return rows[name]
