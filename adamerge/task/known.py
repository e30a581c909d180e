"""What is known of the adaptation images beforehand: the experts' features, and labels to learn on."""

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from jaxtyping import Float, Int64
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn.functional import one_hot

from adamerge.cache import cache_folder
from adamerge.checkpoints.writing import save_tensors
from adamerge.data.datasets import Images
from adamerge.data.module import Batch
from adamerge.digests import remembered
from adamerge.errors import EnvironmentProblem
from adamerge.models import Backbone
from adamerge.vectors import TaskVectors
from adamerge.vectors.origins import Filed
from adamerge.vectors.streamed import StreamedBlock

_FORMAT = 1  # one more whenever the same experts and images would give other features
Features = Float[Tensor, "image dim"]


class Known:
    """The experts' features and the labels of adaptation images, of which a batch takes its rows.

    Features that stand in a file of the cache folder are mapped from there, wherever the batch is; all else
    is on its device.
    """

    def __init__(self) -> None:
        self.features: dict[str, Features] = {}
        self.labels: dict[str, Float[Tensor, "image class"]] = {}
        self._mapped: set[str] = set()

    def teach(self, task: str, compute: Callable[[], Features], facts: Sequence[str] | None = None) -> None:
        """Take the features that a task's own expert gives its images.

        Args:
            task: The task.
            compute: Gives them.
            facts: All that they depend on (see `facts_of`), if a file may keep them for the next run.
        """
        found = None if facts is None else kept(compute, [task, *facts])
        self._mapped |= {task} if found is not None else set()
        self.features[task] = compute() if found is None else found

    def label(self, task: str, labels: Int64[Tensor, " image"], n_classes: int) -> None:
        """Take the labels of a task's images."""
        self.labels[task] = one_hot(labels, n_classes).float()

    def to(self, device: torch.device) -> None:
        """Move what no file holds to a device."""
        self.labels = {task: rows.to(device) for task, rows in self.labels.items()}
        for task in self.features.keys() - self._mapped:
            self.features[task] = self.features[task].to(device)

    def added_to(self, batch: Batch) -> Batch:
        """Give the batch with the rows of its images: "teacher" and "labels", where there are any."""
        return {task: part | self._rows(task, part) for task, part in batch.items()}

    def _rows(self, task: str, part: dict[str, Tensor]) -> dict[str, Tensor]:
        known = {"teacher": self.features.get(task), "labels": self.labels.get(task)}
        return {
            name: rows[part["index"].to(rows.device)].to(part["index"].device)
            for name, rows in known.items()
            if rows is not None
        }


def facts_of(experts: TaskVectors, task: str, backbone: Backbone, images: Images) -> list[str] | None:
    """Name all that an expert's features depend on; None where there is no telling.

    That is so of states in memory, of vectors in a form that may lose something, and of a backbone whose
    preprocessing has no name.
    """
    states = experts.origins.base, experts.origins.experts.get(task)
    as_they_are = all(isinstance(block, StreamedBlock) for block in experts.blocks.values())
    in_files = bool(experts.digests) and all(isinstance(state, Filed) for state in states)
    if not (as_they_are and in_files and backbone.transform_key):
        return None
    seen = hashlib.sha256(b"".join(images.digests())).hexdigest()
    function = f"{type(backbone).__name__} {_configured(states[0])}"
    arithmetic = f"{torch.__version__} float32"
    weights = [experts.digests["base"], experts.digests[task], *experts.names]
    return [*weights, seen, backbone.transform_key, function, arithmetic]


def _configured(base: object) -> str:
    """Hash what tells a base's architecture, such as heads, activation and pooling, beside its weights."""
    root = getattr(base, "root", None)
    if not isinstance(root, Path):
        return ""
    folder = root if root.is_dir() else root.parent
    found = sorted([*folder.glob("*.json"), *folder.glob("*/config.json")])
    return hashlib.sha256(b"".join(file.read_bytes() for file in found)).hexdigest()


def kept(compute: Callable[[], Features], facts: Sequence[str]) -> Features | None:
    """Map what an earlier run wrote, or compute, write a file of the cache folder and map that.

    The file appears whole or not at all; a damaged one is replaced.

    Returns:
        The mapped features; None where nothing can be written.
    """
    name = hashlib.sha256(json.dumps([_FORMAT, *facts]).encode()).hexdigest()[:32]
    file = cache_folder() / "features" / f"{name}.safetensors"
    found = _read(file)
    if found is None:
        with suppress(OSError, EnvironmentProblem):
            features = compute()
            save_tensors({"features": features, "digest": _digest(features)}, file)
            found = _read(file)
    return found


def _read(file: Path) -> Features | None:
    """Map a file whose features are what its digest says; None where there is no such file."""
    try:
        with safe_open(str(file), framework="pt") as opened:
            features, digest = (opened.get_tensor(name) for name in ("features", "digest"))
        state = remembered("features", [file], lambda: str(torch.equal(_digest(features), digest)))
    except (OSError, SafetensorError, ValueError):
        return None
    return features if state == "True" else None


def _digest(features: Features) -> Tensor:
    digest = hashlib.sha256(features.contiguous().numpy().tobytes()).digest()
    return torch.tensor([*digest], dtype=torch.uint8)
