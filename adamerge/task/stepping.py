"""One step of any coefficients: merge once, pass after pass, the gradient of what is learned."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.optim import Optimizer

from adamerge.data.module import Batch
from adamerge.mixture import RouterStep, joined_images, shared_passes, task_losses
from adamerge.models.adapters import surrogate as handed_on
from adamerge.objectives import Objective
from adamerge.optimizers import CoefficientOptimizer, Reads
from adamerge.spaces import Space
from adamerge.state import State
from adamerge.task.evaluating import Evaluating
from adamerge.vectors import StepResult, leaf_step, staged_step


class Stepping(Evaluating):
    """A merged model with the forward and backward passes of a step. For the arguments see `MergeTask`."""

    objective: Objective
    images_per_pass: int
    losses: dict[str, Any]  # floats, but tensors within a step
    _router_step: RouterStep | None
    _leaves: dict[str, Tensor]  # the adapters, within a step

    @property
    def _step(self) -> Callable[[Batch, float], tuple[Tensor, Tensor | None]]:
        """How these coefficients take a step."""
        if self.mixture is not None:
            return self._routed_step
        is_matrix = self._learns and not isinstance(self.coefficients, Space)
        return self._static_step if is_matrix else self._space_step

    @property
    def _learns(self) -> bool:
        """Whether the coefficients do."""
        return any(True for _ in self.coefficients.parameters())

    def _adapted_step(
        self, step: Callable[[Batch, float], tuple[Tensor, Tensor | None]], batch: Batch, scale: float
    ) -> tuple[Tensor, Tensor | None]:
        """Take a step with the adapters' gradient beside the coefficients'."""
        if self.adapters is None:
            return step(batch, scale)
        self._leaves = {n: p.detach().clone().requires_grad_() for n, p in self.adapters.named_parameters()}
        surrogate, gradient = step(batch, scale)
        leaves, self._leaves = self._leaves, {}
        return surrogate + handed_on(self.adapters, leaves, scale), gradient

    def _static_step(self, batch: Batch, scale: float) -> tuple[Tensor, Tensor]:
        """Give a scalar of value 0 with the gradient of the coefficients, and that gradient."""
        matrix = self.coefficients()
        apart = self._reads == "task_gradients"
        groups = shared_passes(batch, 0 if apart else self.images_per_pass)
        passes = [self._pass(tasks, batch) for tasks in groups]
        options: dict[str, Any] = {"names": self.read_names, "scale": scale, "apart": apart}
        with torch.set_grad_enabled(self._reads != "loss"):  # then the gradient is zero, and costs nothing
            result = staged_step(self.vectors, matrix, passes, **options)
        if apart:
            self._hand_over(matrix, result)
        return ((matrix - matrix.detach()) * result.gradient).sum(), result.gradient

    def _space_step(self, batch: Batch, scale: float) -> tuple[Tensor, None]:
        """Give a scalar of value 0 with the gradient of coefficients finer than a matrix, or of none."""
        passes = [self._pass(tasks, batch) for tasks in shared_passes(batch, self.images_per_pass)]
        merged = self._merged(self.read_names) if self._learns else self._weights
        _, surrogate = leaf_step(merged, passes, scale=scale)
        if self._world_size() > 1 or not surrogate.requires_grad:
            # Several processes expect a gradient of every parameter; one, of some.
            surrogate = surrogate + sum(p.sum() * 0 for p in self.coefficients.parameters())
        return surrogate, None

    @property
    def _reads(self) -> Reads:
        return getattr(next(iter(self._optimizers()), None), "reads", "gradient")

    def _hand_over(self, matrix: Float[Tensor, "task tensor"], result: StepResult) -> None:
        """Give the optimizer the tasks' losses, and the gradients of its parameter."""
        optimizer = self._optimizers()[0]
        assert isinstance(optimizer, CoefficientOptimizer)  # no other reads them
        of = partial(torch.autograd.grad, matrix, optimizer.values, retain_graph=True)
        gradients = torch.stack([of(gradient)[0] for gradient in result.gradients])
        optimizer.receive(gradients, torch.stack(result.losses))

    def _routed_step(self, batch: Batch, scale: float) -> tuple[Tensor, None]:
        """Give a scalar of value 0 with the gradient of the router."""
        assert self._router_step is not None  # only a router takes this step
        groups = shared_passes(batch, self.images_per_pass)
        result = self._router_step(batch, groups, scale)
        self.losses |= result.losses
        return result.surrogate, None

    def _optimizers(self) -> list[Optimizer]:
        return self.trainer.optimizers if self._trainer else []

    def _pass(self, tasks: Sequence[str], batch: Batch) -> Callable[[State], Tensor]:
        def loss_of(leaves: State) -> Tensor:
            images, n_views = joined_images(tasks, batch), 1 + self.objective.augments
            if n_views == 2:
                images = torch.cat([images, joined_images(tasks, self._second_views(tasks, batch))])
                images = self.backbone.normalised(images) if images.is_floating_point() else images
            features, *more = self.backbone.features({**self._fixed, **leaves}, images).chunk(n_views)
            heads = self.adapters.fitted(self.heads, self._leaves) if self.adapters else self.heads
            model: dict[str, Any] = {"heads": heads, "objective": self.objective}
            model |= {"augmented": more[0]} if more else {}
            found = task_losses(features, tasks, batch, **model)
            # Tensors until `_gathered` reads all at once.
            self.losses |= {task: loss.detach() for task, loss in found.items()}
            none = features.new_zeros((), dtype=torch.float32)
            return torch.stack(list(found.values())).sum() if found else none

        return loss_of

    def _second_views(self, tasks: Sequence[str], batch: Batch) -> Batch:
        step, make = self.global_step, self.objective.second_view
        return {task: {"images": make(batch[task]["images"], task, step)} for task in tasks}

    def _loss_scale(self) -> float:
        """Give the factor that keeps fp16 gradients from vanishing; Lightning scales the outer loss only."""
        plugin = getattr(self._trainer, "precision_plugin", None)
        scaler = getattr(plugin, "scaler", None)
        return scaler.get_scale() if scaler is not None else 1.0
