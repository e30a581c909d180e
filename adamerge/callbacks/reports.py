"""What a run leaves behind: its coefficients, and the merged model."""

import csv
import io
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from jaxtyping import Float
from torch import Tensor

from adamerge.atomic import write_text
from adamerge.callbacks.selector import Selector
from adamerge.checkpoints import save, save_tensors
from adamerge.errors import AdamergeWarning
from adamerge.mixture import save_mixture, write_companions
from adamerge.plots import heat_map, save_picture
from adamerge.task import MergeTask
from adamerge.tracking import SafeWandbLogger

_UNUSUAL = 2.0  # published coefficients lie between 0 and 1


class CoefficientReport(pl.Callback):
    """Writes the named coefficients as safetensors, CSV and heat map, and logs them to W&B.

    Args:
        folder: The run folder.
        every_n_steps: How often the loggers get a table and a picture.
    """

    def __init__(self, folder: str | Path, every_n_steps: int = 50) -> None:
        self.folder, self.every_n_steps = Path(folder), every_n_steps
        self._has_begun = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: MergeTask) -> None:  # type: ignore[override]  # ours only
        """Remember that the coefficients are those of the run, also where it was resumed."""
        self._has_begun = True

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: MergeTask, *_: Any) -> None:  # type: ignore[override]  # ours only
        """Log each task's mean, minimum and maximum; now and then the whole matrix."""
        if trainer.loggers and trainer.global_step % self.every_n_steps == 0:
            self._log(trainer, pl_module)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: MergeTask) -> None:  # type: ignore[override]  # ours only
        """Write the files; warn of unusual coefficients where no selector judged the end."""
        self._write(trainer, pl_module)
        groups, values = pl_module.coefficients.table()
        is_judged = any(isinstance(c, Selector) and c.has_judged for c in trainer.callbacks)  # type: ignore[attr-defined]  # Lightning's own attribute
        if groups and not is_judged and values.abs().max() > _UNUSUAL:
            row, column = divmod(int(values.abs().argmax()), len(groups))
            warnings.warn(
                f"the coefficient of {pl_module.vectors.tasks[row]!r} for {groups[column]} is "
                f"{float(values[row, column]):.2f}, and no selector has compared this state with the start. "
                "Compare their accuracies; a lower learning rate or fewer steps keep it smaller.",
                AdamergeWarning,
                stacklevel=2,
            )

    def on_exception(self, trainer: pl.Trainer, pl_module: MergeTask, exception: BaseException) -> None:  # type: ignore[override]  # ours only
        """Write the last good coefficients of a run that stops early."""
        if self._has_begun:
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
        classes = {task: pl_module.data.class_names(task) for task in pl_module.data.tasks}
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
