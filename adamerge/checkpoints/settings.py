"""What decides a model's results beside its weights: configurations, processors, tokenizers, templates."""

import hashlib
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adamerge.digests import sha256

_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".vocab", ".bpe", ".tiktoken")
_IRRELEVANT = re.compile(  # to what a model computes: notes of trainings, indices of weights
    r"adamerge\.json|.*\.index\.json|generation_config\.json|(trainer_state|all_results|train_results"
    r"|eval_results|inputs|result|results|manifest)\.json|requirements.*\.txt|licen[cs]e.*|readme.*|merges_log\.txt",
    re.IGNORECASE,
)
_SILENT = ("_name_or_path", "_commit_hash", "transformers_version")  # keys that no result depends on
_WORDY, _LONG = 2**17, 200  # bytes of a file, and characters of a value, that are recorded as they are


def settings_files(folder: Path) -> list[Path]:
    """List the files of a model folder, and one level below, that decide its results beside the weights.

    Args:
        folder: A model folder; a file has none, and nor has what does not exist.
    """
    if not folder.is_dir():
        return []
    found = [path for path in (*folder.glob("*"), *folder.glob("*/*")) if path.suffix in _SUFFIXES]
    return sorted(p for p in found if p.is_file() and not _IRRELEVANT.fullmatch(p.name))


def settings_of(folder: Path) -> dict[str, Any]:
    """Describe these files so that a later change can be named: by key where they are small JSON objects.

    Args:
        folder: The model folder.

    Returns:
        By relative path, settings and their values, or the SHA-256 of what is long.
    """
    return {path.relative_to(folder).as_posix(): _described(path) for path in settings_files(folder)}


def settings_digest(folder: Path) -> str:
    """Hash these files' names and bytes, for keys of what is kept."""
    rows = [f"{path.relative_to(folder).as_posix()} {sha256(path)}" for path in settings_files(folder)]
    return hashlib.sha256("\n".join(rows).encode()).hexdigest()


def _described(file: Path) -> Any:
    if file.suffix == ".json" and file.stat().st_size <= _WORDY:
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            found = None
        if isinstance(found, dict):
            return {key: _short(value) for key, value in found.items() if key not in _SILENT}
    return f"sha256 {sha256(file)}"


def _short(value: Any) -> Any:
    """Shorten a value to what can be compared: long ones by their SHA-256."""
    if isinstance(value, float) and math.isnan(value):  # it equals nothing
        return "nan"
    text = json.dumps(value, sort_keys=True)
    if isinstance(value, Mapping) and value and len(text) <= 20 * _LONG:
        return {str(key): _short(part) for key, part in value.items()}
    if len(text) > _LONG:
        return f"sha256 {hashlib.sha256(text.encode()).hexdigest()}"
    return value
