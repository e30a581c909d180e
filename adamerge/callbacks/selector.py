"""The selector: keeps the best state of an adaptation, by what the experts say of held-out images."""

import warnings
from collections.abc import Mapping
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from torch import Tensor

from adamerge.callbacks.signs import Signs, mean_of, signs_of
from adamerge.data.datasets import Images
from adamerge.errors import AdamergeWarning, InputError
from adamerge.ranges import Count, Natural, checked
from adamerge.task import MergeTask

_FEWEST = 16  # images of a task that are worth judging by


class Selector(pl.Callback):
    """Watches an adaptation, and keeps its best state, stops it and rolls it back, without any label.

    It looks at adaptation images that training does not see; where a task has fewer than 16 of these, at all
    of its adaptation images; never at test images. Best means the best mean ``score`` over tasks; the start
    is among the candidates. A task has collapsed when its predictions crowd into one class as its expert's
    do not (``top_share``), when its mean prediction loses its spread (``marginal``), or when it agrees with
    its expert clearly less often than before adaptation: such a state is never the best, and where the last
    state is to be kept a run stops there. A task with fewer than 16 images is not judged.

    Args:
        every_n_steps: How often to look; 0 turns the selector off.
        max_images: Images per task that it looks at.
        score: What is best: the least "teacher_kl", divergence from the experts' predictions (see `Signs`),
            or the most "agreement" with their classes.
        patience: Looks without a better score after which to stop; 0: never.
        keep: Which coefficients a run ends with: the "best" seen, or the "last", as published.
        top_share: Largest share of one class, unless the expert's or the start's is as large.
        marginal: Smallest marginal entropy, relative to the expert's or the start's.
        lost_agreement: Largest loss of agreement, absolute, of one task since the start.

    Raises:
        InputError: An option is out of its range.
    """

    @checked
    def __init__(
        self,
        every_n_steps: Natural = 20,
        max_images: Count = 64,
        *,
        score: Literal["teacher_kl", "agreement"] = "teacher_kl",
        patience: Natural = 10,
        keep: Literal["best", "last"] = "best",
        top_share: float = 0.9,
        marginal: float = 0.5,
        lost_agreement: float = 0.2,
    ) -> None:
        if keep not in ("last", "best") or score not in ("teacher_kl", "agreement"):
            raise InputError(
                f"selector: keep={keep!r}, score={score!r}.",
                "Keep the 'best' or the 'last', by 'teacher_kl' or 'agreement'.",
            )
        self.every_n_steps, self.max_images = every_n_steps, max_images
        self.score, self.patience, self.keep = score, patience, keep
        self.top_share, self.marginal, self.lost_agreement = top_share, marginal, lost_agreement
        self.verdict = ""
        self._start: dict[str, Signs] = {}
        self._best: dict[str, Any] = {"score": -float("inf"), "step": 0, "values": {}, "agreement": {}}
        self._looks_since_best, self._looked_at = 0, -1
        self._last: dict[str, Tensor] = {}  # the end, where a run went back to its best
        self._images: dict[str, Images] = {}
        self._expert: dict[str, Tensor] = {}
        self._expert_signs: dict[str, Signs] = {}

    @property
    def has_judged(self) -> bool:
        """Whether the run ends with the best state seen, by the experts' predictions."""
        return self.keep == "best" and bool(self._best["values"])

    @property
    def agreement(self) -> dict[str, dict[str, float]]:
        """How often merged model and expert name the same class of held-out images, by task, in percent.

        At the "start", and "now": in the best state, where that is the one that is kept.
        """
        found = self._best["agreement"] if self.keep == "best" else {}
        starts = {task: self._start[task].agreement for task in found}
        return {task: {"start": 100 * starts[task], "now": 100 * now} for task, now in found.items()}

    def on_train_start(self, trainer: pl.Trainer, pl_module: MergeTask) -> None:  # type: ignore[override]  # ours only
        """Hear the experts once, and look before the first step."""
        if self.verdict:  # a run that was stopped stays stopped when it is resumed
            trainer.should_stop = True
        if self.verdict or not self.every_n_steps:
            return
        if self._last:  # a run that had ended goes on from its end
            pl_module.learned.load_state_dict(self._last)
            self._last = {}
        self._listen(pl_module)
        if self._expert and not self._start:
            self._start = self._look(pl_module)
            self._remember(trainer, pl_module, self._start)
        elif self._expert and self._is_due(trainer):  # a look may have been cut off
            self._judge(trainer, pl_module, self._look(pl_module))

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: MergeTask, *_: Any) -> None:  # type: ignore[override]  # ours only
        """Look now and then; stop and roll back where it is time."""
        if not self._expert or not self._is_due(trainer):
            return
        signs = self._look(pl_module)
        pl_module.log_dict({f"selector/{name}": value for name, value in mean_of(signs)._asdict().items()})
        self._judge(trainer, pl_module, signs)

    def on_train_end(self, trainer: pl.Trainer, pl_module: MergeTask) -> None:  # type: ignore[override]  # ours only
        """Go back to the best coefficients where they are wanted."""
        if self.keep == "last" or self.verdict or self._last or not self.every_n_steps:
            return
        if not self._expert:
            self._listen(pl_module)
        if self._expert:
            if not self._start:  # a method that takes no step: on_train_start was never called
                self._start = self._look(pl_module)
                self._remember(trainer, pl_module, self._start)
            elif self._looked_at != trainer.global_step:
                self._remember(trainer, pl_module, self._look(pl_module))
            self._last = _copy_of(pl_module.learned)
            pl_module.learned.load_state_dict(self._best["values"])

    def on_fit_end(self, trainer: pl.Trainer, pl_module: MergeTask) -> None:  # type: ignore[override]  # ours only
        """Do so too where a run resumes after its last step, and nothing is left to train."""
        self.on_train_end(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """Remember start and best across a resume."""
        start = {task: tuple(sign) for task, sign in self._start.items()}
        state = {"start": start, "best": self._best, "last": self._last, "verdict": self.verdict}
        return state | {"looks_since_best": self._looks_since_best, "looked_at": self._looked_at}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take them back."""
        self._start = {task: Signs(*sign) for task, sign in state_dict["start"].items()}
        self._best |= state_dict["best"]  # `agreement` is younger than some checkpoints
        self._last = dict(state_dict["last"])
        self._looks_since_best, self._looked_at = state_dict["looks_since_best"], state_dict["looked_at"]
        self.verdict = state_dict["verdict"]

    def _listen(self, module: MergeTask) -> None:
        """Hear the experts."""
        for task in module.data.adapting_tasks:
            images = module.data.held_out(task)
            images = images if len(images) >= _FEWEST else module.data.all_adaptation(task)
            if len(images) >= _FEWEST:
                self._images[task] = images.sample(self.max_images)
                self._expert[task] = logits = module.expert_logits(task, self._images[task])
                self._expert_signs[task] = signs_of(logits, logits)

    def _is_due(self, trainer: pl.Trainer) -> bool:
        return trainer.global_step % self.every_n_steps == 0 and self._looked_at != trainer.global_step

    def _judge(self, trainer: pl.Trainer, module: MergeTask, signs: Mapping[str, Signs]) -> None:
        self._remember(trainer, module, signs)
        reason = self._collapse_in(signs) if self.keep == "last" else self._lost_patience(signs)
        if trainer.world_size > 1:  # processes must stop together, whatever their rounding
            reason = trainer.strategy.broadcast(reason)
        if reason:
            self._roll_back(trainer, module, reason)

    def _look(self, module: MergeTask) -> dict[str, Signs]:
        weights = module.evaluated()  # merged once for all tasks
        return {
            task: signs_of(module.merged_logits(task, self._images[task], weights), expert)
            for task, expert in self._expert.items()
        }

    def _collapse_in(self, signs: Mapping[str, Signs]) -> str:
        for task, sign in signs.items():
            expert, start = self._expert_signs[task], self._start[task]
            if sign.top_share > max(self.top_share, expert.top_share, start.top_share):
                return f"{100 * sign.top_share:.0f} % of task {task!r} fall into one class"
            if sign.marginal < self.marginal * min(expert.marginal, start.marginal):
                return f"the marginal entropy of task {task!r} fell to {sign.marginal:.2f} log C"
            lost = start.agreement - sign.agreement
            if lost > self.lost_agreement:
                return f"task {task!r} agrees with its expert {100 * lost:.0f} points less than at the start"
        return ""

    def _lost_patience(self, signs: Mapping[str, Signs]) -> str:
        if not self.patience or self._looks_since_best < self.patience:
            return ""
        told = f"{self._looks_since_best} looks without a better {self.score}"
        collapse = self._collapse_in(signs)
        return f"{told}; at last {collapse}" if collapse else told

    def _remember(self, trainer: pl.Trainer, module: MergeTask, signs: Mapping[str, Signs]) -> None:
        """Keep the state where it is the best so far and no task has collapsed."""
        mean = mean_of(signs)
        self._looked_at = trainer.global_step
        score = mean.agreement if self.score == "agreement" else -mean.teacher_kl
        self._looks_since_best += 1
        is_start = not self._best["values"]
        if is_start or (score > self._best["score"] and not self._collapse_in(signs)):
            values, step = _copy_of(module.learned), trainer.global_step
            agreement = {task: sign.agreement for task, sign in signs.items()}
            self._best = {"score": score, "step": step, "values": values, "agreement": agreement}
            self._looks_since_best = 0

    def _roll_back(self, trainer: pl.Trainer, module: MergeTask, reason: str) -> None:
        module.learned.load_state_dict(self._best["values"])
        for optimizer in trainer.optimizers:
            optimizer.state.clear()
        self.verdict = (
            f"stopped at step {trainer.global_step} ({reason}); rolled back to step {self._best['step']}"
        )
        warnings.warn(f"selector: {self.verdict}.", AdamergeWarning, stacklevel=2)
        trainer.should_stop = True


def _copy_of(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().cpu().clone() for name, value in module.state_dict().items()}
