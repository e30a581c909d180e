"""The line of Python that opens a merged model."""

import json
from pathlib import Path
from typing import Any

_WITH_HEAD = ("Classification", "ForMaskedLM", "ForPreTraining")  # what transformers' classes put on a body


def loading_code(path: Path) -> str:
    """Return the expression that opens a merged model in the library that its files are made for.

    The library's own class would put the base's last layer on a merged body where the tasks' classifiers lie
    beside it: such a folder is opened by adamerge.

    Args:
        path: A folder in the layout of open_clip, sentence-transformers, timm or transformers, a routed
            model's folder, or a safetensors file.
    """
    place = str(path)
    if path.is_file() or not path.is_dir():
        return f"safetensors.torch.load_file({place!r})"
    function, is_local_dir = _opener(path, _config(path / "config.json"))
    return f"{function}({(f'local-dir:{place}' if is_local_dir else place)!r})"


def _opener(path: Path, config: dict[str, Any]) -> tuple[str, bool]:
    """Return the function that opens a folder, and whether it wants the prefix ``local-dir:``."""
    document = _config(path / "adamerge.json")
    is_routed = document.get("kind", "checkpoint") != "checkpoint"
    layouts = (
        (is_routed or _has_heads_of_tasks(document, config), "adamerge.load", False),
        ((path / "open_clip_config.json").exists(), "open_clip.create_model", True),
        ((path / "modules.json").exists(), "sentence_transformers.SentenceTransformer", False),
        (isinstance(config.get("architecture"), str), "timm.create_model", True),
        (bool(config.get("architectures")), f"transformers.{_class_of(config)}.from_pretrained", False),
    )
    matches = [(function, prefix) for matches, function, prefix in layouts if matches]
    return matches[0] if matches else ("adamerge.open_checkpoint", False)


def _has_heads_of_tasks(document: dict[str, Any], config: dict[str, Any]) -> bool:
    """Return whether the tasks' heads are others than the one with which the library opens the model."""
    heads = document.get("heads") or {}
    has_own_head = "architecture" in config or _class_of(config).endswith(_WITH_HEAD)
    return has_own_head and bool(heads) and set(heads) != {"merged"}


def _class_of(config: dict[str, Any]) -> str:
    return str((config.get("architectures") or ["AutoModel"])[0])


def _config(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}
