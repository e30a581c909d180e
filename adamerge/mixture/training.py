"""One step of a router: a staged one, like that of static coefficients.

Router logits of all tasks come from one call (batch normalisation must see all tasks beside each other) and
become leaves; forward and backward run pass after pass, each graph freed at once; the leaves' gradients then
go into the router. Gates inside the model have no such leaves: there the parameters collect gradients.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from adamerge.errors import InputError
from adamerge.mixture.gates import Gates
from adamerge.mixture.model import Mixture
from adamerge.mixture.passes import Batch, joined_images, task_losses
from adamerge.objectives import Objective


class RouterResult(NamedTuple):
    """What a step gives back.

    Attributes:
        losses: Each task's loss, detached; tasks that were not worth a step are missing.
        surrogate: A scalar of value 0 whose gradient is that of the sum of losses.
    """

    losses: dict[str, Tensor]
    surrogate: Float[Tensor, ""]


class RouterStep:
    """Differentiates an objective with respect to a router.

    Args:
        mixture: The model, with a routing that has parameters.
        objective: What is minimised: of the routed predictions, of the router's logits, or both.

    Raises:
        InputError: The routing has gates inside the model, and the objective reads a router's logits alone,
            or those gates normalise over their batch, which is only a pass; or the objective augments.
    """

    def __init__(self, mixture: Mixture, objective: Objective) -> None:
        assert mixture.routing is not None  # a static model has nothing to train here
        self.mixture, self.routing, self.objective = mixture, mixture.routing, objective
        if objective.reads == "routing" and self.routing.reads != "input":
            raise InputError(
                f"{type(objective).__name__} reads router logits; this router reads {self.routing.reads}s.",
                "Add an objective of predictions (adamerge.Mixed), or use a router with reads='input'.",
            )
        if objective.augments:
            name = type(objective).__name__
            raise InputError(f"{name} with a second view of images needs static coefficients.")
        if self.normalises and self.routing.reads != "input":
            raise InputError(
                f"this router reads {self.routing.reads}s and normalises over the images of a pass alone.",
                "Use network='mlp' or 'linear', or a router with reads='input'.",
            )
        self._features: dict[str, Tensor] = {}

    @property
    def normalises(self) -> bool:
        """Whether a sample's gradient depends on the samples beside it: those of a whole step are needed."""
        return any(isinstance(module, nn.BatchNorm1d) for module in self.routing.modules())

    def prepare(self, task: str, batches: Iterable[Mapping[str, Tensor]]) -> None:
        """Read what the router reads of a task's images, once for the whole training."""
        if self.routing.reads == "input":
            device = next(iter(self.mixture.shared.values())).device
            found = [self.mixture.router_features(batch["images"].to(device)) for batch in batches]
            self._features[task] = torch.cat(found)

    def __call__(self, batch: Batch, passes: Iterable[Sequence[str]], scale: float = 1.0) -> RouterResult:
        """Take the step's forward and backward passes.

        Args:
            batch: Images of each task, their indices among the images of `prepare`, and what else
                `task_losses` reads.
            passes: Tasks that share a forward pass.
            scale: Factor of the loss during the backward passes (fp16 under autocast).
        """
        logits = self._logits(batch)
        leaves = {task: part.detach().requires_grad_() for task, part in logits.items()}
        targets = list(logits.values()) or list(self.routing.parameters())
        sources = list(leaves.values()) or targets
        totals = [torch.zeros_like(source) for source in sources]
        losses: dict[str, Tensor] = {}
        for tasks in passes:
            found = self._losses(tasks, batch, leaves)
            losses |= {task: loss.detach() for task, loss in found.items()}
            if found:
                total = torch.stack(list(found.values())).sum() * scale
                parts = torch.autograd.grad(total, sources, allow_unused=True)
                totals = [a if b is None else a + b / scale for a, b in zip(totals, parts, strict=True)]
        pairs = zip(targets, totals, strict=True)
        terms = [((target - target.detach()) * total).sum() for target, total in pairs]
        return RouterResult(losses, torch.stack(terms).sum())

    def _logits(self, batch: Batch) -> dict[str, Tensor]:
        """Give every task's router logits, from one call; nothing where gates are inside the model."""
        if self.routing.reads != "input":
            return {}
        rows = [self._features[task][part["index"]] for task, part in batch.items()]
        parts = self.routing.logits(torch.cat(rows)).split([len(r) for r in rows])
        return dict(zip(batch, parts, strict=True))

    def _losses(self, tasks: Sequence[str], batch: Batch, leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if self.objective.reads == "routing":
            found = {task: self.objective(leaves[task], task) for task in tasks}
            return {task: loss for task, loss in found.items() if loss is not None}
        images = joined_images(tasks, batch)
        if leaves:
            gates = Gates.of_logits(self.routing, torch.cat([leaves[task] for task in tasks]))
        else:
            gates = Gates(self.routing, len(images))
        features = self.mixture.features(images, gates)
        model: dict[str, Any] = {"heads": self.mixture.heads, "objective": self.objective}
        return task_losses(features, tasks, batch, routing=gates.mean_logits(), **model)
