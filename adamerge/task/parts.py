"""The parts of a merged model: base and vectors, backbone, heads and coefficients; its weights and logits."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytorch_lightning as pl
import torch
from jaxtyping import Float
from torch import Tensor, nn

from adamerge.coefficients import Coefficients, Learned, Routing
from adamerge.data.datasets import Images
from adamerge.data.module import MultiTaskData
from adamerge.errors import InputError
from adamerge.mixture import Mixture
from adamerge.models import Backbone, Head, Surgery, recalibrate, walk
from adamerge.spaces import Space
from adamerge.state import State
from adamerge.vectors import TaskVectors


class MergedParts(pl.LightningModule):
    """A base, its experts and coefficients: one merged model, or a `Mixture` where they are a `Routing`.

    The module's only parameters are those of `learned`, in fp32; base, vectors, backbone and heads are
    frozen and stay out of checkpoints. For the arguments see `MergeTask`.
    """

    def __init__(
        self,
        vectors: TaskVectors,
        backbone: Backbone,
        heads: Mapping[str, Head],
        *,
        coefficients: Coefficients | None,
        experts: TaskVectors | None,
        recalibrate: int,
        adapters: Surgery | None,
    ) -> None:
        super().__init__()
        self.vectors, self.backbone, self.heads = vectors, backbone, dict(heads)
        self.experts = experts or vectors
        self.coefficients = coefficients or Learned()
        self.recalibrate, self.adapters = recalibrate, adapters
        if adapters is not None:
            adapters.build(vectors.tasks, next(iter(self.heads.values())).dim)
        self.read_names = tuple(n for n in vectors.names if n in set(backbone.names))
        self._mixture: list[Mixture] = []  # in a list, so that its parameters are not the module's
        self._weights: State = {}
        self._fixed: dict[str, Tensor] = {}
        if isinstance(self.coefficients, Routing):
            if recalibrate:
                raise InputError("recalibrate is of no use to a router: inputs differ.", "Leave it out.")
            if adapters is not None:
                raise InputError("adapters need static coefficients, found a router.", "Leave them out.")
            self._mixture.append(Mixture(vectors, backbone, self.heads, self.coefficients))
        else:
            what: Any = vectors if isinstance(self.coefficients, Space) else vectors.names
            self.coefficients.build(vectors.tasks, what)

    @property
    def mixture(self) -> Mixture | None:
        """The model whose weights depend on the input; None where coefficients are static."""
        return next(iter(self._mixture), None)

    @property
    def learned(self) -> nn.ModuleDict:
        """All that an optimizer may change, under its names in this module."""
        parts: dict[str, nn.Module] = {"coefficients": self.coefficients}
        return nn.ModuleDict(parts if self.adapters is None else parts | {"adapters": self.adapters})

    def reset_learned(self) -> None:
        """Take coefficients and adapters back to their start, in place."""
        self.coefficients.reset()
        if self.adapters is not None:
            self.adapters.reset()

    @property
    def fitted_heads(self) -> dict[str, Head]:
        """The heads as they read the merged model: with their tasks' adapters, where there are any."""
        return self.heads if self.adapters is None else self.adapters.fitted(self.heads)

    def weights(self, coefficients: Float[Tensor, "task tensor"]) -> State:
        """Give what the backbone reads, in fp32, under these coefficients; differentiable in them."""
        return self.vectors.merge(coefficients, self.read_names) | self._fixed

    def merged_state(self) -> State:
        """Give the complete merged model, on the CPU, ready for `adamerge.save`.

        Raises:
            InputError: The model differs from input to input.
        """
        if self.mixture is not None:
            raise InputError("a routed model has no single state.", "Save it: adamerge.save_mixture(...).")
        with torch.no_grad(), self._at_rest():
            merged = {name: tensor.cpu() for name, tensor in self._merged(self.vectors.names).items()}
        state = {**merged, **self.vectors.rest}
        return state | self._recalibrated({n: state[n].float() for n in self.backbone.names})

    @torch.no_grad()
    def evaluated(self) -> State:
        """Give the weights of the static model as it is evaluated; nothing where there is a mixture."""
        if self.mixture is not None:
            return {}
        with self._at_rest():
            weights = {**self._merged(self.read_names), **self._fixed}
        return {**weights, **self._recalibrated(weights)}

    def _merged(self, names: Sequence[str]) -> State:
        """Merge some tensors, differentiably."""
        if isinstance(self.coefficients, Space):
            return self.coefficients.to(self._where)(self.vectors, set(names))
        return self.vectors.merge(self._matrix(), names)

    def _recalibrated(self, weights: State) -> dict[str, Tensor]:
        """Give the BatchNorm statistics that some adaptation images have under these weights."""
        if not self.recalibrate:
            return {}
        parts = {task: self.data.adaptation(task) for task in self.data.adapting_tasks}
        few = {task: images.sample(self.recalibrate).images for task, images in parts.items()}
        found = recalibrate(self.backbone, weights, few)
        return {name: value for name, value in found.items() if value is not weights[name]}

    def logits(self, weights: State, task: str, images: Tensor) -> Float[Tensor, "image class"]:
        """Classify one task's images under given weights of a merged model."""
        return self.fitted_heads[task].logits(self.backbone.features(weights, images))

    @torch.no_grad()
    def expert_logits(self, task: str, images: Images) -> Float[Tensor, "image class"]:
        """Give the logits of a task's own expert, on the CPU, in fp32 without autocast."""
        weights, head = self._expert_weights(task), self.heads[task]
        return self._walk(lambda batch: head.logits(self.backbone.features(weights, batch)), images)

    @torch.no_grad()
    def expert_features(self, task: str, images: Images) -> Float[Tensor, "image dim"]:
        """Give the features of a task's own expert, on the CPU, in fp32 without autocast."""
        return self._walk(partial(self.backbone.features, self._expert_weights(task)), images)

    @torch.no_grad()
    def merged_logits(
        self, task: str, images: Images, weights: State | None = None
    ) -> Float[Tensor, "image class"]:
        """Give the merged model's logits, on the CPU, in fp32 without autocast.

        Args:
            task: Whose head.
            images: What to classify.
            weights: Those of `evaluated`, where several tasks are asked for.
        """
        return self._walk(self._classifier(task, weights), images)

    def _expert_weights(self, task: str) -> State:
        hot, read = self._on_device(self.experts.one_hot(task)), set(self.backbone.names)
        return self._fixed | self.experts.merge(hot, [n for n in self.experts.names if n in read])

    def _classifier(self, task: str, weights: State | None = None) -> Callable[[Tensor], Tensor]:
        """Give the merged model as a function from images to logits of a task's head.

        Args:
            task: Whose head.
            weights: Those of a static model, where they are merged already.
        """
        if self.mixture is not None:
            return partial(self.mixture.logits, task=task)
        return partial(self.logits, weights or self.evaluated(), task)

    def _walk(self, function: Callable[[Tensor], Tensor], images: Images) -> Float[Tensor, "image value"]:
        with self._at_rest(), torch.autocast(self._where.type, enabled=False):
            return walk(lambda batch: function(self._on_device(batch)), self.data.loader(images))

    @contextmanager
    def _at_rest(self) -> Iterator[None]:
        """For a while nothing is trained: normalisation must not see its batch, masks have no noise."""
        was_training = self.coefficients.training
        self.coefficients.eval()
        try:
            yield
        finally:
            self.coefficients.train(was_training)

    @property
    def data(self) -> MultiTaskData:
        """The trainer's data module."""
        data = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, MultiTaskData):
            raise InputError("MergeTask needs a MultiTaskData.", "Pass trainer.fit(task, datamodule=data).")
        return data

    def _place(self) -> None:
        is_lossless, where = self.experts is self.vectors, self._where
        if self.mixture is not None:  # it holds the same parts: they must not stand on the device twice
            mixture = self.mixture.to(where)
            self.vectors, self.backbone, self.heads = mixture.vectors, mixture.backbone, mixture.heads
        self.vectors, self.backbone = self.vectors.to(where), self.backbone.to(where)
        self.heads = {task: head.to(where) for task, head in self.heads.items()}
        self.experts = self.vectors if is_lossless else self.experts.to(where)
        rest, read = self.vectors.rest, set(self.backbone.names)
        self._fixed = {n: self._on_device(t.float()) for n, t in rest.items() if n in read}

    @torch.no_grad()
    def _merge_for_evaluation(self) -> None:
        self._place()
        self._weights = self.evaluated()

    @property
    def _where(self) -> torch.device:
        """The device of the frozen parts: Lightning takes the module itself off it after each stage."""
        return self.trainer.strategy.root_device if self._trainer else self.device

    def _on_device(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._where)

    def _matrix(self) -> Float[Tensor, "task tensor"]:
        return self._on_device(self.coefficients())

    def _world_size(self) -> int:
        return self._trainer.world_size if self._trainer else 1
