"""Which objective, coefficients, optimizer and trainer go together; others are refused with the reason."""

import warnings
from collections.abc import Callable, Container, Sequence
from typing import Any, Literal

import torch
from pytorch_lightning import Trainer
from torch.optim import Optimizer

from adamerge.errors import AdamergeError, AdamergeWarning, InputError, shortlist
from adamerge.objectives import Objective
from adamerge.optimizers import BiLevel, CoefficientOptimizer
from adamerge.ranges import require
from adamerge.spaces import Concrete
from adamerge.task.stepping import Stepping

Decay = Literal["none", "linear"]
MakeOptimizer = Callable[[Any], Optimizer]
_PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")
_COMPARABLE = "Search with an objective that judges every image, such as KLTeacher."


def require_objective(objective: Objective, *, routed: bool) -> None:
    """Refuse an objective that these coefficients cannot serve."""
    name = type(objective).__name__
    if objective.reads == "coefficients":
        raise InputError(f"{name} alone moves nothing.", "Add an objective of images: adamerge.Mixed.")
    if objective.needs_router and not routed:
        raise InputError(f"{name} needs a router.", "Use coefficients such as adamerge.Router.")


def made(make: MakeOptimizer, parameters: Sequence[Any]) -> Optimizer:
    """Make an optimizer, once its options have proved to make one that can step.

    Raises:
        InputError: The optimizer refuses its options, or one of them is no finite number.
    """
    try:
        optimizer = make(parameters)
        if not isinstance(optimizer, CoefficientOptimizer | BiLevel):
            _step_once(make, parameters[0].device)
    except AdamergeError:
        raise
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"optimizer: {reason[:300]}", "Look at the options of model.optimizer.") from error
    for group in optimizer.param_groups:
        for option, value in group.items():
            if isinstance(value, float):
                require(f"optimizer {option}", value, float)
    return optimizer


def _step_once(make: MakeOptimizer, device: torch.device) -> None:
    """Step with a parameter of no consequence."""
    trial = torch.nn.Parameter(torch.zeros(2, 2, device=device))
    trial.grad = torch.zeros_like(trial)
    make([trial]).step(lambda: 0.0)


def require_optimizer(optimizer: Optimizer, task: Stepping, max_steps: int, processes: int) -> None:
    """Refuse an optimizer that is of no use to this objective, these coefficients or several processes."""
    searches = getattr(optimizer, "reads", "") == "loss"
    if not task.objective.differentiable and not searches:
        name = type(task.objective).__name__
        raise InputError(f"this {name} has no gradient.", "Use adamerge.CMAES.")
    if isinstance(optimizer, CoefficientOptimizer):
        _require_matrix(optimizer, task, processes)
    if isinstance(optimizer, BiLevel):
        _require_masks(task, max_steps, processes)
    if searches:
        _require_judge(optimizer, task.objective)


def require_decay(decay: Decay, optimizer: Optimizer, max_steps: int) -> None:
    """Refuse a falling rate where there is no rate, or no end."""
    if isinstance(optimizer, BiLevel) or "lr" not in optimizer.param_groups[0]:
        raise InputError(f"{type(optimizer).__name__} has no learning rate to decay.", "Use decay: none.")
    if max_steps < 1:
        raise InputError(f"decay={decay!r} with trainer.max_steps={max_steps}.", "Give the last step.")


def require_comparable(objective: Objective, judged: Container[str], tasks: Sequence[str]) -> None:
    """A search must not be rewarded for coefficients at which an objective gives up a task."""
    skipped = [task for task in tasks if task not in judged]
    if skipped:
        raise InputError(
            f"{type(objective).__name__} gave no loss for {shortlist(skipped)}: losses of different "
            "coefficients cannot be compared.",
            _COMPARABLE,
        )


def require_trainer(trainer: Trainer, processes: int, *, fits: bool, normalises: bool) -> None:
    """Refuse settings under which a step would be another; ``normalises``: the router does, over images."""
    if trainer.precision not in _PRECISIONS:
        raise InputError(
            f"precision {trainer.precision!r} would round the coefficients.",
            f"Use one of {', '.join(_PRECISIONS)}: coefficients and heads stay in fp32.",
        )
    if processes > 1 and trainer._accelerator_connector.use_distributed_sampler:
        raise InputError(
            "the tasks are dealt out to the processes here, not by Lightning.",
            "Pass Trainer(use_distributed_sampler=False).",
        )
    if fits and trainer.accumulate_grad_batches != 1:
        raise InputError(
            f"accumulate_grad_batches={trainer.accumulate_grad_batches}: a step is one batch of every task.",
            "Use a larger data.batch_size; a batch runs task by task anyway.",
        )
    if fits and processes > 1 and normalises:
        raise InputError(
            "this router normalises over the images of all tasks, and each process has some tasks alone.",
            "Use network='linear', or --trainer.devices 1.",
        )


def _require_matrix(optimizer: CoefficientOptimizer, task: Stepping, processes: int) -> None:
    name = type(optimizer).__name__
    if task.mixture is not None:
        raise InputError(f"{name} steps on static coefficients; a router has none.", "Use torch.optim.Adam.")
    _ = optimizer.values  # one matrix, or it says so
    if optimizer.reads == "task_gradients" and processes > 1:
        raise InputError(f"{name} needs the gradients of all tasks in one process.", "Use one device.")
    penalty = task.objective.penalty(list(task.coefficients.parameters()))
    if optimizer.reads == "task_gradients" and penalty is not None:
        raise InputError(f"{name} steps on the tasks' gradients alone.", "Leave out Prior, or use Adam.")


def _require_masks(task: Stepping, last: int, processes: int) -> None:
    """Two levels are numbers and masks, and nothing else, in one process, and both have their turn."""
    space = task.coefficients
    if not isinstance(space, Concrete) or task.adapters is not None or processes > 1:
        raise InputError(
            "BiLevel needs numbers and masks alone, and one process.",
            "Use adamerge.Concrete without adapters, on one device.",
        )
    if space.learn_numbers and space.fix_after and 0 < last <= space.fix_after:
        warnings.warn(
            f"the numbers have their turn after fix_after={space.fix_after} steps, and max_steps={last}: "
            "they stay as they are.",
            AdamergeWarning,
            stacklevel=2,
        )


def _require_judge(optimizer: Optimizer, objective: Objective) -> None:
    name = type(optimizer).__name__
    if objective.ascends:
        raise InputError(f"{name} computes no gradient, and a perturbation needs one.", "Use Adam.")
    if not objective.judges_all:
        raise InputError(
            f"{type(objective).__name__} leaves images out, and {name} would choose what leaves out most.",
            _COMPARABLE,
        )
