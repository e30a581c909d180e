"""MergeTask: coefficients x objective x codec x optimizer, learned on unlabelled inputs."""

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Annotated, Any

import torch
from pytorch_lightning import Trainer
from torch import Tensor
from torch.optim import Optimizer

from adamerge.coefficients import Coefficients
from adamerge.data.datasets import Images
from adamerge.data.module import Batch, MultiTaskData
from adamerge.errors import AdamergeWarning, InputError, NumericError, shortlist
from adamerge.mixture import RouterStep
from adamerge.models import Backbone, Head, Surgery, require_class_names
from adamerge.objectives import Entropy, Objective
from adamerge.progress import track
from adamerge.ranges import Natural, Range, checked
from adamerge.safety import LastGood, require_finite_parameters, require_finite_step
from adamerge.task.combining import (
    Decay,
    MakeOptimizer,
    made,
    require_comparable,
    require_decay,
    require_objective,
    require_optimizer,
    require_trainer,
)
from adamerge.task.known import Known, facts_of
from adamerge.task.stepping import Stepping
from adamerge.vectors import TaskVectors

_CHECKPOINT_KEY = "adamerge"


def published_adam(parameters: Iterable[Any]) -> Optimizer:
    """Make AdaMerging's published optimizer: Adam at 1e-3 without weight decay."""
    return torch.optim.Adam(parameters, lr=1e-3)


class MergeTask(Stepping):
    """Learns merging coefficients on unlabelled inputs, and evaluates the merged model.

    The module's only parameters are the coefficients' and adapters', in fp32; base, vectors, backbone and
    heads are frozen and stay out of checkpoints. Static coefficients give one merged model; a `Routing`
    gives a `Mixture`, another model for every input.

    Args:
        vectors: The base and its experts.
        backbone: Features of any weights.
        heads: One frozen head per task that has images; an expert without images needs none.
        coefficients: What is learned; default: layer-wise AdaMerging's.
        objective: What is minimised; default: entropy.
        optimizer: Makes the optimizer from parameters; default: Adam at 1e-3, as published.
        decay: "linear": the learning rate falls to 0 at the trainer's last step; "none": it stays.
        images_per_pass: Small batches of several tasks share a forward pass up to this many images;
            more is faster on a GPU, fewer needs less memory; the result is the same.
        experts: The experts as they are, for teachers and for their own accuracy, where ``vectors`` hold
            them in a form that loses something; default: ``vectors``.
        adapters: Per-task corrections of the merged model's features, learned with the coefficients; alone
            where those are frozen.
        recalibrate: Images per task by which the merged model's BatchNorm statistics are measured again
            wherever it is evaluated or written; 0: they are merged like weights.

    Raises:
        InputError: The objective needs a router or reads no images, or a routed model
            is to be recalibrated.
    """

    @checked
    def __init__(
        self,
        vectors: TaskVectors,
        backbone: Backbone,
        heads: Mapping[str, Head],
        coefficients: Coefficients | None = None,
        objective: Objective | None = None,
        *,
        optimizer: MakeOptimizer = published_adam,
        decay: Decay = "none",
        images_per_pass: Natural = 16,
        experts: TaskVectors | None = None,
        adapters: Surgery | None = None,
        recalibrate: Annotated[int, Range("[0, 1e6]")] = 0,
    ) -> None:
        parts = {"coefficients": coefficients, "experts": experts, "adapters": adapters}
        super().__init__(vectors, backbone, heads, **parts, recalibrate=recalibrate)
        self.objective = objective or Entropy()
        self.objective.build(vectors.tasks)
        require_objective(self.objective, routed=self.mixture is not None)
        self._router_step = RouterStep(self.mixture, self.objective) if self.mixture else None
        self.objective.start_at(list(self.coefficients.parameters()))
        self.make_optimizer = optimizer
        self.decay: Decay = decay
        self.images_per_pass = images_per_pass
        self.losses = {}
        self._last_good = LastGood()
        self._memory: dict[str, float] = {}  # the objective's, when the step began
        self.known = Known()
        self._without_loss: set[str] | None = None  # tasks, of the steps that this process has taken
        self._leaves = {}

    def configure_optimizers(self) -> Optimizer | None:
        """Make the optimizer of coefficients and adapters; None where there is nothing to learn.

        Raises:
            InputError: It is of no use to these coefficients, this objective or several processes.
        """
        return self._optimizer_for(self._trainer)

    def _optimizer_for(self, trainer: Trainer | None) -> Optimizer | None:
        parameters = list(self.learned.parameters())
        if not parameters:
            return None
        optimizer = made(self.make_optimizer, parameters)
        last, processes = (trainer.max_steps, trainer.world_size) if trainer else (0, 1)
        require_optimizer(optimizer, self, last, processes)
        if self.decay != "none":
            require_decay(self.decay, optimizer, last)
        return optimizer

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Let the objective forget the last step, and remember where this one starts."""
        self._decay()
        self.objective.begin_step()
        self._memory = self.objective.per_task_state()
        self._last_good.consider(self.learned, self._optimizers())

    def _decay(self) -> None:
        """Set the learning rates: a function of the step alone, so that a resumed run has the same."""
        if self.decay == "none":
            return
        left = 1 - self.global_step / self.trainer.max_steps
        for group in (group for optimizer in self._optimizers() for group in optimizer.param_groups):
            group["lr"] = group.setdefault("initial_lr", group["lr"]) * max(left, 0.0)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Take a staged step: merge once, one backward per pass, one projection.

        Returns:
            A scalar whose value is the sum of all tasks' losses, and of what the coefficients themselves
            cost; its gradient with respect to the coefficients is the staged one.

        Raises:
            NumericError: A loss or the gradient is not finite; the last good coefficients are back.
        """
        scale = self._loss_scale()
        self.losses = {}
        if self._reads == "loss":  # one batch is judged many times, each time from the same memory
            self.objective.load_per_task_state(self._memory)
            self.objective.begin_step()
        batch = self.known.added_to(batch)
        surrogate, gradient = self._adapted_step(self._step, batch, scale)
        self.losses = self._gathered(self.losses)
        silent = batch.keys() if self._without_loss is None else self._without_loss
        self._without_loss = silent - self.losses.keys()
        if self._reads == "loss":
            require_comparable(self.objective, self.losses, self.data.adapting_tasks)
        with self._keeping_the_last_good():  # a loss scaler skips a step of infinite gradient itself
            gradient = gradient if scale == 1 else None
            require_finite_step(self.global_step, self.losses, gradient, self.vectors.tasks)
        self._last_good.accept()
        self._log_losses()
        total = surrogate.new_tensor(sum(self.losses.values()))
        penalty = self.objective.penalty(list(self.coefficients.parameters()))
        total = total if penalty is None else total + penalty
        return surrogate * self._world_size() + total  # DDP averages gradients; the loss is a sum

    def on_after_backward(self) -> None:
        """Leave nothing to step with where nothing is to move: momentum must not move it either."""
        idle = self.coefficients.settled() if self.losses else self.learned.parameters()
        if self._loss_scale() == 1:  # a loss scaler insists on gradients
            for parameter in idle:
                parameter.grad = None

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step, repair the coefficients, and recover where the objective asks for it.

        All of it belongs to the step: what callbacks see and checkpoints hold is its result.
        """
        super().optimizer_step(*args, **kwargs)
        with self._keeping_the_last_good():
            require_finite_parameters(self.global_step, self.learned)
        self.coefficients.after_step()
        due = self.objective.recovery_due()
        if self._world_size() > 1:
            due = self.trainer.strategy.reduce_boolean_decision(due, all=False)
        if due:
            self.objective.forget()
            self.restart_coefficients()
        self._last_good.finish()

    def restart_coefficients(self) -> None:
        """Go back to the initial coefficients and adapters, and forget the optimizer's moments."""
        self.reset_learned()
        for optimizer in self._optimizers():
            optimizer.state.clear()

    @contextmanager
    def _keeping_the_last_good(self) -> Iterator[None]:
        try:
            yield
        except NumericError:
            self._last_good.restore(self.learned, self._optimizers())
            raise

    def _gathered(self, losses: Mapping[str, Any]) -> dict[str, float]:
        """Read the losses from the device in one go, and join them with other processes'."""
        values = torch.stack(list(losses.values())).tolist() if losses else []
        here = dict(zip(losses, values, strict=True))
        if self._world_size() == 1:
            return here
        everywhere: list[Any] = [None] * self._world_size()
        state = self.objective.per_task_state()
        own = {task: state[task] for task in here if task in state}  # what others say of theirs is newer
        torch.distributed.all_gather_object(everywhere, (here, own))
        joined = {task: value for _, part in everywhere for task, value in part.items()}
        self.objective.load_per_task_state(state | joined)
        return {task: loss for part, _ in everywhere for task, loss in part.items()}

    def _log_losses(self) -> None:
        if self._trainer is None or not self.losses:
            return
        name = type(self.objective).__name__.lower()
        values = {f"train/{name}/{task}": loss for task, loss in self.losses.items()}
        self.log(f"train/{name}_mean", sum(self.losses.values()) / len(self.losses), prog_bar=True)
        self.log_dict(values)

    def setup(self, stage: str) -> None:
        """Check that data, experts, heads and trainer agree, and prepare the images for the backbone."""
        self.require_together(self.data, self.trainer, fits=stage == "fit")
        self.data.use(self.backbone)
        self.data.use_heads(self.heads)

    def require_together(self, data: MultiTaskData, trainer: Trainer, *, fits: bool) -> None:
        """Check that data, experts, heads, optimizer and trainer agree, before any work.

        Args:
            data: The images.
            trainer: What runs.
            fits: Whether it learns, and does not only evaluate.

        Raises:
            InputError: The first thing that cannot be.
        """
        headless = [task for task in data.tasks if task not in self.heads]
        unknown = [task for task in data.adapting_tasks if task not in self.vectors.tasks]
        unknown += [task for task in headless if task not in (*self.vectors.tasks, *unknown)]
        if unknown:
            raise InputError(
                f"data tasks {unknown} have no expert.",
                f"Experts: {list(self.vectors.tasks)}. A task that is evaluated only has no `adapt` images.",
            )
        if headless:
            raise InputError(f"data tasks {headless} have no head.", f"Heads: {list(self.heads)}.")
        normalises = self._router_step is not None and self._router_step.normalises
        require_trainer(trainer, trainer.world_size, fits=fits, normalises=normalises)
        require_class_names(self.heads, {task: spec.classes for task, spec in data.tasks.items()})
        if fits:
            self._optimizer_for(trainer)

    def on_fit_start(self) -> None:
        """Move the frozen parts to the device and cache what teachers say and routers read."""
        (self.mixture or self.coefficients).train()
        self._place()
        if not self._learns and self.mixture is None:
            self._weights = self.evaluated()  # they stay as they are
        if self._router_step is not None:
            for task in track(self.data.tasks_here(), "Caching what the router reads"):
                self._router_step.prepare(task, self.data.loader(self.data.adaptation(task)))
        if self.objective.needs_teacher:
            for task in track(self.data.tasks_here(), "Caching the experts' features"):
                images = self.data.adaptation(task)
                of_file = self._facts(task, images) if self.data.cache else None
                self.known.teach(task, partial(self.expert_features, task, images), of_file)
        if self.objective.needs_labels:
            for task in self.data.tasks_here():
                self.known.label(task, self.data.adaptation_labels(task), len(self.heads[task].weight))
        self.known.to(self._where)

    def _facts(self, task: str, images: Images) -> list[str] | None:
        """Name what an expert's features depend on: see `facts_of`."""
        how = {"eval_batch_size": self.data.eval_batch_size, "device": self._where}
        return facts_of(self.experts, task, self.backbone, images, **how)

    def on_fit_end(self) -> None:
        """From now on a router gives each sample its mixture; tell which tasks were never worth a step."""
        (self.mixture or self.coefficients).eval()
        if self._without_loss:
            warnings.warn(
                f"{type(self.objective).__name__} found no image worth a step of "
                f"{sorted(self._without_loss)}: nothing was learned from them.",
                AdamergeWarning,
                stacklevel=2,
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what resuming must agree with; coefficients and optimizer are there already.

        Of a step that was cut off nothing is kept: normalisation and averages have seen its batch.
        """
        memory, began = self.objective.per_task_state(), self._last_good.began
        memory = self._memory if self._last_good.under_way else memory
        if began is not None:
            checkpoint["state_dict"] = began[0]
            checkpoint |= {"optimizer_states": began[1]} if "optimizer_states" in checkpoint else {}
        checkpoint[_CHECKPOINT_KEY] = {
            "tasks": list(self.vectors.tasks),
            "coefficients": self._told,
            "groups": self.coefficients.table()[0],
            "adapters": self._adapters_told,
            "digests": dict(self.vectors.digests),
            "objective": memory,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of other tasks, groups or weights.

        Raises:
            InputError: The first thing that differs.
        """
        saved = checkpoint.get(_CHECKPOINT_KEY)
        if saved is None:
            raise InputError("this checkpoint was not written by adamerge.")
        ours: dict[str, Any] = {"tasks": list(self.vectors.tasks), "coefficients": self._told}
        ours |= {"groups": self.coefficients.table()[0]}
        ours |= {"adapters": self._adapters_told, "digests": dict(self.vectors.digests)}
        for key, value in ours.items():
            if saved.get(key, []) != value:  # adapters are younger than some checkpoints
                raise InputError(
                    f"the checkpoint has other {key}: {_difference(saved.get(key, []), value)}.",
                    "Resume with the configuration and weights that it was written with.",
                )
        self.objective.load_per_task_state(saved["objective"])

    @property
    def _told(self) -> list[str]:
        """Names the coefficients' kind and parameters."""
        return [type(self.coefficients).__name__, *sorted(self.coefficients.state_dict())]

    @property
    def _adapters_told(self) -> list[str]:
        return [] if self.adapters is None else [f"rank {self.adapters.rank}"]


def _difference(saved: Any, ours: Any) -> str:
    if isinstance(saved, dict):
        keys = [key for key in {**saved, **ours} if saved.get(key) != ours.get(key)]
        return f"{', '.join(keys)} changed"
    return f"it has {shortlist(saved, 3)}; here are {shortlist(ours, 3)}"
