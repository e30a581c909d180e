"""The files of a benchmark: configurations that are shipped, read and copied."""

import shutil
from pathlib import Path
from typing import Any

import yaml

from adamerge.atomic import atomic_folder
from adamerge.data.tasks import TaskSpec
from adamerge.documents import read_mapping, require_source
from adamerge.errors import InputError
from adamerge.names import require_file_names
from adamerge.shipped import configs

_SUFFIX = ".yaml"  # of method files


def method_file(method: str) -> Path | None:
    """Find the file of an adaptive method: a path, or the name of one of configs/methods."""
    require_source("methods", method)
    path = Path(method) if method.endswith(_SUFFIX) else configs() / "methods" / f"{method}{_SUFFIX}"
    return path if path.is_file() else None


def method_name(method: str) -> str:
    """Give what a method is called in tables: a file goes by its stem."""
    return Path(method).stem if method.endswith(_SUFFIX) else method


def no_benchmark(file: object, error: Exception) -> InputError:
    """Say what a benchmark's file needs."""
    return InputError(
        f"{file} is no benchmark: {type(error).__name__} {error}.",
        "It needs model.base, model.experts and data.tasks; see configs/benchmarks/embedded.yaml.",
    )


def read_document(config: Path) -> dict[str, Any]:
    """Read a benchmark's YAML file as it is.

    Raises:
        InputError: The file is no benchmark.
    """
    return read_mapping(config)


def read_benchmark(config: Path, *parts: str) -> list[Any]:
    """Read parts of a benchmark's YAML file, such as "model" and "data"; tasks become rows.

    Raises:
        InputError: The file is no benchmark.
    """
    return parts_of(read_document(config), config, *parts)


def parts_of(document: dict[str, Any], name: object, *parts: str) -> list[Any]:
    """Give parts of a document that was read; see `read_benchmark`."""
    try:
        found = [dict(document[part]) for part in parts]
        for part in found:
            if "tasks" in part:
                require_file_names(dict(part["tasks"]))
                part["tasks"] = {task: TaskSpec(**row) for task, row in part["tasks"].items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise no_benchmark(name, error) from error
    return found


class _Dumper(yaml.SafeDumper):
    """Writes texts of several lines as they are."""


_Dumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar(
        "tag:yaml.org,2002:str", text, style="|" if "\n" in text else None
    ),
)


def dump(document: dict[str, Any]) -> str:
    """Write a configuration as YAML that people can read."""
    return yaml.dump(document, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def copy_folder(source: Path, target: Path) -> None:
    """Copy a folder, replacing the old copy once the new one is complete."""
    with atomic_folder(target, overwrite=True) as folder:
        shutil.copytree(source, folder, dirs_exist_ok=True)
