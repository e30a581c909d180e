"""Losses while a run goes on: a file that grows, a picture, a bar."""

import csv
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from rich.progress import MofNCompleteColumn, Progress

from adamerge.atomic import write_text
from adamerge.plots import learning_curves, save_picture
from adamerge.progress import console, new_bar
from adamerge.task import MergeTask


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
        self._progress = new_bar(*Progress.get_default_columns(), MofNCompleteColumn())

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
        if self._progress.live.is_started:  # stopping a bar that never began prints an empty line
            self._progress.stop()
