"""Files that a user names: paths that can be written, YAML that is read with care, and JSON objects."""

import json
import re
import stat
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from adamerge.errors import InputError, brief

_MOST_BYTES = 16 * 2**20
_MOST_VALUES = 1_000_000  # of a document once its aliases are written out
_DEEPEST = 100
_LONGEST_PATH = 4000
_PATH_HINT = "Use letters, digits, '-', '_', '/'."
_HINT = "Give a YAML file in UTF-8, such as those of configs/."


class _Strict(yaml.SafeLoader):
    """A YAML loader that does not let the last of two equal keys win.

    As in the files that `adamerge fit` parses itself, 1e-2 is a number and 2026-11-30 a text.
    """

    yaml_implicit_resolvers = {  # noqa: RUF012  as PyYAML has it
        letter: [(tag, pattern) for tag, pattern in rows if not tag.endswith(":timestamp")]
        for letter, rows in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Strict.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _strict_mapping(loader: _Strict, node: yaml.MappingNode) -> dict[Hashable, object]:
    seen: dict[object, int] = {}
    loader.flatten_mapping(node)
    for key_node, _ in node.value:
        key, line = loader.construct_object(key_node, deep=True), key_node.start_mark.line + 1
        if not isinstance(key, Hashable):
            raise InputError(f"the key of line {line} is no name.", "Write NAME: VALUE.")
        if key in seen:
            raise InputError(f"key {key!r} stands twice, in lines {seen[key]} and {line}.", "Rename one.")
        seen[key] = line
    return loader.construct_mapping(node, deep=True)


_Strict.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _strict_mapping)


def read_text(file: Path, most: int = _MOST_BYTES) -> str:
    """Read a text file that a user names.

    Raises:
        InputError: It is missing, no regular file, too large, or no UTF-8.
    """
    try:
        facts = file.stat()
        if not stat.S_ISREG(facts.st_mode):  # a pipe or device may never end
            kind = "a folder" if stat.S_ISDIR(facts.st_mode) else "a pipe or a device"
            raise InputError(f"{brief(str(file))} is {kind}, not a file.", _HINT)
        if facts.st_size > most:
            raise InputError(f"{file} has {facts.st_size} bytes; at most {most} are read.", _HINT)
        text = file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{file} is no text in UTF-8 (byte {error.start}).", "Save it as UTF-8.") from error
    except FileNotFoundError as error:
        raise InputError(f"{brief(str(file))} does not exist.", _HINT) from error
    except (OSError, ValueError) as error:  # no permission, a name too long or with a NUL
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"{brief(str(file))} cannot be read: {reason}.", _HINT) from error
    return text


def read_mapping(file: Path) -> dict[str, Any]:
    """Read a YAML file whose document is a mapping.

    Raises:
        InputError: It cannot be read, is no YAML, repeats a key, nests or grows without reason, or holds
            something else than a mapping.
    """
    document = parse_document(read_text(file), str(file))
    if document is None:
        raise InputError(f"{file} is empty.", _HINT)
    if not isinstance(document, dict):
        raise InputError(f"{file} holds a {type(document).__name__}, not keys with values.", _HINT)
    wrong = next((key for key in document if not isinstance(key, str)), None)
    if wrong is not None or None in document:
        raise InputError(f"{file}: the key {wrong!r} is no name.", "Write NAME: VALUE.")
    return document


def parse_document(text: str, name: str) -> Any:
    """Parse YAML; see `read_mapping`."""
    try:
        _require_size(yaml.compose(text, Loader=yaml.SafeLoader), name)
        return yaml.load(text, _Strict)
    except InputError as error:
        raise InputError(f"{name}: {error}") from error
    except yaml.YAMLError as error:
        raise InputError(f"{name} is no YAML: {_reason(error)}.", _HINT) from error
    except (RecursionError, ValueError, TypeError, OverflowError) as error:
        reason = "it nests too deep" if isinstance(error, RecursionError) else str(error).splitlines()[0]
        raise InputError(f"{name} is no configuration: {reason[:200]}.", _HINT) from error


def _reason(error: yaml.YAMLError) -> str:
    """Return what is wrong and where, in one line."""
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    return f"line {mark.line + 1}, {problem}" if mark else problem[:200]


def _require_size(root: yaml.Node | None, name: str) -> None:
    """Refuse aliases that would be written out a million times, aliases of themselves, and deep nesting."""
    sizes: dict[int, int] = {}
    open_nodes: set[int] = set()

    def size(node: yaml.Node, depth: int) -> int:
        if depth > _DEEPEST or id(node) in open_nodes:
            raise InputError(f"it nests deeper than {_DEEPEST} levels.", "Write it flat.")
        if id(node) not in sizes:
            open_nodes.add(id(node))
            sizes[id(node)] = 1 + sum(size(child, depth + 1) for child in _children(node))
            open_nodes.remove(id(node))
        if sizes[id(node)] > _MOST_VALUES:
            raise InputError(f"its aliases stand for more than {_MOST_VALUES} values.", "Write them out.")
        return sizes[id(node)]

    if root is not None:
        size(root, 0)


def _children(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []


def require_path(key: str, text: str) -> None:
    """Check that a path can be written to.

    Raises:
        InputError: It is blank, has characters or a length that no file system has, or leads through a file.
    """
    require_source(key, text)
    path = Path(text)
    if any(ord(letter) < 32 or 127 <= ord(letter) < 160 for letter in text):  # control codes
        raise InputError(f"{key}={brief(text)} cannot be a path.", _PATH_HINT)
    for part in (path, *path.parents):
        if part.exists() and not part.is_dir() and (part != path or not part.is_file()):
            raise InputError(f"{key}={brief(text)}: {part} is no folder.", "Choose another path.")


def require_source(key: str, text: str) -> None:
    """Check that a text can be a path at all, whether it exists or not.

    Raises:
        InputError: It is blank, or has characters or a length that no file system has.
    """
    parts = [part.encode(errors="replace") for part in Path(text).parts]
    too_long = len(text) > _LONGEST_PATH or any(len(part) > 255 for part in parts)
    if not text.strip() or "\0" in text or too_long:
        raise InputError(f"{key}={brief(text)} cannot be a path.", _PATH_HINT)


def read_object(file: Path) -> dict[str, Any]:
    """Read a JSON object; empty where there is none, so that a format can be recognised by its keys."""
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return document if isinstance(document, dict) else {}
