"""Files that come with the package, and the recipe of a run that names no method."""

import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from adamerge.documents import parse_document, read_mapping

_PARTS = ("coefficients", "objective", "optimizer", "edit", "shared", "relative_to", "adapters")


def configs() -> Path:
    """Folder of the configuration files: beside the package in a checkout, inside it in a wheel."""
    package = Path(__file__).parent
    return next(p for p in (package.parent / "configs", package / "configs") if p.is_dir())


def default_recipe() -> Path:
    """The method file of a run that names none."""
    return configs() / "methods" / "default.yaml"


def names_a_method(arguments: Sequence[str]) -> bool:
    """Return whether a file of a command line says how coefficients are learned: it stands for itself.

    Args:
        arguments: Of `adamerge fit`.

    Raises:
        InputError: A file cannot be read.
    """
    return any(_names_parts(read_mapping(file)) for file in config_files(arguments))


def named_parts(arguments: Sequence[str]) -> dict[str, str]:
    """Return the parts of a method that a command line itself names, and what it calls them.

    Options of a part, such as ``--model.optimizer.init_args.lr``, name none: they are the recipe's.
    """
    words = [*pairwise(arguments), (arguments[-1], "")] if arguments else []
    flags = {f"--model.{part}{ending}": part for part in _PARTS for ending in ("", ".class_path")}
    parts: dict[str, str] = {}
    for word, after in words:
        flag, equals, value = word.partition("=")
        if flag in flags:
            value = value if equals else after
            is_written_out = value.lstrip().startswith("{")
            parts[flags[flag]] = _class_of(parse_document(value, flag)) if is_written_out else value
    return parts


def recipe_under(parts: Mapping[str, str]) -> dict[str, Any]:
    """Return the default recipe as it lies under a command line.

    A part that the command line names by another class is left out, options and all: they were chosen for
    the recipe's class. Everything else keeps the recipe's values.

    Args:
        parts: What the command line names: see `named_parts`.
    """
    recipe = read_mapping(default_recipe())
    others = [part for part, name in parts.items() if not _is_same(recipe["model"].get(part), name)]
    for part in others:
        recipe["model"].pop(part, None)
    if others:
        names = (f"{part} {_leaf(parts[part])}" for part in others)
        recipe["method"] = f"{recipe['method']} with {', '.join(names)}"
    return recipe


def as_argument(document: Mapping[str, Any]) -> str:
    """Return a configuration as one word of a command line, for ``--config``."""
    return json.dumps(document)


def config_files(arguments: Sequence[str]) -> list[Path]:
    """Return the configuration files that a command line names, whether they exist or not.

    What begins with a brace is a configuration itself.
    """
    given = [value for flag, value in pairwise(arguments) if flag == "--config"]
    given += [argument.partition("=")[2] for argument in arguments if argument.startswith("--config=")]
    return [Path(file) for file in given if not file.lstrip().startswith("{")]


def _is_same(part: object, name: str) -> bool:
    """Return whether a name means the class of a part of the recipe."""
    path = _class_of(part)
    package = path.partition(".")[0]
    return bool(path) and _leaf(name) == _leaf(path) and name.partition(".")[0] in (package, _leaf(path))


def _class_of(part: object) -> str:
    """Return the class path of a part, as a file has it."""
    return str(part.get("class_path", "")) if isinstance(part, Mapping) else ""


def _leaf(path: str) -> str:
    return path.rpartition(".")[2]


def _names_parts(document: Mapping[str, Any]) -> bool:
    model = document.get("model")
    return isinstance(model, dict) and any(model.get(part) is not None for part in _PARTS)
