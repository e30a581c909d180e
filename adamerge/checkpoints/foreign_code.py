"""Finds what a model folder asks to be run: nothing of it ever is, so such a folder is refused by name."""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from adamerge.errors import InputError, shortlist

_LARGE = 2**24  # bytes; no configuration is larger
_NOT_ASKING = ("tokenizer.json", "vocab.json", "added_tokens.json", "adamerge.json")
_KERNEL = re.compile(r"(_?attn|_?experts)_implementation(_internal)?|kernel_config")
_HUB_KERNEL = re.compile(r".*/.*", re.DOTALL)  # with prefixes, revisions and functions: paged|OWNER/NAME@v1:f


def require_no_code(folder: Path, role: str = "the model") -> None:
    """Refuse a folder whose configuration asks for code of its own, before a library reads it.

    Asked for is ``auto_map`` (classes of the folder's Python files), ``trust_remote_code``, attention
    kernels of the hub (compiled code), and modules of a sentence encoder that are not the library's.

    Args:
        folder: The model folder; a file asks for nothing.
        role: Who this is ("base"), for messages.

    Raises:
        InputError: A file asks for code; file, key and value are named.
    """
    asked = code_requests(folder)
    if asked:
        raise InputError(
            f"{role} ({folder}) asks for code of its own, which is never run: {shortlist(asked, 3)}.",
            "Give a model of a class that the library has; if this is one, remove these keys.",
        )


def code_notes(folders: Mapping[str, Path]) -> list[str]:
    """Describe what model folders ask to be run, where only their weights are read: one line a folder.

    Args:
        folders: Folders or files by role.
    """
    asked = {role: code_requests(folder) for role, folder in folders.items()}
    return [
        f"{role} ({folders[role]}) asks for code of its own, which is neither run nor copied: "
        f"{shortlist(requests, 2)}."
        for role, requests in asked.items()
        if requests
    ]


def code_requests(folder: Path) -> list[str]:
    """List what asks for code in a folder's JSON files: "FILE: KEY is VALUE".

    Args:
        folder: A model folder, or a file, which asks for nothing.
    """
    if not folder.is_dir():
        return []
    files = sorted([*folder.glob("*.json"), *folder.glob("*/*.json")])
    return [
        f"{file.relative_to(folder)}: {key} is {json.dumps(value)[:80]}"
        for file in files
        if file.is_file() and file.name not in _NOT_ASKING and file.stat().st_size <= _LARGE
        for key, value in _requests(_content(file), file.name)
    ]


def _content(file: Path) -> Any:
    """Read a JSON file; what is damaged asks for nothing, and its reader refuses it."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def _requests(document: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Walk a document, however deep it is, and give the keys that ask for code."""
    waiting: list[tuple[str, Any]] = [("", document)]
    while waiting:
        place, value = waiting.pop()
        pairs = value.items() if isinstance(value, dict) else ()
        pairs = enumerate(value) if isinstance(value, list) else pairs
        for key, part in pairs:
            if _asks(str(key), part, name):
                yield f"{place}{key}", part
            else:
                waiting.append((f"{place}{key}.", part))


def _asks(key: str, value: Any, file_name: str) -> bool:
    """Tell whether a setting makes a library run code that is not its own."""
    if key in ("auto_map", "trust_remote_code"):
        return bool(value)
    if file_name == "modules.json" and key == "type":
        return not (isinstance(value, str) and value.startswith("sentence_transformers."))
    if _KERNEL.fullmatch(key):
        parts = value.values() if isinstance(value, dict) else [value]
        return any(isinstance(part, str) and bool(_HUB_KERNEL.fullmatch(part)) for part in parts)
    return False
