"""What a run leaves behind, and what watches over it."""

import csv
import io
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pytorch_lightning as pl
import torch
from jaxtyping import Float
from rich.progress import MofNCompleteColumn, Progress
from torch import Tensor

from adamerge.atomic import write_text
from adamerge.checkpoints import save, save_tensors
from adamerge.data.datasets import Images
from adamerge.errors import AdamergeWarning, InputError
from adamerge.mixture import save_mixture, write_companions
from adamerge.objectives import entropy_of
from adamerge.plots import heat_map, learning_curves, save_picture
from adamerge.progress import console
from adamerge.task import MergeTask
from adamerge.tracking import SafeWandbLogger


class Curves(pl.Callback):
    """Appends every step's losses to ``curves.csv``; a resumed run continues the file.

    Args:
        folder: The run folder.
    """

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder) / "curves.csv"
        self._header: list[str] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: MergeTask) -> None:  # type: ignore[override]  # ours only
        """Begin the file anew, or keep the lines of the steps that are done."""
        if not trainer.is_global_zero:
            return
        self._header = ["step", *pl_module.data.adapting_tasks]
        lines = self.path.read_text(encoding="utf-8").splitlines()[1:] if self.path.exists() else []
        kept = [line for line in lines if _step_of(line) <= trainer.global_step]
        write_text(self.path, "\n".join([",".join(self._header), *kept]) + "\n")

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: MergeTask, *_: Any) -> None:  # type: ignore[override]  # ours only
        """Append the step's losses."""
        if trainer.is_global_zero:
            row = {"step": trainer.global_step} | pl_module.losses
            with self.path.open("a", newline="", encoding="utf-8") as stream:
                csv.DictWriter(stream, self._header, lineterminator="\n").writerow(row)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: MergeTask) -> None:  # type: ignore[override]  # ours only
        """Draw the curves, if there was a step."""
        if trainer.is_global_zero and self.path.exists():
            save_picture(self.path.with_suffix(".png"), lambda: learning_curves(self.path))


def _step_of(line: str) -> float:
    """Read a line's step; a line that a kill cut off counts as never."""
    try:
        return float(line.split(",", 1)[0])
    except ValueError:
        return float("inf")


class StepBar(pl.Callback):
    """Shows step, loss and remaining time: a bar on a terminal, a line every tenth elsewhere.

    Args:
        title: What is running.
    """

    def __init__(self, title: str) -> None:
        self.title = title
        self._progress = Progress(
            *Progress.get_default_columns(), MofNCompleteColumn(), console=console, transient=True
        )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin at the step where the run begins."""
        self._row = self._progress.add_task(self.title, total=trainer.max_steps)
        self._progress.update(self._row, completed=trainer.global_step)
        if console.is_terminal and trainer.is_global_zero:
            self._progress.start()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: MergeTask, *_: Any) -> None:  # type: ignore[override]  # ours only
        """Advance."""
        loss = sum(pl_module.losses.values()) / max(len(pl_module.losses), 1)
        self._progress.update(
            self._row, completed=trainer.global_step, description=f"{self.title} loss {loss:.3f}"
        )
        tenth = max(trainer.max_steps // 10, 1)
        if not console.is_terminal and trainer.is_global_zero and trainer.global_step % tenth == 0:
            console.print(f"{self.title}: step {trainer.global_step}/{trainer.max_steps}, loss {loss:.3f}")

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Give the terminal back, however the run ended."""
        self._progress.stop()


class CoefficientReport(pl.Callback):
    """Writes the named coefficients as safetensors, CSV and heat map, and logs them to W&B.

    Args:
        folder: The run folder.
        every_n_steps: How often the loggers get a table and a picture.
    """

    def __init__(self, folder: str | Path, every_n_steps: int = 50) -> None:
        self.folder, self.every_n_steps = Path(folder), every_n_steps

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: MergeTask, *_: Any) -> None:  # type: ignore[override]  # ours only
        """Log each task's mean, minimum and maximum; now and then the whole matrix."""
        if trainer.loggers and trainer.global_step % self.every_n_steps == 0:
            self._log(trainer, pl_module)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: MergeTask) -> None:  # type: ignore[override]  # ours only
        """Write the files, and point at coefficients that ran away."""
        self._write(trainer, pl_module)
        groups, values = pl_module.coefficients.table()
        if groups and values.abs().max() > _RUNAWAY:
            row, column = divmod(int(values.abs().argmax()), len(groups))
            warnings.warn(
                f"the coefficient of {pl_module.vectors.tasks[row]!r} for {groups[column]} is "
                f"{float(values[row, column]):.2f}: it ran away. Lower the learning rate or the steps.",
                AdamergeWarning,
                stacklevel=2,
            )

    def on_exception(self, trainer: pl.Trainer, pl_module: MergeTask, exception: BaseException) -> None:  # type: ignore[override]  # ours only
        """Write the last good coefficients of a run that stops early."""
        self._write(trainer, pl_module)

    def _write(self, trainer: pl.Trainer, task: MergeTask) -> None:
        groups, values = task.coefficients.table()
        if trainer.is_global_zero and groups:  # routing without parameters has none
            write_coefficients(self.folder, task.vectors.tasks, groups, values)

    def _log(self, trainer: pl.Trainer, task: MergeTask) -> None:
        groups, values = task.coefficients.table()
        for name, row in zip(task.vectors.tasks, values, strict=True):
            task.log_dict({f"coef/{name}/{k}": getattr(row, k)() for k in ("mean", "min", "max")})
        for logger in trainer.loggers:
            if isinstance(logger, SafeWandbLogger):
                logger.log_coefficients(task.vectors.tasks, groups, values, trainer.global_step)


def write_coefficients(
    folder: Path, tasks: Sequence[str], groups: Sequence[str], values: Float[Tensor, "task group"]
) -> None:
    """Write ``coefficients.safetensors``, ``.csv`` and ``.png``; each task is a named row."""
    save_tensors(
        dict(zip(tasks, values, strict=True)),
        folder / "coefficients.safetensors",
        {"groups": "\n".join(groups)},
    )
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["task", *groups])
    for task, row in zip(tasks, values, strict=True):
        writer.writerow([task, *map(repr, row.tolist())])
    write_text(folder / "coefficients.csv", stream.getvalue())
    save_picture(folder / "coefficients.png", lambda: heat_map(tasks, groups, values))


class MergedModel(pl.Callback):
    """Writes the merged model when adaptation ends: in the base's own layout, or as a mixture.

    Args:
        folder: The folder to make; an old one is replaced once the new one is complete.
        like: The base checkpoint.
        card: The model card's text.
    """

    def __init__(self, folder: str | Path, like: str | Path, card: str = "") -> None:
        self.folder, self.like, self.card = Path(folder), like, card

    def on_fit_end(self, trainer: pl.Trainer, pl_module: MergeTask) -> None:  # type: ignore[override]  # ours only
        """Merge once more and write."""
        if not trainer.is_global_zero:
            return
        classes = {task: list(spec.classes) for task, spec in pl_module.data.tasks.items()}
        provenance = {"weights": dict(pl_module.vectors.digests)}
        if pl_module.mixture is not None:
            pl_module.mixture.classes = classes
            options: dict[str, Any] = {"like": self.like, "card": self.card, "overwrite": True}
            save_mixture(pl_module.mixture, self.folder, provenance=provenance, **options)
            return
        told: dict[str, Any] = {"classes": classes, "provenance": provenance}
        companions = partial(write_companions, heads=pl_module.fitted_heads, **told)
        state = pl_module.merged_state()
        save(state, self.folder, like=self.like, overwrite=True, card=self.card, companions=companions)


_FEWEST = 16
_RUNAWAY = 2.0


class Signs(NamedTuple):
    """Label-free signs of a task's health, on held-out adaptation images.

    Attributes:
        marginal: Entropy of the mean prediction, divided by log C.
        top_share: Share of the most frequent predicted class.
        agreement: Share of images on which the merged model and the task's expert agree.
    """

    marginal: float
    top_share: float
    agreement: float


def signs_of(logits: Float[Tensor, "image class"], expert: Float[Tensor, "image class"]) -> Signs:
    """Measure the signs of one task's predictions beside its expert's."""
    n_classes = logits.shape[-1]
    mean = logits.softmax(-1).mean(0, keepdim=True)
    classes = logits.argmax(-1)
    shares = torch.bincount(classes, minlength=n_classes) / len(classes)
    agreement = (classes == expert.argmax(-1)).float().mean()
    marginal = entropy_of(mean.log()) / torch.log(torch.tensor(float(n_classes)))
    return Signs(float(marginal), float(shares.max()), float(agreement))


class CollapseGuard(pl.Callback):
    """Stops an adaptation that collapses, and rolls back to the best coefficients seen.

    No label is read. A task has collapsed when its predictions crowd into one class as its expert's do
    not (``top_share``), when its mean prediction loses its spread (``marginal``), or when it agrees with
    its expert clearly less often than before adaptation. Best means the highest mean agreement. Tasks with
    fewer than 16 held-out images are not judged: their shares are noise.

    Args:
        every_n_steps: How often to look; 0 turns the guard off.
        max_images: Held-out images per task that it looks at.
        top_share: Largest share of one class, unless the expert's or the start's is as large.
        marginal: Smallest marginal entropy, relative to the expert's or the start's.
        lost_agreement: Largest loss of agreement, absolute, of one task since the start.
        keep: Which coefficients a run ends with: the "last", as published, or the "best" seen.

    Raises:
        InputError: An option is out of its range.
    """

    def __init__(
        self,
        every_n_steps: int = 20,
        max_images: int = 64,
        *,
        top_share: float = 0.9,
        marginal: float = 0.5,
        lost_agreement: float = 0.2,
        keep: Literal["last", "best"] = "last",
    ) -> None:
        if keep not in ("last", "best") or (keep == "best" and not every_n_steps):
            raise InputError(
                f"guard: keep={keep!r}, every_n_steps={every_n_steps}.",
                "Use 'last', or 'best' with every_n_steps of 1 or more.",
            )
        self.keep = keep
        if every_n_steps < 0 or max_images < 1:
            raise InputError(
                f"guard: every_n_steps={every_n_steps}, max_images={max_images}.",
                "Use 0 or more steps (0: no guard) and at least one image.",
            )
        self.every_n_steps, self.max_images = every_n_steps, max_images
        self.top_share, self.marginal, self.lost_agreement = top_share, marginal, lost_agreement
        self.verdict = ""
        self._start: dict[str, Signs] = {}
        self._best: dict[str, Any] = {"agreement": -1.0, "step": 0, "values": {}}
        self._last: dict[str, Tensor] = {}  # the end, where a run went back to its best
        self._images: dict[str, Images] = {}
        self._expert: dict[str, Tensor] = {}

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
        elif self._expert and trainer.global_step % self.every_n_steps == 0:  # a look may have been cut off
            self._judge(trainer, pl_module, self._look(pl_module))

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: MergeTask, *_: Any) -> None:  # type: ignore[override]  # ours only
        """Look now and then; stop and roll back at the first sign of collapse."""
        if not self._expert or trainer.global_step % self.every_n_steps:
            return
        signs = self._look(pl_module)
        pl_module.log("guard/agreement", _mean_agreement(signs))
        self._judge(trainer, pl_module, signs)

    def on_train_end(self, trainer: pl.Trainer, pl_module: MergeTask) -> None:  # type: ignore[override]  # ours only
        """Go back to the best coefficients where they are wanted."""
        if self.keep == "last" or self.verdict or self._last:
            return
        if not self._expert:
            self._listen(pl_module)
        if self._expert:
            self._remember(trainer, pl_module, self._look(pl_module))
            self._last = _copy_of(pl_module.learned)
            pl_module.learned.load_state_dict(self._best["values"])

    def on_fit_end(self, trainer: pl.Trainer, pl_module: MergeTask) -> None:  # type: ignore[override]  # ours only
        """Do so too where a run resumes after its last step, and nothing is left to train."""
        self.on_train_end(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """Remember start and best across a resume."""
        start = {task: tuple(sign) for task, sign in self._start.items()}
        return {"start": start, "best": self._best, "last": self._last, "verdict": self.verdict}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take them back."""
        self._start = {task: Signs(*sign) for task, sign in state_dict["start"].items()}
        self._best, self._last = dict(state_dict["best"]), dict(state_dict.get("last", {}))
        self.verdict = state_dict["verdict"]

    def _listen(self, module: MergeTask) -> None:
        """Hear the experts."""
        for task in module.data.adapting_tasks:
            held_out = module.data.held_out(task)
            if len(held_out) >= _FEWEST:
                self._images[task] = held_out.sample(self.max_images)
                self._expert[task] = module.expert_logits(task, self._images[task])

    def _judge(self, trainer: pl.Trainer, module: MergeTask, signs: Mapping[str, Signs]) -> None:
        reason = self._collapse_in(signs)
        if trainer.world_size > 1:  # processes must stop together, whatever their rounding
            reason = trainer.strategy.broadcast(reason)
        if reason:
            self._roll_back(trainer, module, reason)
        else:
            self._remember(trainer, module, signs)

    def _look(self, module: MergeTask) -> dict[str, Signs]:
        weights = module.evaluated()  # merged once for all tasks
        return {
            task: signs_of(module.merged_logits(task, self._images[task], weights), expert)
            for task, expert in self._expert.items()
        }

    def _collapse_in(self, signs: Mapping[str, Signs]) -> str:
        for task, sign in signs.items():
            expert, start = signs_of(self._expert[task], self._expert[task]), self._start[task]
            if sign.top_share > max(self.top_share, expert.top_share, start.top_share):
                return f"{100 * sign.top_share:.0f} % of task {task!r} fall into one class"
            if sign.marginal < self.marginal * min(expert.marginal, start.marginal):
                return f"the marginal entropy of task {task!r} fell to {sign.marginal:.2f} log C"
            lost = start.agreement - sign.agreement
            if lost > self.lost_agreement:
                return f"task {task!r} agrees with its expert {100 * lost:.0f} points less than at the start"
        return ""

    def _remember(self, trainer: pl.Trainer, module: MergeTask, signs: Mapping[str, Signs]) -> None:
        agreement = _mean_agreement(signs)
        if agreement > self._best["agreement"]:
            values, step = _copy_of(module.learned), trainer.global_step
            self._best = {"agreement": agreement, "step": step, "values": values}

    def _roll_back(self, trainer: pl.Trainer, module: MergeTask, reason: str) -> None:
        module.learned.load_state_dict(self._best["values"])
        for optimizer in trainer.optimizers:
            optimizer.state.clear()
        self.verdict = (
            f"stopped at step {trainer.global_step} ({reason}); rolled back to step {self._best['step']}"
        )
        warnings.warn(f"collapse guard: {self.verdict}.", AdamergeWarning, stacklevel=2)
        trainer.should_stop = True


def _copy_of(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().cpu().clone() for name, value in module.state_dict().items()}


def _mean_agreement(signs: Mapping[str, Signs]) -> float:
    return sum(sign.agreement for sign in signs.values()) / len(signs)
