"""Classes that a configuration names: those of one's own lie beside it, or in the working folder."""

import importlib
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

from adamerge.documents import parse_document, read_mapping
from adamerge.errors import InputError, brief, nearest
from adamerge.shipped import config_files

_PARTS = ("objective", "coefficients", "optimizer", "adapters")


@contextmanager
def own_classes(arguments: Sequence[str], *beside: Path) -> Iterator[None]:
    """Look for modules beside the configuration files and in the working folder, too, for a while.

    Installed modules come first; what was imported from these folders is forgotten at the end, since another
    configuration may have other modules of the same names.

    Args:
        arguments: Of a command, whose ``--config`` files count.
        beside: More files whose folders count.
    """
    files = [*config_files(arguments), *beside]
    folders = dict.fromkeys(str(folder) for folder in (*(f.absolute().parent for f in files), Path.cwd()))
    path, known = list(sys.path), set(sys.modules)
    sys.path.extend(folder for folder in folders if folder not in path)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path[:] = path
        for name in set(sys.modules) - known:
            if _lies_in(sys.modules[name], folders) and not _lies_in(sys.modules[name], path):
                del sys.modules[name]


def _lies_in(module: ModuleType, folders: Iterable[str]) -> bool:
    """Return whether a module was read from one of these folders."""
    origin = getattr(module, "__file__", None)
    return bool(origin) and any(folder and Path(origin).is_relative_to(folder) for folder in folders)


def require_classes(arguments: Sequence[str]) -> None:
    """Import the classes that a command line and its files name, before anything is opened.

    Raises:
        InputError: A module cannot be imported, or has no such class.
    """
    for key, path in _class_paths(arguments):
        _require_class(key, path)


def class_named(path: str, packages: Iterable[ModuleType]) -> Any:
    """Return the class of a path, or of a bare name of a package; None where there is none."""
    module, _, name = path.rpartition(".")
    if not module:
        return next((getattr(package, name) for package in packages if hasattr(package, name)), None)
    try:
        return getattr(importlib.import_module(module), name, None)
    except Exception:  # told by `require_classes`
        return None


def _require_class(key: str, path: str) -> None:
    module, _, name = path.rpartition(".")
    try:
        found = importlib.import_module(module)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}."):
            raise InputError(
                f"{key}: there is no module {brief(module)} of class {brief(path)}.",
                "A class of your own is named MODULE.CLASS: MODULE.py beside the file or in this folder.",
            ) from error
        reason = (str(error).splitlines() or [""])[0]
        raise InputError(
            f"{key}: module {module!r} cannot be imported: {type(error).__name__} {reason[:200]}."
        ) from error
    if not hasattr(found, name):
        classes = {known for known, value in vars(found).items() if isinstance(value, type)}
        classes |= {known for known in getattr(found, "__all__", ()) if known[:1].isupper()}
        where = getattr(found, "__file__", None)
        is_own = bool(where) and "site-packages" not in where and module.partition(".")[0] != "adamerge"
        raise InputError(
            f"{key}: there is no class {path!r}{f' in {where}' if is_own else ''}.", nearest(name, classes)
        )


def _class_paths(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield key and path of every class with a module of its own that is named anywhere."""
    documents = [read_mapping(file) for file in config_files(arguments)]
    found = [pair for document in documents for pair in _in(document, "")]
    for word, after in [*pairwise(arguments), *((word, "") for word in arguments[-1:])]:
        flag, equals, value = word.partition("=")
        value = value if equals else after
        key = flag.removeprefix("--").removesuffix(".class_path")
        if not flag.startswith("--") or not value:
            continue
        if key.startswith("model.") and key.rpartition(".")[2] in _PARTS and not value.startswith("{"):
            found.append((key, value))
        elif value.startswith(("{", "[")) and "class_path" in value:
            found += _in(parse_document(value, flag), key)
    yield from ((key, path) for key, path in found if _has_module(path))


def _has_module(path: object) -> bool:
    return isinstance(path, str) and "." in path and all(part.isidentifier() for part in path.split("."))


def _in(document: Any, key: str) -> Iterator[tuple[str, Any]]:
    if isinstance(document, Mapping):
        if "class_path" in document:
            yield key, document["class_path"]
        for name, value in document.items():
            yield from _in(value, f"{key}.{name}" if key else str(name))
    elif isinstance(document, list):
        for value in document:
            yield from _in(value, key)
