"""The experts with their images, as statistics are collected from them."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from adamerge.atomic import write_text
from adamerge.cache import warn_of_damage, warn_of_no_room
from adamerge.errors import DataError, EnvironmentProblem, InputError, shortlist
from adamerge.models.base import Backbone
from adamerge.models.grams import Trace, trace
from adamerge.models.heads import Head
from adamerge.progress import track
from adamerge.state import State

Inputs = Tensor | Callable[[], Tensor]


@dataclass(frozen=True, kw_only=True, eq=False)
class Experts:
    """The experts with their images; see `Statistics`."""

    backbone: Backbone
    heads: Mapping[str, Head]
    images: Mapping[str, Inputs]
    expert_weights: Callable[[str], State]
    samples: int
    batch_size: int
    seed: int
    budget: int
    device: torch.device
    folder: Path
    keys: Mapping[str, str]

    def weights(self, task: str) -> dict[str, Tensor]:
        """Give all that the backbone reads of an expert, in fp32 on the device."""
        state = self.expert_weights(task)
        missing = [name for name in self.backbone.names if name not in state]
        if missing:
            raise InputError(
                f"expert {task!r} lacks {len(missing)} tensors that the model reads: {shortlist(missing)}.",
                "Complete it with the base's tensors.",
            )
        return {name: state[name].detach().to(self.device, torch.float32) for name in self.backbone.names}

    def batches(self, task: str, description: str = "") -> Iterator[Tensor]:
        """Walk a task's sample, under a progress bar if it is described."""
        images = self.images[task]
        images = images if isinstance(images, Tensor) else images()
        if len(images) == 0:
            raise DataError(f"task {task!r} has no images to collect statistics on.")
        generator = torch.Generator().manual_seed(self.seed)
        batches = torch.randperm(len(images), generator=generator)[: self.samples].split(self.batch_size)
        for index in track(batches, description) if description else batches:
            yield images[index].to(self.device)

    def head(self, task: str) -> Head:
        """Give a task's head on the device."""
        if task not in self.heads:
            raise InputError(f"task {task!r} has no head.", "Fisher diagonals need one for every task.")
        return self.heads[task].to(self.device)

    @cached_property
    def trace(self) -> Trace:
        """Which weights a forward pass uses, and how."""
        task = next(iter(self.images))
        file = self.file("trace", task).with_suffix(".json")
        return _read_trace(file) or self._measured_trace(task, file)

    def _measured_trace(self, task: str, file: Path) -> Trace:
        found = trace(self.backbone, self.weights(task), next(self.batches(task))[:1])
        facts = asdict(found)
        try:
            write_text(file, json.dumps(facts | {"check": short_hash(facts)}))
        except (OSError, EnvironmentProblem) as error:
            warn_of_no_room(file, error)
        return found

    def file(self, kind: str, task: str, *more: object) -> Path:
        """Name a file by all that its content depends on."""
        facts = [task, self.keys.get(task), self.samples, self.batch_size, self.seed, *more]
        facts += [torch.__version__, torch.get_num_threads(), self.device.type]
        return self.folder / f"{kind}-{short_hash(facts)}"


def _read_trace(file: Path) -> Trace | None:
    """Read a trace; None where there is no file of one, and, after a warning, where it is damaged."""
    if not file.exists():
        return None
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
        if facts.pop("check") == short_hash(facts):
            return Trace(**facts)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    warn_of_damage(file)
    return None


def short_hash(facts: object) -> str:
    """Give sixteen digits that stand for some facts in a file name."""
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
