"""Files that come with the package, and the recipe of a run that names no method."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

_PARTS = ("coefficients", "objective", "optimizer", "edit", "shared", "relative_to", "adapters")


def configs() -> Path:
    """Folder of the configuration files: beside the package in a checkout, inside it in a wheel."""
    package = Path(__file__).parent
    return next(p for p in (package.parent / "configs", package / "configs") if p.is_dir())


def default_recipe() -> Path:
    """The method file of a run that names none."""
    return configs() / "methods" / "default.yaml"


def names_a_method(arguments: Sequence[str]) -> bool:
    """Tell whether a command line, or a file that it names, says how coefficients are learned.

    Options of a part, such as ``--model.optimizer.init_args.lr``, name none: they are the recipe's.

    Args:
        arguments: Of `adamerge fit`; files that cannot be read say nothing here.
    """
    flags = [argument.partition("=")[0].removeprefix("--") for argument in arguments]
    named = {f"model.{part}{ending}" for part in _PARTS for ending in ("", ".class_path")}
    if not named.isdisjoint(flags):
        return True
    return any(_names_parts(_read(file)) for file in config_files(arguments))


def config_files(arguments: Sequence[str]) -> list[Path]:
    """Give the configuration files that a command line names, whether they exist or not."""
    given = [value for flag, value in pairwise(arguments) if flag == "--config"]
    given += [argument.partition("=")[2] for argument in arguments if argument.startswith("--config=")]
    return [Path(file) for file in given]


def _names_parts(document: Mapping[str, Any]) -> bool:
    model = document.get("model")
    return isinstance(model, dict) and any(model.get(part) is not None for part in _PARTS)


def _read(file: Path) -> Mapping[str, Any]:
    """Read a file as far as it can be read: the parser complains later, with its place."""
    try:
        document = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return document if isinstance(document, dict) else {}
