"""Frozen heads: a matrix that turns features into one task's logits."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from adamerge.checkpoints import Checkpoint, open_checkpoint
from adamerge.errors import InputError, shortlist
from adamerge.models.own_layers import OwnLayers

LAYERS = "layers/"  # stands before the names of a head's own layers in files
_PROMPTS = 512  # encoded at once: 397 classes with 80 templates each do not fit into memory


@dataclass(frozen=True)
class Residual:
    """A low-rank correction of features: z - up relu(down z), in fp32 (Representation Surgery).

    Attributes:
        down: ``[rank, dim]``.
        up: ``[dim, rank]``.
    """

    down: Float[Tensor, "rank dim"]
    up: Float[Tensor, "dim rank"]

    def __call__(self, features: Float[Tensor, "image dim"]) -> Float[Tensor, "image dim"]:
        """Correct features."""
        return features - functional.linear(functional.linear(features, self.down).relu(), self.up)

    def to(self, device: torch.device) -> "Residual":
        """Give the residual on a device."""
        return Residual(self.down.to(device), self.up.to(device))


@dataclass(frozen=True)
class Head:
    """A task's frozen classifier: linear, behind layers of its own where the base lacks them.

    Attributes:
        weight: ``[class, dim]`` fp32; for CLIP the unit text vectors times exp(logit scale). Where the head
            has layers of its own, ``dim`` is the size of what these give.
        bias: ``[class]`` fp32, or None.
        normalize: Whether features are L2-normalised first, as CLIP does.
        role: What messages call it.
        residual: The task's own correction of a merged model's features, or None.
        layers: The expert's own layers between features and ``weight``, or None.
        names: The expert's own names of the head's `tensors`, as its files have them, where it has files.
        own_tower: Whether the expert's own text tower made it, not the base's.
        classes: What the file of the head calls its rows; empty where it does not say.

    Raises:
        InputError: The number of names is not that of the rows.
    """

    weight: Float[Tensor, "class dim"]
    bias: Float[Tensor, " class"] | None = None
    normalize: bool = True
    role: str = "the head"
    residual: Residual | None = None
    layers: OwnLayers | None = None
    names: Mapping[str, str] = field(default_factory=dict)
    classes: tuple[str, ...] = ()
    own_tower: bool = False

    def __post_init__(self) -> None:
        if self.classes and len(self.classes) != len(self.weight):
            raise InputError(
                f"{self.role} has {len(self.weight)} rows and {len(self.classes)} class names beside them: "
                f"{shortlist(self.classes)}.",
                "Correct id2label in its config.json, or the names in the head file.",
            )

    @property
    def dim(self) -> int:
        """Size of the features that the head reads."""
        return self.weight.shape[1] if self.layers is None else self.layers.dim

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All tensors, by their names in files."""
        own = {"weight": self.weight, "bias": self.bias}
        own |= {} if self.residual is None else {"down": self.residual.down, "up": self.residual.up}
        layers = {} if self.layers is None else self.layers.tensors
        own |= {f"{LAYERS}{name}": tensor for name, tensor in layers.items()}
        return {name: tensor for name, tensor in own.items() if tensor is not None}

    def features(self, features: Float[Tensor, "image dim"]) -> Float[Tensor, "image dim"]:
        """Give what the head reads of features: in fp32, corrected where there is a residual."""
        if self.residual is None:
            return features
        with torch.autocast(features.device.type, enabled=False):
            return self.residual(features.float())

    def logits(self, features: Float[Tensor, "image dim"]) -> Float[Tensor, "image class"]:
        """Normalise and classify in fp32, outside autocast: CLIP's logits are too large for bf16.

        Raises:
            InputError: The features have another dimension than the head.
        """
        if features.shape[-1] != self.dim:
            raise InputError(
                f"{self.role} reads {self.dim} dimensions, the features have {features.shape[-1]}.",
                "Head and backbone must share the projection.",
            )
        with torch.autocast(features.device.type, enabled=False):
            features = self.features(features).float()
            if self.normalize:
                features = functional.normalize(features, dim=-1)
            hidden = features if self.layers is None else self.layers(features)
            return functional.linear(hidden, self.weight, self.bias)

    def to(self, device: torch.device) -> "Head":
        """Give the head on a device."""
        bias = None if self.bias is None else self.bias.to(device)
        residual = None if self.residual is None else self.residual.to(device)
        layers = None if self.layers is None else self.layers.to(device)
        return replace(self, weight=self.weight.to(device), bias=bias, residual=residual, layers=layers)

    @classmethod
    def from_file(cls, path: str | Path, *, normalize: bool = True) -> "Head":
        """Read a safetensors file with ``weight`` and, if there is one, ``bias``.

        Names of the rows are read from the entry ``classes`` of its metadata, a JSON list, if there is one.

        Raises:
            InputError: The file has no matrix ``weight``, or its ``bias`` or names do not fit.
        """
        state = open_checkpoint(path, role="head")
        if "weight" not in state or state["weight"].dim() != 2 or not state["weight"].is_floating_point():
            content = [f"{name} {state[name].dtype} {[*state[name].shape]}" for name in state]
            raise InputError(
                f"head {path} has no matrix 'weight' of numbers; it holds {shortlist(content)}.",
                "Save {'weight': [class, dim]} and, optionally, {'bias': [class]}.",
            )
        weight, bias = state["weight"].float(), state["bias"].float() if "bias" in state else None
        if bias is not None and bias.shape != weight.shape[:1]:
            raise InputError(f"head {path}: bias {[*bias.shape]} does not fit weight {[*weight.shape]}.")
        return cls(weight, bias, normalize, f"head {path}", classes=_names_in(state, path))

    @classmethod
    def zero_shot(
        cls,
        encode: Callable[[list[str]], Float[Tensor, "text dim"]],
        classes: Sequence[str],
        templates: Sequence[str],
        scale: float,
    ) -> "Head":
        """Build CLIP's head: the mean of a class's prompts on the unit sphere (methods of 2103.00020).

        Args:
            encode: From prompts to text features.
            classes: Class names, in label order.
            templates: Prompts with ``{}`` where the class name goes.
            scale: exp(logit scale).
        """
        prompts = [template.replace("{}", name) for name in classes for template in templates]
        pieces = [encode(prompts[i : i + _PROMPTS]) for i in range(0, len(prompts), _PROMPTS)]
        vectors = functional.normalize(torch.cat(pieces).float(), dim=-1)
        means = vectors.reshape(len(classes), len(templates), -1).mean(1)
        return cls(scale * functional.normalize(means, dim=-1))


def _names_in(state: Checkpoint, path: str | Path) -> tuple[str, ...]:
    """Read the names of the rows from a head file's metadata."""
    notes = next((notes for notes in state.metadata.values() if "classes" in notes), {})
    try:
        names = json.loads(notes.get("classes", "[]"))
    except (ValueError, RecursionError):
        names = None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InputError(f"head {path}: `classes` of its metadata is no JSON list of names.")
    return tuple(names)


def require_class_names(heads: Mapping[str, Head], classes: Mapping[str, Sequence[str]]) -> None:
    """Check that every head has a row for each class name of its task, where names are known.

    Raises:
        InputError: A head has another number of rows.
    """
    for task, names in classes.items():
        if names and task in heads and len(names) != len(heads[task].weight):
            raise InputError(
                f"head {task!r} has {len(heads[task].weight)} rows for {len(names)} classes.",
                "List the class names in the order of the head's rows.",
            )
