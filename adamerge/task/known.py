"""What is known of the adaptation images beforehand: the experts' features, and labels to learn on."""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn.functional import one_hot

from adamerge.cache import cache_folder
from adamerge.checkpoints.kept import keep, read_kept
from adamerge.checkpoints.settings import settings_digest
from adamerge.data.datasets import Images
from adamerge.data.module import Batch
from adamerge.models import Backbone
from adamerge.vectors import TaskVectors
from adamerge.vectors.origins import Filed
from adamerge.vectors.streamed import StreamedBlock

_FORMAT = 2  # one more whenever the same experts and images would give other features
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
        if facts is None:
            self.features[task] = compute()
            return
        self.features[task], is_mapped = kept(compute, [task, *facts])
        self._mapped |= {task} if is_mapped else set()

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


def facts_of(
    experts: TaskVectors,
    task: str,
    backbone: Backbone,
    images: Images,
    *,
    eval_batch_size: int,
    device: torch.device,
) -> list[str] | None:
    """Name all that an expert's features depend on, to the last bit; None where there is no telling.

    That is so of states in memory, of vectors in a form that may lose something, and of a backbone whose
    preprocessing has no name.
    """
    states = experts.origins.base, experts.origins.experts.get(task)
    as_they_are = all(isinstance(block, StreamedBlock) for block in experts.blocks.values())
    in_files = bool(experts.digests) and all(isinstance(state, Filed) for state in states)
    if not (as_they_are and in_files and backbone.transform_key):
        return None
    seen = hashlib.sha256(b"".join(images.digests())).hexdigest()
    root = getattr(states[0], "root", None)
    settings = settings_digest(root) if isinstance(root, Path) else ""
    function = f"{type(backbone).__name__} {settings}"
    arithmetic = _arithmetic(eval_batch_size, device)
    weights = [experts.digests["base"], experts.digests[task], *experts.names]
    return [*weights, seen, backbone.transform_key, function, arithmetic]


def _arithmetic(eval_batch_size: int, device: torch.device) -> str:
    """Name what the last bits of a forward pass depend on, beside the model and its input."""
    facts = [torch.__version__, "float32", torch.get_float32_matmul_precision(), torch.get_num_threads()]
    return json.dumps([*facts, eval_batch_size, device.type])


def kept(compute: Callable[[], Features], facts: Sequence[str]) -> tuple[Features, bool]:
    """Map what an earlier run wrote, or compute, write a file of the cache folder and map that.

    The file appears whole or not at all; a damaged one is replaced, after a warning.

    Returns:
        The features, and whether they are mapped: they are in memory where nothing can be written.
    """
    name = hashlib.sha256(json.dumps([_FORMAT, *facts]).encode()).hexdigest()[:32]
    file = cache_folder() / "features" / f"{name}.safetensors"
    found = read_kept(file)
    if found is None or "features" not in found:
        features = compute()
        found = keep({"features": features}, file)
        return found["features"], found["features"] is not features
    return found["features"], True
