"""Folders of sentence-transformers, whose encoder may lie in a sub-folder of its own (0_Transformer)."""

import json
from pathlib import Path, PurePosixPath
from typing import Any

MODULES = "modules.json"


def read_modules(root: Path) -> list[dict[str, Any]]:
    """Return the parts of a sentence-transformers folder in their order; none where it is no such folder."""
    try:
        modules = json.loads((root / MODULES).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return []
    known = isinstance(modules, list) and all(isinstance(module, dict) for module in modules)
    return modules if known else []


def transformer_folder(root: Path) -> Path:
    """Return where configuration, weights and tokenizer of a model folder lie.

    That is the folder itself, except for a sentence-transformers folder whose encoder is elsewhere in it.
    """
    for module in read_modules(root):
        inner, kind = module.get("path"), str(module.get("type"))
        if kind.rpartition(".")[2] == "Transformer" and isinstance(inner, str) and inner:
            path = PurePosixPath(inner)
            is_inside = not path.is_absolute() and ".." not in path.parts
            if is_inside and (root / inner / "config.json").is_file():
                return root / inner
    return root
