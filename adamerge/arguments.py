"""Command lines from signatures: the plain functions' arguments, as people type them."""

import inspect
import json
import types
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, get_args, get_origin

from adamerge.documents import read_mapping
from adamerge.errors import InputError
from adamerge.explain import explain
from adamerge.shipped import config_files

Function = Callable[..., Any]


def parse(
    program: str,
    functions: Sequence[Function],
    given: Sequence[str],
    *,
    skip: Mapping[Function, Collection[str]] | None = None,
    positional: bool | None = None,
) -> dict[str, Any]:
    """Parse a command line whose arguments are those of one or several functions.

    Hyphens in names count as underscores; a list's option may be repeated or take several values; a flag
    needs no value.

    Args:
        program: What the usage line begins with.
        functions: Their signatures and docstrings make the options and the help.
        given: The command line.
        skip: By function, the parameters that are not the user's.
        positional: Whether what has no default is positional; default: for functions of one such
            parameter.

    Returns:
        Values by parameter name.

    Raises:
        InputError: An argument is unknown, missing or of the wrong type.
    """
    from jsonargparse import ArgumentParser

    for file in config_files(given):
        read_mapping(file)  # refuses what the parser would wait for, or choke on
    parameters = {
        name: parameter
        for function in functions
        for name, parameter in inspect.signature(function).parameters.items()
        if name not in (skip or {}).get(function, ())
    }
    if positional is None:
        positional = sum(p.default is p.empty for p in parameters.values()) == 1
    description = (inspect.getdoc(functions[0]) or "").partition("\nArgs:")[0]
    parser = ArgumentParser(prog=program, description=description, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="A YAML file of these options.")
    for function in functions:
        own: set[str | int] = set((skip or {}).get(function, ()))
        parser.add_function_arguments(function, as_group=False, as_positional=positional, skip=own)
    try:
        options = parser.parse_args(_normalized(given, parameters, positional=positional))
    except Exception as error:
        raise InputError(*explain(str(error), parser.get_defaults().keys(), ())) from error
    return {name: value for name, value in options.as_dict().items() if name in parameters}


def _normalized(
    given: Sequence[str], parameters: dict[str, inspect.Parameter], *, positional: bool
) -> list[str]:
    """Write a command line as the parser wants it: one value per option, and one for a positional list."""
    kinds = {name: _kind(parameter.annotation) for name, parameter in parameters.items()}
    done: list[str] = []
    lists: dict[str, list[str]] = {}
    words = list(given)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            done.append(word)
            continue
        name, equals, value = word[2:].partition("=")
        name = name.replace("-", "_")
        if kinds.get(name) is list:
            values = [value] if equals else _values(words)
            lists.setdefault(name, []).extend(values)
        elif kinds.get(name) is bool and not equals and not _values(words[:1]):
            done.append(f"--{name}=true")
        else:
            done.append(f"--{name}{equals}{value}")
    if positional and any(kinds[n] is list and p.default is p.empty for n, p in parameters.items()):
        done = _joined(done)
    return done + [f"--{name}={_as_json(values)}" for name, values in lists.items()]


def _joined(words: list[str]) -> list[str]:
    """Make one word, a list, of the words that are neither options nor their values."""
    is_value = [word.startswith("--") and "=" not in word for word in ["", *words]]
    bare, rest = [], []
    for word, taken in zip(words, is_value, strict=False):
        (rest if taken or word.startswith("--") else bare).append(word)
    return rest + ([json.dumps(bare)] if bare else [])


def _values(words: list[str]) -> list[str]:
    """Take the words up to the next option."""
    values = []
    while words and not words[0].startswith("--"):
        values.append(words.pop(0))
    return values


def _as_json(values: list[str]) -> str:
    return values[0] if len(values) == 1 and values[0].startswith("[") else json.dumps(values)


def _kind(annotation: Any) -> type | None:
    """Tell whether a parameter is a list or a flag; neither may hide in ``X | None``."""
    options = get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    for option in options:
        if (get_origin(option) or option) in (list, bool):
            return get_origin(option) or option
    return None
