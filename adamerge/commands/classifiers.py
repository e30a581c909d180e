"""The classifiers of a static merge: which last layers stay the base's, and the heads beside the weights."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adamerge.checkpoints import class_names
from adamerge.commands.sources import Sources
from adamerge.mixture import write_companions
from adamerge.models.heads import Head
from adamerge.models.last_layers import LastLayers, classifies_inputs
from adamerge.models.opening import own_classifiers
from adamerge.progress import print_line

MERGED = "merged"  # the task of a last layer that was merged with the rest


@dataclass(frozen=True)
class Classifiers:
    """What a merge of classifiers writes beside the weights, so that all tasks can be predicted.

    Attributes:
        layers: The last layers among the tensors.
        heads: The experts' own classifiers, where they are not merged.
        classes: Their class names, where they are known.
        reasons: Why other experts have none.
        is_merged: Whether the last layers are merged, and are the only head.
    """

    layers: LastLayers
    heads: Mapping[str, Head] = field(default_factory=dict)
    classes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    reasons: Mapping[str, str] = field(default_factory=dict)
    is_merged: bool = False

    @classmethod
    def of(cls, sources: Sources, layers: LastLayers) -> "Classifiers":
        """Read the experts' classifiers, where a merge has any and writes a folder."""
        base = sources.base
        if not (layers.names or sources.headless) or not base.is_dir() or not classifies_inputs(base):
            return cls(layers)
        if not layers.kept and not sources.headless:
            return cls(layers, {}, {MERGED: class_names(base) or ()}, is_merged=True)
        heads, reasons = own_classifiers(base, sources.experts)
        classes = {task: class_names(sources.experts[task]) or () for task in heads}
        return cls(layers, heads, classes, reasons)

    @property
    def are_written(self) -> bool:
        """Whether the folder has heads of its own beside the weights."""
        return bool(self.heads)

    @property
    def notes(self) -> tuple[str, ...]:
        """What the model card says of the last layers."""
        if self.layers.kept:
            told = self.layers.told
            return (f"{told[0].upper()}{told[1:]}",)
        merged = (
            "The classifiers' last layers are merged: all models name the same classes in the same order."
        )
        return (merged,) if self.layers.names else ()

    def write(self, folder: Path, provenance: Mapping[str, Any]) -> None:
        """Write the heads and their class names into a folder that holds the merged weights."""
        heads = self.heads
        if self.is_merged:
            heads = own_classifiers(folder, {MERGED: folder})[0]
        if heads:
            write_companions(folder, heads, self.classes, provenance)

    def tell(self) -> None:
        """Print where heads are missing, and why."""
        for task, reason in self.reasons.items():
            print_line(f"No head of {task!r} is written: {reason}")
