"""Zero-shot heads of a text tower, kept on disk by content: names say nothing of weights."""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from adamerge.cache import cache_folder
from adamerge.checkpoints import open_checkpoint
from adamerge.checkpoints.kept import keep, read_kept
from adamerge.checkpoints.settings import settings_digest
from adamerge.data.tasks import TaskSpec
from adamerge.errors import InputError
from adamerge.models.heads import Head

_RECIPE = 2  # of `Head.zero_shot`; another number leaves the heads of older versions alone


class TextTower(NamedTuple):
    """A text tower, loaded.

    Attributes:
        encode: From prompts to text features.
        scale: exp(logit scale).
    """

    encode: Callable[[list[str]], Float[Tensor, "text dim"]]
    scale: float


def zero_shot(
    folder: Path, library: str, load: Callable[[], TextTower], tasks: Mapping[str, TaskSpec]
) -> dict[str, Head]:
    """Give every task's zero-shot head: from the cache, or built and kept there.

    Heads lie under `cache_folder`, by the SHA-256 of the model's weights, configuration and tokenizer
    files, the library, the class names and the templates. Where nothing can be written, nothing is kept.

    Args:
        folder: The model folder.
        library: Name and version of what reads it.
        load: Loads the text tower; called at most once, and only where a head is not in the cache.
        tasks: Class names and templates by task name.

    Raises:
        InputError: A task has no class names.
    """
    for task, spec in tasks.items():
        if not spec.classes:
            hint = "Give `classes: [...]` in label order, or a `head` file."
            raise InputError(f"task {task!r} has no class names.", hint)
    model = _digest(folder, library)
    heads: dict[str, Head] = {}
    tower = None
    for task, spec in tasks.items():
        row = json.dumps([model, _RECIPE, spec.classes, spec.templates])
        file = cache_folder() / "heads" / f"{hashlib.sha256(row.encode()).hexdigest()}.safetensors"
        found = read_kept(file) or {}
        if "weight" not in found:
            tower = tower or load()
            with torch.no_grad():
                head = Head.zero_shot(tower.encode, spec.classes, spec.templates, tower.scale)
            found = keep({"weight": head.weight}, file)
        heads[task] = Head(found["weight"].clone())
    return heads


def without_text_tower(folder: Path, why: str) -> InputError:
    """Give the error that says what zero-shot heads of a model folder lack."""
    return InputError(
        f"{folder} has no text tower to make zero-shot heads with: {why}",
        "Give as base the complete CLIP with its tokenizer, or a `head` file for each task.",
    )


def _digest(folder: Path, library: str) -> str:
    """Hash what determines text features: weights, and every small file that may configure or tokenize."""
    parts = [library, open_checkpoint(folder, role="base").file_digest(), settings_digest(folder)]
    parts += [torch.__version__, str(torch.get_num_threads())]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
