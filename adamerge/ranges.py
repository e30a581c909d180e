"""What values an option may have: written at its annotation, and checked before its function runs.

A parameter that is annotated ``Annotated[float, Range("(0, 1]")]`` is a float to every other reader of
signatures. `checked` makes a function or constructor refuse what does not fit, so that a command line, a
configuration file and Python code meet the same ranges.
"""

import functools
import inspect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, ParamSpec, TypeVar, Union, get_args, get_origin, get_type_hints

from adamerge.errors import InputError, brief

P = ParamSpec("P")
R = TypeVar("R")
_TEXT = re.compile(r"([\[(])\s*(\S+)\s*,\s*(\S+)\s*([\])])")
_KINDS: dict[Any, str] = {
    **{int: "a whole number", float: "a number", bool: "true or false", str: "a text", NoneType: "null"},
    **{list: "a list", Sequence: "a list", dict: "a mapping", Mapping: "a mapping"},
}
_LARGEST = 3.4028234663852886e38  # that fp32 holds


@dataclass(frozen=True)
class Range:
    """A range of numbers, as mathematics writes it: ``Range("(0, 1]")``.

    Attributes:
        text: The range; messages repeat it.
    """

    text: str
    ends: tuple[float, float, bool, bool] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        match = _TEXT.fullmatch(self.text)
        if match is None:
            raise ValueError(f"{self.text!r} is no range")
        ends = float(match[2]), float(match[3]), match[1] == "(", match[4] == ")"
        object.__setattr__(self, "ends", ends)

    def __contains__(self, value: float | int) -> bool:
        low, high, without_low, without_high = self.ends
        above = value > low if without_low else value >= low
        return above and (value < high if without_high else value <= high)


Count = Annotated[int, Range("[1, 1e9]")]
Natural = Annotated[int, Range("[0, 1e9]")]
Seed = Annotated[int, Range("[0, 9.2e18]")]
Share = Annotated[float, Range("[0, 1]")]
PositiveShare = Annotated[float, Range("(0, 1]")]
Coefficient = Annotated[float, Range("[-1e6, 1e6]")]
Factor = Annotated[float, Range("[0, 1e12]")]
Positive = Annotated[float, Range("(0, 1e12]")]
Rate = Annotated[float, Range("(0, 1e3]")]
Temperature = Annotated[float, Range("[1e-4, 1e4]")]


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """Return a function, constructor or class that first checks its arguments: see `require`.

    Raises:
        InputError: A value is of another kind, not finite, or out of its range.
    """
    signature = inspect.signature(function)

    @functools.cache
    def hints() -> dict[str, Any]:
        own = function.__init__ if inspect.isclass(function) else function
        return get_type_hints(own, include_extras=True)

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        for name, value in signature.bind(*args, **kwargs).arguments.items():
            require(name, value, hints().get(name, Any))
        return function(*args, **kwargs)

    return call


def require(key: str, value: object, hint: Any) -> None:
    """Refuse a value that does not fit an annotation.

    Numbers, booleans, texts, and lists and mappings of these are compared; other annotations fit all, and
    choices (`Literal`) fit every text, since whoever reads them names the nearest. Whole numbers are floats,
    booleans are no numbers, and no number is NaN or infinite.

    Args:
        key: What the message calls it.
        value: The value.
        hint: The annotation.

    Raises:
        InputError: It does not fit.
    """
    if fits(value, hint):
        return
    if isinstance(value, float) and not math.isfinite(value):
        problem = "is not finite"
    elif fits(value, hint, ranges=False):
        problem = "is out of range"
    else:
        problem = "has the wrong type"
    raise InputError(f"{key}={brief(value)} {problem}.", f"Use {described(hint)}.")


def fits(value: object, hint: Any, *, ranges: bool = True) -> bool:
    """Return whether a value fits an annotation: see `require`; without ``ranges``, its kind alone."""
    kind, parts = get_origin(hint), get_args(hint)
    match = partial(fits, ranges=ranges)
    if kind is Annotated:
        return _fits_within(value, parts[0], [part for part in parts[1:] if isinstance(part, Range)], ranges)
    if kind in (Union, UnionType):
        return any(match(value, part) for part in parts)
    if kind in (list, Sequence):
        return isinstance(value, list | tuple) and all(match(item, parts[0]) for item in value)
    if kind in (dict, Mapping):
        return isinstance(value, Mapping) and all(
            match(name, parts[0]) and match(item, parts[1]) for name, item in value.items()
        )
    if kind is Literal:
        return any(isinstance(value, type(part)) for part in parts)
    return _fits_plainly(value, hint, ranges)


def _fits_within(value: object, kind: Any, bounds: Sequence[Range], ranges: bool) -> bool:
    """Compare with a range, which alone can let infinity in."""
    if kind is float and isinstance(value, float) and math.isinf(value):
        return ranges and all(value in bound for bound in bounds)
    if not isinstance(value, int | float):
        return fits(value, kind)
    return fits(value, kind, ranges=ranges) and (not ranges or all(value in bound for bound in bounds))


def _fits_plainly(value: object, hint: Any, ranges: bool) -> bool:
    """Compare with an annotation without parts."""
    if hint is float:
        if not isinstance(value, int | float) or isinstance(value, bool):
            return False
        return math.isfinite(value) and (not ranges or abs(value) <= _LARGEST)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint in (bool, str):
        return isinstance(value, hint)
    if hint in (None, NoneType):
        return value is None
    return True


def described(hint: Any) -> str:
    """Return what an annotation asks for, in words."""
    kind, parts = get_origin(hint), get_args(hint)
    if kind is Annotated:
        ranges = " and ".join(f"in {part.text}" for part in parts[1:] if isinstance(part, Range))
        return f"{described(parts[0])} {ranges}"
    if kind in (Union, UnionType):
        return " or ".join(described(part) for part in sorted(parts, key=lambda part: part is NoneType))
    if kind is Literal:
        return f"one of {', '.join(map(str, parts))}"
    if parts:
        return f"{_KINDS.get(kind, 'a value')}, each {described(parts[-1])}"
    return _KINDS.get(hint, getattr(hint, "__name__", str(hint)))
