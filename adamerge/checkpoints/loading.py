"""The line of Python that opens a merged model."""

import shlex
from contextlib import suppress
from pathlib import Path
from typing import Any

from adamerge.checkpoints.header import read_header
from adamerge.documents import read_object

_HEADS = "heads.safetensors"


def loading_code(path: Path) -> str:
    """Return the expression that opens a merged model in the library that its files are made for.

    The library's own class would put the base's last layer, or none, on a merged body where the experts'
    classifiers lie beside it: such a folder is opened by adamerge.

    Args:
        path: A folder in the layout of open_clip, sentence-transformers, timm or transformers, a routed
            model's folder, or a safetensors file.
    """
    place = str(path)
    if path.is_file() or not path.is_dir():
        return f"safetensors.torch.load_file({place!r})"
    function, is_local_dir = _opener(path, read_object(path / "config.json"))
    weights = ", pretrained=True" if function.startswith("timm.") else ""  # without it, timm draws them
    return f"{function}({(f'local-dir:{place}' if is_local_dir else place)!r}{weights})"


def loading_advice(path: Path) -> str:
    """Return what the closing line of a command says: how a merged model is opened.

    Of experts' classifiers beside the weights, `adamerge export` makes plain checkpoints.

    Args:
        path: As for `loading_code`.
    """
    advice = f"Load it: {loading_code(path)}"
    document = read_object(path / "adamerge.json")
    if document.get("kind") != "checkpoint" or not _has_experts_classifiers(document) or _corrects(path):
        return advice
    return f"{advice}; plain classifiers: adamerge export {shlex.quote(str(path))} --task NAME --out DIR"


def _opener(path: Path, config: dict[str, Any]) -> tuple[str, bool]:
    """Return the function that opens a folder, and whether it wants the prefix ``local-dir:``."""
    document = read_object(path / "adamerge.json")
    is_routed = document.get("kind", "checkpoint") != "checkpoint"
    layouts = (
        (is_routed or _has_experts_classifiers(document), "adamerge.load", False),
        ((path / "open_clip_config.json").exists(), "open_clip.create_model", True),
        ((path / "modules.json").exists(), "sentence_transformers.SentenceTransformer", False),
        (isinstance(config.get("architecture"), str), "timm.create_model", True),
        (bool(config.get("architectures")), f"transformers.{_class_of(config)}.from_pretrained", False),
    )
    matches = [(function, prefix) for matches, function, prefix in layouts if matches]
    return matches[0] if matches else ("adamerge.open_checkpoint", False)


def _has_experts_classifiers(document: dict[str, Any]) -> bool:
    """Return whether the tasks' heads are tensors of experts' own files, which the merged weights lack."""
    heads = document.get("heads")
    rows = heads if isinstance(heads, dict) and set(heads) != {"merged"} else {}
    return any(isinstance(row, dict) and bool(row.get("names")) for row in rows.values())


def _corrects(path: Path) -> bool:
    """Return whether a head corrects features (Surgery), as no plain checkpoint does."""
    with suppress(OSError, ValueError):
        return any(name.endswith("/up") for name in read_header(path / _HEADS)[0])
    return False


def _class_of(config: dict[str, Any]) -> str:
    return str((config.get("architectures") or ["AutoModel"])[0])
