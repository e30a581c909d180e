"""Checks a folder as a whole before its model runs: names, shapes, dtypes, digests, and one input's pass."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from adamerge.digests import file_digest, sha256
from adamerge.errors import InputError, shortlist
from adamerge.mixture.model import Mixture
from adamerge.models import Backbone, Head, ModuleBackbone
from adamerge.models.opening import probe_of
from adamerge.state import State, info

_DECIDING = ("kind", "tasks", "routing", "blocks", "aliases", "flow", "heads")  # of a document
_RECORDED = (".safetensors", ".json", ".txt", ".model")
KINDS = ("checkpoint", "mixture")


class Misfit(ValueError):
    """A part of a folder that is missing, strange or of another type."""


def require_structure(document: Any) -> None:
    """Check the types of a document's parts.

    Raises:
        Misfit: A part is missing or of another type; it is named.
    """
    _require(isinstance(document, dict), "it is no JSON object")
    _require(document.get("kind") in KINDS, f"kind is {document.get('kind')!r}")
    heads, classes = document.get("heads"), document.get("classes")
    _require(_is_tree(heads, dict) and bool(heads), "heads are no objects by task")
    _require(all(isinstance(row.get("normalize"), bool) for row in heads.values()), "a head has no normalize")
    _require(_is_tree(classes, list), "classes are no lists by task")
    _require(all(_are_texts(names) for names in classes.values()), "class names are no texts")
    if document["kind"] == "mixture":
        tasks, routing = document.get("tasks"), document.get("routing")
        _require(_are_texts(tasks) and len({*tasks}) == len(tasks), "tasks are no list of names")
        _require(_is_tree(document.get("blocks"), dict), "blocks are no objects by name")
        _require(_is_tree(document.get("aliases"), str), "aliases are no names")
        is_known = isinstance(routing, dict) and isinstance(routing.get("kind"), str)
        is_known = is_known and isinstance(routing.get("options"), dict)
        _require(routing is None or is_known, "routing is neither null nor a kind with options")


def seal(document: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Add the digests of a document's deciding parts and of the files beside it.

    Args:
        document: What `adamerge.json` will hold.
        folder: Where all other files are written already.
    """
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix in _RECORDED]
    rows = {path.relative_to(folder).as_posix(): file_digest(path) for path in files}
    rows.pop("adamerge.json", None)  # an older document, which this one replaces
    return document | {"digest": _digest(document), "files": rows}


def require_digests(document: Mapping[str, Any], folder: Path) -> None:
    """Compare a folder with the digests that its document holds; documents of older versions hold none.

    Raises:
        InputError: A file, or a part of the document, is not as it was written.
    """
    if "digest" in document and document["digest"] != _digest(document):
        raise InputError(f"{folder}: adamerge.json is not as it was written.", "Copy it again.")
    rows = document.get("files", {})
    _require(_is_tree(rows, str), "files are no digests by name")
    changed = [name for name, found in rows.items() if not _is_as_written(folder, name, found)]
    if changed:
        raise InputError(
            f"{folder} is damaged: missing, or not as written (SHA-256): {shortlist(changed)}.",
            "Copy the folder again. Where you changed it, remove its row from `files` in adamerge.json.",
        )


def require_whole(mixture: Mixture, folder: Path) -> None:
    """Check a loaded model's tensors against the backbone and one another, then let one input pass.

    Raises:
        InputError: What does not fit.
    """
    problems = [*_misshapen(mixture.backbone, mixture.shared), *_head_problems(mixture.heads)]
    if problems:
        raise InputError(f"{folder} is damaged: {shortlist(problems, 3)}.", "Copy it again.")
    probe = probe_of(mixture.backbone)
    if probe is None:
        return
    task = mixture.vectors.tasks[0] if mixture.vectors.tasks else None
    is_told = mixture.routing is not None and mixture.routing.reads == "task"
    with torch.no_grad(), mixture.evaluating():
        gates = mixture.gates(probe, task if is_told else None)
        features = mixture.features(probe, gates)
        for name, head in mixture.heads.items():
            logits = head.logits(features)
            _require(len(logits) == 1 and logits.dim() == 2, f"the head of {name!r} gives no logits")


def require_no_strange_tensors(names: Iterable[str], document: Mapping[str, Any]) -> None:
    """Check that every tensor of a mixture's file belongs to a part that its document names.

    Raises:
        Misfit: Some belong to none.
    """
    parts = ["shared/", *(f"experts/{name}/" for name in document["blocks"])]
    parts += [f"heads/{task}/" for task in document["heads"]]
    parts += ["router/"] if document["routing"] else []
    strange = [name for name in names if not name.startswith(tuple(parts))]
    _require(not strange, f"nothing reads {shortlist(strange)}")


def _digest(document: Mapping[str, Any]) -> str:
    parts = {name: document[name] for name in _DECIDING if name in document}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _is_as_written(folder: Path, name: str, digest: str) -> bool:
    file = folder / name
    return file.is_file() and folder.resolve() in file.absolute().parents and sha256(file) == digest


def _misshapen(backbone: Backbone, state: State) -> list[str]:
    """List tensors of other shapes than the module's, or of no floating dtype."""
    if not isinstance(backbone, ModuleBackbone):
        return []
    named = {**dict(backbone.module.named_parameters()), **dict(backbone.module.named_buffers())}
    shapes = {backbone.files[name]: tuple(x.shape) for name, x in named.items() if name in backbone.files}
    found = {name: tuple(info(state, name).shape) for name in shapes if name in state}
    return [
        f"{name} has shape {[*found[name]]} instead of {[*shapes[name]]}"
        for name in found
        if found[name] != shapes[name]
    ]


def _head_problems(heads: Mapping[str, Head]) -> list[str]:
    problems = []
    for task, head in heads.items():
        weight, bias = head.weight, head.bias
        if weight.dim() != 2 or not len(weight):
            problems.append(f"the head of {task!r} has shape {[*weight.shape]}")
        elif bias is not None and bias.shape != weight.shape[:1]:
            problems.append(
                f"the head of {task!r} has {len(weight)} rows and a bias of shape {[*bias.shape]}"
            )
        problems += [
            f"{name} of the head of {task!r} is not finite"
            for name, x in head.tensors.items()
            if not x.isfinite().all()
        ]
    return problems


def _is_tree(value: Any, kind: type) -> bool:
    """Tell whether a value is a mapping from names to values of one type."""
    return isinstance(value, dict) and all(isinstance(part, kind) for part in value.values())


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(part, str) for part in value)


def _require(holds: bool, problem: str) -> None:
    if not holds:
        raise Misfit(problem)
