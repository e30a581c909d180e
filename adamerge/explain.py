"""Turns a parser's long complaint into the reason and the nearest valid key, in three lines at most."""

import inspect
import pydoc
import re
from collections.abc import Hashable, Iterable
from pathlib import Path

import yaml

from adamerge.errors import InputError, nearest

_UNKNOWN_ARGUMENT = re.compile(r"unrecognized arguments: --?([\w.]+)")
_UNKNOWN_KEY = re.compile(
    r"""(?:(?:[Kk]ey|Option) |does not accept option )['"]([\w.]+)['"](?: is not (?:expected|accepted))?$""",
    re.M,
)
_NO_NESTED = re.compile(r"""Group ['"]([\w.]+)['"] does not accept nested key ['"]([\w.]+)['"]""")
_PARSER_KEY = re.compile(r"""Parser key "([\w.]+)":""")
_CLASS_PATH = re.compile(r"class_path '([\w.]+)'")
_LITERAL = re.compile(r"Expected a typing\.Literal\[(.*?)\]")
_FOUND = re.compile(r"(?:Got|Given) value: (.*)")
_EXPECTED = re.compile(r"Expected an? (.*?)\. Got value: (.*)")
_NO_IMPORT = re.compile(
    r"Expected a dot import path string: (\S+)|No module named '([\w.]+)'"
    r"|class_path '([\w.]+)':\s+module '[\w.]+' has no attribute"
)
_VALUES = re.compile(r"'([^']*)'")


def explain(complaint: str, known_keys: Iterable[str], class_names: Iterable[str]) -> tuple[str, str]:
    """Find what is wrong in jsonargparse's message.

    Args:
        complaint: The message.
        known_keys: All keys that the configuration may have, with dots.
        class_names: Names that may stand as a ``class_path``.

    Returns:
        The reason, and the hint (empty where there is none to give).
    """
    known_keys = list(known_keys)
    place = _PARSER_KEY.search(complaint)
    where = place[1] if place else ""
    nested = _NO_NESTED.search(complaint)
    unknown = nested or _UNKNOWN_ARGUMENT.search(complaint) or _UNKNOWN_KEY.search(complaint)
    if unknown:
        return _unknown_key(".".join(unknown.groups()), "" if nested else where, complaint, known_keys)
    values = [value for literal in _LITERAL.findall(complaint) for value in _VALUES.findall(literal)]
    found = _FOUND.search(complaint)
    if values and found:
        inner = _PARSER_KEY.findall(complaint)[-1]
        key = where if inner == where else f"{where}.{inner}"
        return f"{key}={found[1].strip()} is not a valid value.", nearest(found[1].strip(), values)
    missing = _NO_IMPORT.search(complaint)
    if missing:
        name = missing[missing.lastindex or 0]
        return f"{where}: there is no class {name!r}.", nearest(name, class_names)
    expected = _EXPECTED.search(complaint)
    if expected:
        kind = re.sub(r"<class '([\w.]+)'>", r"\1", expected[1])
        value = expected[2].strip()
        if value == "None":
            return f"{where} is missing.", "Give it in a file: --config FILE.yaml"
        return f"{where}: expected {kind}, found {value!r}.", ""
    lines = [line.strip(" -") for line in complaint.splitlines() if line.strip()]
    return " ".join(lines)[:300], ""


def _unknown_key(key: str, where: str, complaint: str, known_keys: list[str]) -> tuple[str, str]:
    """Look for the nearest key beside the unknown one: in its class, or in the whole configuration."""
    owner = _CLASS_PATH.search(complaint)
    target = pydoc.locate(owner[1]) if owner else None
    if callable(target):
        options = [name for name in inspect.signature(target).parameters if name != "self"]
        return f"{where}: {owner[1] if owner else ''} has no option {key!r}.", nearest(key, options)
    full = f"{where}.{key}" if where and not key.startswith(f"{where}.") else key
    return f"unknown key {full}.", nearest(full, known_keys)


class _Strict(yaml.SafeLoader):
    """A YAML loader that does not let the last of two equal keys win."""


def _strict_mapping(loader: _Strict, node: yaml.MappingNode) -> dict[Hashable, object]:
    seen: dict[object, int] = {}
    for key_node, _ in node.value:
        key, line = loader.construct_object(key_node), key_node.start_mark.line + 1
        if key in seen:
            raise InputError(f"key {key!r} stands twice, in lines {seen[key]} and {line}.", "Rename one.")
        seen[key] = line
    return loader.construct_mapping(node, deep=True)


_Strict.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _strict_mapping)


def refuse_repeated_keys(files: Iterable[Path]) -> None:
    """Look for keys that stand twice in a mapping: YAML would silently keep the last.

    Raises:
        InputError: The file, the key and its lines.
    """
    for file in files:
        try:
            yaml.load(file.read_text(encoding="utf-8"), _Strict)
        except InputError as error:
            raise InputError(f"{file}: {error}") from error
        except yaml.YAMLError:
            continue  # the parser's own complaint comes later, with its place
