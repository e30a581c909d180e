"""Turns a parser's long complaint into the reason and the nearest valid key, in three lines at most."""

import inspect
import pydoc
import re
from collections.abc import Iterable

from adamerge.errors import brief, nearest

_UNKNOWN_ARGUMENT = re.compile(r"unrecognized arguments: --?([\w.]+)")
_UNKNOWN_KEY = re.compile(
    r"""(?:(?:[Kk]ey|Option) |does not accept option )['"]([\w.]+)['"](?: is not (?:expected|accepted))?"""
    r"""(?:$|\. Got value: )""",
    re.M,
)
_NO_NESTED = re.compile(r"""Group ['"]([\w.]+)['"] does not accept nested key ['"]([\w.]+)['"]""")
_PARSER_KEY = re.compile(r"""Parser key "([\w.]+)":""")
_CLASS_PATH = re.compile(r"class_path[ =]'([\w.]+)'")
_LITERAL = re.compile(r"Expected a typing\.Literal\[(.*?)\]")
_FOUND = re.compile(r"(?:Got|Given) value: (.*)")
_EXPECTED = re.compile(r"Expected an? (.*?)\. Got value: (.*)")
_NO_IMPORT = re.compile(
    r"Expected a dot import path string: (\S+)|No module named '([\w.]+)'"
    r"|class_path '([\w.]+)':\s+module '[\w.]+' has no attribute"
)
_VALUES = re.compile(r"'([^']*)'")
_SUBTYPES = re.compile(r"Subtypes: \[(.*)\]")
_UNION_VALUE = re.compile(r"Given value: (.*)")
_NO_SUBCLASS = re.compile(
    r"(?:(?:Import path (\S+) )?does not correspond to a subclass of|Not a valid subclass of) (\w+)"
)
_OUTER = re.compile(r"\. Got value: Namespace\(.*")
_QUALIFIED = re.compile(r"<class '([\w.]+)'>|((?:\w+\.)+\w+)")
_WORDS = {"NoneType": "null", "str": "text"}
_OWN = "A class of your own is named MODULE.CLASS, with MODULE.py beside the file or in this folder."


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
    return _wrong_value(_full_key(complaint), where, complaint, class_names) or (_in_one_line(complaint), "")


def _wrong_value(key: str, where: str, complaint: str, class_names: Iterable[str]) -> tuple[str, str] | None:
    """Return what is wrong with the value of a key, where the complaint tells it."""
    values = [value for literal in _LITERAL.findall(complaint) for value in _VALUES.findall(literal)]
    found = _FOUND.search(complaint)
    if values and found:
        value = found[1].strip()
        return f"{key}={_cut(value)} is not a valid value.", nearest(value, values)
    missing = _NO_IMPORT.search(complaint)
    if missing:
        path = _CLASS_PATH.search(complaint)
        name = missing[missing.lastindex or 0]
        name = path[1] if path and path[1].startswith(f"{name}.") else name
        hint = nearest(name, class_names)
        return f"{where}: there is no class {brief(name)}.", hint if hint.startswith("Did") else _OWN
    expected = _EXPECTED.search(complaint)
    if expected and not _SUBTYPES.search(complaint, expected.end()):
        return _not_as_expected(key, expected[1], expected[2].strip())
    subtypes, given = _SUBTYPES.findall(complaint), _UNION_VALUE.search(complaint)
    wanted = _NO_SUBCLASS.search(complaint)
    value = _OUTER.sub("", given[1]).strip() if given else (found[1].strip() if found else "")
    if wanted and (not subtypes or wanted[2] in subtypes[-1]):
        value = value or wanted[1] or ""
        fitting = [name for name in class_names if _is_subclass(name, wanted[2])]
        return f"{key}={_cut(value)} is no {wanted[2]}.", nearest(value, fitting)
    return _not_as_expected(key, subtypes[-1], value) if subtypes and given else None


def _is_subclass(path: str, base: str) -> bool:
    """Return whether a class has a base class of this name, itself included."""
    return base in {kind.__name__ for kind in getattr(pydoc.locate(path), "__mro__", ())}


def _not_as_expected(key: str, kinds: str, value: str) -> tuple[str, str]:
    if value == "None":
        return f"{key} is missing.", "Give it in a file: --config FILE.yaml"
    return f"{key}: expected {_plain(kinds)}, found {brief(value)}.", ""


def _plain(kinds: str) -> str:
    """Write types as people do: ``int or null``."""
    named = _QUALIFIED.sub(lambda m: (m[1] or m[2]).rpartition(".")[2], kinds)
    if not re.fullmatch(r"[\w, ]+", named):
        return _cut(named)
    words = [_WORDS.get(word, word) for word in named.split(", ")]
    return " or ".join(words) if len(words) > 1 else named


def _full_key(complaint: str) -> str:
    """Join the keys that a complaint names from the outside in."""
    full = ""
    for key in _PARSER_KEY.findall(complaint):
        if key != full and not full.endswith(f".{key}"):
            full = key if not full or key.startswith(f"{full}.") else f"{full}.{key}"
    return full


def _cut(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:77]}..."


def _in_one_line(complaint: str) -> str:
    lines = [line.strip(" -") for line in complaint.splitlines() if line.strip()]
    return " ".join(lines)[:300]


def _unknown_key(key: str, where: str, complaint: str, known_keys: list[str]) -> tuple[str, str]:
    """Look for the nearest key beside the unknown one: in its class, or in the whole configuration."""
    owner = _CLASS_PATH.search(complaint)
    target = pydoc.locate(owner[1]) if owner else None
    if callable(target):
        options = [name for name in inspect.signature(target).parameters if name != "self"]
        return f"{where}: {owner[1] if owner else ''} has no option {key!r}.", nearest(key, options)
    full = f"{where}.{key}" if where and not key.startswith(f"{where}.") else key
    return f"unknown key {_cut(full)}.", nearest(full, known_keys)
