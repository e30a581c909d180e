"""Checks of annotations that cost little: shapes by jaxtyping where there are shapes, the rest by beartype.

jaxtyping's import hook (``--jaxtyping-packages``) wraps every function of the package, binds its arguments
and checks them twice, which doubles the time of a run. Only shapes need that.
"""

import functools
import inspect
from collections.abc import Callable
from types import FunctionType
from typing import Any, get_args, get_type_hints

import jaxtyping
from beartype import beartype
from jaxtyping import AbstractArray

_with_shapes = jaxtyping.jaxtyped


def install() -> None:
    """Let what the import hook writes before every function be `checked`; comes before the package."""
    jaxtyping.jaxtyped = checked


def checked(*, typechecker: Any) -> Callable[[Any], Any]:
    """Give a decorator: jaxtyping's, and a cheaper one for functions without shapes."""
    return functools.partial(_check, typechecker=typechecker)


def _check(function: Any, *, typechecker: Any) -> Any:
    if not isinstance(function, FunctionType) or _may_have_shapes(function):
        return _with_shapes(function, typechecker=typechecker)
    return _switchable(function, beartype(function))


def _may_have_shapes(function: FunctionType) -> bool:
    """Tell whether an annotation has a shape, or names what does not exist yet."""
    try:
        hints = get_type_hints(function, include_extras=True)
    except Exception:
        return True
    return any(map(_has_shape, hints.values()))


def _has_shape(hint: Any) -> bool:
    is_array = inspect.isclass(hint) and issubclass(hint, AbstractArray)
    parts = hint if isinstance(hint, list) else get_args(hint)
    return is_array or any(map(_has_shape, parts))


def _switchable(function: Callable[..., Any], typed: Callable[..., Any]) -> Callable[..., Any]:
    """Give the function with checks that jaxtyping's switch turns off, as the fixture `unchecked` does."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        __tracebackhide__ = True
        chosen = function if jaxtyping.config.jaxtyping_disable else typed
        return chosen(*args, **kwargs)

    return call
