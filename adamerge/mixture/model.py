"""Mixture: a model whose weights are another mixture of experts for every input."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional

from adamerge.coefficients import Oracle, Router, Routing, Uniform
from adamerge.errors import InputError, nearest
from adamerge.mixture.gates import Gates
from adamerge.models import Backbone, Head, require_class_names
from adamerge.models.routed import RoutedParameter
from adamerge.state import State
from adamerge.vectors import LowRankBlock, TaskVectors


@dataclass(frozen=True)
class Predictions:
    """What a model says of images.

    Attributes:
        task: Whose head spoke, for each image: the task that was given, or the one that won.
        label: ``[image]`` class index in that task.
        class_name: Its name; empty where the task's class names are not known.
        probability: ``[image]``, of a softmax over the task's classes; over all tasks' classes where the
            task was not given.
        weights: ``[image, task]``, the routing weights (means over gates); None for static models.
    """

    task: list[str]
    label: Int64[Tensor, " image"]
    class_name: list[str]
    probability: Float[Tensor, " image"]
    weights: Float[Tensor, "image task"] | None


class Mixture(nn.Module):
    """Shared weights, exclusive experts, a router and heads: weights(x) = shared + sum of r_t(x) exclusive_t.

    A batch of different mixtures runs in one pass, and no sample's weights are ever made (Twin-Merging,
    arXiv:2406.15479; WEMoE, arXiv:2402.00433; SMILE, arXiv:2408.10174). Without experts it is a static model.

    Args:
        vectors: The shared model as base, and the exclusive experts.
        backbone: Features of any weights; the batch must be its activations' first axis.
        heads: One frozen head per task.
        routing: Gives weights; None: the shared model alone.
        classes: Class names by task, in label order.

    Raises:
        InputError: Nothing is routed, the routing does not fit the stored form of the experts, or a head
            has another number of classes than there are names.
    """

    def __init__(
        self,
        vectors: TaskVectors,
        backbone: Backbone,
        heads: Mapping[str, Head],
        routing: Routing | None = None,
        classes: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        super().__init__()
        self.vectors, self.backbone, self.heads, self.routing = vectors, backbone, dict(heads), routing
        self.classes = {task: list(names) for task, names in (classes or {}).items() if names}
        require_class_names(self.heads, self.classes)
        self.routed = self._routed_names()
        if routing is not None:
            _require_batch_first(backbone)
            if not self.routed:
                raise InputError(
                    f"no tensor is routed by {type(routing).__name__}.",
                    "Look at `groups`, and at the codec: routing by token needs low_rank.",
                )
            if tuple(routing.tasks) != vectors.tasks:  # else it was built, and may be trained
                routing.build(vectors.tasks, self._feature_sizes())

    def baselines(self) -> dict[str, "Mixture"]:
        """Give the models that a router must be held against, of the same experts.

        "oracle": the true task's expert; "hard_top_1": the router's best expert alone; "uniform": all
        experts alike; "shared": none of them.
        """
        if self.routing is None:
            return {}
        others: dict[str, Routing | None] = {"oracle": Oracle(self.routing.groups)}
        if isinstance(self.routing, Router):
            others["hard_top_1"] = self.routing.hard()
        others |= {"uniform": Uniform(self.routing.groups), "shared": None}
        return {
            name: Mixture(self.vectors, self.backbone, self.heads, routing, self.classes)
            for name, routing in others.items()
        }

    @property
    def read(self) -> set[str]:
        """Names of the tensors that the backbone reads; of tied ones also the name that is stored."""
        names, aliases = set(self.backbone.names), self.vectors.aliases
        return names | {name for alias, name in aliases.items() if alias in names}

    @cached_property
    def shared(self) -> dict[str, Tensor]:
        """The shared model's tensors that the backbone reads, in fp32."""
        read = set(self.backbone.names)
        return {name: x.float() for name, x in self.vectors.base_state().items() if name in read}

    def forward(self, images: Tensor, task: str) -> Float[Tensor, "image class"]:
        """Give the logits of one task's head."""
        return self.logits(images, task)

    def logits(self, images: Tensor, task: str, gates: Gates | None = None) -> Float[Tensor, "image class"]:
        """Classify images with the head of a task, which routing by task takes for the true one.

        Args:
            images: Inputs of the backbone.
            task: Whose head.
            gates: The mixtures, where they were made before.
        """
        gates = gates or self.gates(images, task)
        return self.heads[task].logits(self.features(images, gates))

    def features(self, images: Tensor, gates: Gates | None) -> Float[Tensor, "image dim"]:
        """Give features, each image's under its own mixture."""
        return self.backbone.features(self._weights(gates), images)

    def gates(
        self, images: Tensor, task: str | None = None, router_features: Tensor | None = None
    ) -> Gates | None:
        """Make the mixtures of a batch; None where nothing is routed.

        Args:
            images: Inputs of the backbone.
            task: The true task, for routing that is told.
            router_features: What `router_features` gave for these images, where it is known.

        Raises:
            InputError: The routing needs the true task and was not told.
        """
        if self.routing is None:
            return None
        features = None
        if self.routing.reads == "input":
            features = self.router_features(images) if router_features is None else router_features
        elif self.routing.reads == "task":
            if task is None:
                raise InputError(
                    "this routing is an oracle: it needs the true task.", "Pass task=NAME (--task NAME)."
                )
            if task not in self.vectors.tasks:
                raise InputError(f"there is no expert of {task!r}.", nearest(task, self.vectors.tasks))
            features = torch.full((len(images),), self.vectors.tasks.index(task), device=images.device)
        return Gates(self.routing, len(images), features)

    @torch.no_grad()
    def router_features(self, images: Tensor) -> Float[Tensor, "image dim"]:
        """Give what a router of the input reads: the shared model's features, at the length sqrt(dim)."""
        features = self.backbone.features(self.shared, images).float()
        return functional.normalize(features, dim=-1) * features.shape[-1] ** 0.5

    @torch.no_grad()
    def predict(self, images: Any, task: str | None = None) -> Predictions:
        """Classify images.

        Args:
            images: uint8 ``[image, channel, height, width]`` as the backbone's preprocessing gives them, or
                a list of PIL images.
            task: Whose head speaks; None: the class with the highest logit among all tasks' classes.

        Raises:
            InputError: There is no such task, or the routing needs it and was not told.
        """
        if task is not None and task not in self.heads:
            raise InputError(f"there is no task {task!r}.", nearest(task, self.heads))
        images = self.batch(images)
        with self.evaluating():
            gates = self.gates(images, task)
            features = self.features(images, gates)
        tasks = list(self.heads) if task is None else [task]
        logits = [self.heads[t].logits(features) for t in tasks]
        probability, best = torch.cat(logits, -1).softmax(-1).max(-1)
        places = [(t, c) for t, part in zip(tasks, logits, strict=True) for c in range(part.shape[-1])]
        found = [places[i] for i in best.tolist()]
        return Predictions(
            [t for t, _ in found],
            torch.tensor([c for _, c in found], dtype=torch.int64),
            [self.classes[t][c] if self.classes.get(t) else "" for t, c in found],
            probability.cpu(),
            None if gates is None else gates.summary().cpu(),
        )

    def _weights(self, gates: Gates | None) -> State:
        if gates is None:
            return self.shared
        routed = {name: RoutedParameter.make(name, self.vectors.blocks[name], gates) for name in self.routed}
        return self.shared | self.vectors.with_aliases(routed)

    def _routed_names(self) -> tuple[str, ...]:
        """Name the tensors that differ per sample."""
        if self.routing is None:
            return ()
        read = self.read
        named = [n for n in self.vectors.names if n in read and self.routing.group_of(n) is not None]
        if self.routing.reads != "token":
            return tuple(named)
        factored = {n for n in named if isinstance(self.vectors.blocks[n], LowRankBlock)}
        factored &= _linear_weights(self.backbone)
        biases = {n for n in named if n.endswith("bias") and f"{n.removesuffix('bias')}weight" in factored}
        return tuple(n for n in named if n in factored | biases)

    def _feature_sizes(self) -> dict[str, int]:
        """Give the size of what each gate reads."""
        assert self.routing is not None  # only routing has gates
        if self.routing.reads != "block":
            return {"": next(iter(self.heads.values())).dim}
        sizes: dict[str, int] = {}
        for name in self.routed:
            shape = self.vectors.blocks[name].shape[1:]
            if len(shape) == 2:
                sizes.setdefault(self.routing.group_of(name) or "", shape[1])
        return sizes

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Keep a router that is in training from looking at its batch, and from learning of it."""
        was_training = self.training
        self.eval()
        try:
            yield
        finally:
            self.train(was_training)

    def batch(self, images: Any) -> Tensor:
        """Give images, preprocessed or PIL, as one tensor on the model's device."""
        if len(images) == 0:
            raise InputError("no image was given.", "Give a batch of one image or more.")
        if not isinstance(images, Tensor):
            images = torch.stack([self.backbone.preprocess(image) for image in images])
        return images.to(next(iter(self.shared.values())).device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Mixture":
        """Move what is no parameter along with the router: `to(device)`."""
        super()._apply(fn, recurse)
        device = fn(torch.empty(0)).device
        read = self.read
        rest = {n: x.to(device) if n in read else x for n, x in self.vectors.rest.items()}
        self.vectors = replace(self.vectors.to(device), rest=rest)
        self.backbone = self.backbone.to(device)
        self.heads = {task: head.to(device) for task, head in self.heads.items()}
        self.__dict__.pop("shared", None)
        return self


def _linear_weights(backbone: Backbone) -> set[str]:
    """Name the matrices that are applied to tokens."""
    kinds, module = (nn.Linear, nn.MultiheadAttention), getattr(backbone, "module", nn.Module())
    parts = [(name, part) for name, part in module.named_modules() if isinstance(part, kinds)]
    own = (f"{name}.{key}" for name, part in parts for key, _ in part.named_parameters(recurse=False))
    files: dict[str, str] = getattr(backbone, "files", {})
    return {files[name] for name in own if name.endswith("weight") and name in files}


def _require_batch_first(backbone: Backbone) -> None:
    """Refuse what cannot be seen from activations: attention whose first axis is the token."""
    module = getattr(backbone, "module", None)
    if isinstance(module, nn.Module):
        for name, part in module.named_modules():
            if isinstance(part, nn.MultiheadAttention) and not part.batch_first:
                raise InputError(
                    f"the attention {name} has tokens before samples, which per-input merging cannot see.",
                    "Build the model with batch_first=True.",
                )
