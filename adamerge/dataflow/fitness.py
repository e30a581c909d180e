"""How well a path serves several tasks: the mean of an objective over their images, without gradient."""

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import one_hot

from adamerge.dataflow.flow import Flow, FlowBackbone
from adamerge.errors import InputError
from adamerge.models import Backbone, Head, ModuleBackbone
from adamerge.objectives import Objective
from adamerge.state import State

_IMAGES = 256  # of one forward pass


class Fitness:
    """Judges paths, each on the same images.

    Args:
        backbone: Model A's.
        weights: Of all models: see `flow_weights`.
        heads: One frozen head per task.
        objective: What is minimised. It is made to forget between paths, whose losses are compared.
        images: Inputs of the backbone, by task.
        expert: Gives all that the backbone reads of a task's own expert, where the objective has a teacher.
        labels: ``[image]``, by task, where the objective reads labels.

    Raises:
        InputError: The objective reads what a path does not have: a router, a second view, coefficients.
    """

    def __init__(
        self,
        backbone: ModuleBackbone,
        weights: State,
        heads: Mapping[str, Head],
        objective: Objective,
        images: Mapping[str, Tensor],
        *,
        expert: Callable[[str], State] | None = None,
        labels: Mapping[str, Tensor] | None = None,
    ) -> None:
        if objective.needs_router or objective.augments or objective.reads == "coefficients":
            raise InputError(
                f"{type(objective).__name__} judges no path: it reads more than a model's predictions.",
                "Use Supervised, KLTeacher, FeatureMatching or Entropy.",
            )
        self.backbone, self.weights, self.heads = backbone, weights, heads
        self.objective, self.images = objective, images
        objective.build(list(images))
        self.known: dict[str, dict[str, Tensor]] = {task: {} for task in images}
        for task, head in ((task, heads[task]) for task in images):
            if objective.needs_teacher and expert:
                self.known[task] |= self._views(backbone, expert(task), task)
            if objective.needs_labels and labels:
                target = one_hot(labels[task], len(head.weight)).float()
                self.known[task]["labels"] = target.to(head.weight.device)

    @torch.no_grad()
    def __call__(self, flow: Flow) -> float:
        """Give the mean loss over tasks; infinite where nothing runs or what comes out is not finite.

        Raises:
            InputError: The objective gave a task up, so that losses cannot be compared.
        """
        if not flow.steps:
            return float("inf")
        backbone, losses = FlowBackbone(self.backbone, flow), []
        self.objective.forget()
        self.objective.begin_step()
        for task in self.images:
            seen = self._views(backbone, self.weights, task)
            if not all(x.isfinite().all() for x in seen.values()):
                return float("inf")
            losses.append(self.objective.loss(seen, task, self.known[task]))
        if any(loss is None for loss in losses):
            raise InputError(
                f"{type(self.objective).__name__} gave no loss for a task: paths cannot be compared.",
                "Use an objective that judges every image, such as KLTeacher.",
            )
        return float(torch.stack(losses).double().mean())

    @torch.no_grad()
    def _views(self, backbone: Backbone, weights: State, task: str) -> dict[str, Float[Tensor, "image _"]]:
        where = self.heads[task].weight.device
        parts = self.images[task].split(_IMAGES)
        features = torch.cat([backbone.features(weights, part.to(where)) for part in parts])
        return {"features": features, "prediction": self.heads[task].logits(features)}
