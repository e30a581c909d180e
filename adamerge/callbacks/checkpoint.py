"""The last checkpoint of a run: whole whatever happens, and of a step that was taken to its end."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins.io.torch_io import TorchCheckpointIO
from pytorch_lightning.callbacks import ModelCheckpoint

from adamerge import interrupts
from adamerge.atomic import atomic_file
from adamerge.errors import NumericError


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place, on the same file system, and renames it at the end."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint that is the old one or the new one, also after a kill or a loss of power."""
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        with atomic_file(Path(path), durable=True) as temporary:
            torch.save(checkpoint, temporary)


class LastCheckpoint(ModelCheckpoint):
    """Keeps ``last.ckpt``, and ends an interrupted run between two steps.

    A run that stops within a step leaves the checkpoint before it: half a step is of no use. In several
    processes, the trainer itself agrees on the step after which a SIGTERM ends them.

    Args:
        folder: Where it lies.
        every: Steps between checkpoints.
    """

    def __init__(self, folder: Path, every: int) -> None:
        super().__init__(
            folder, save_last=True, save_top_k=0, every_n_train_steps=every, enable_version_counter=False
        )
        self.is_between_steps = False

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: where a run lies is no part of its state."""
        return {}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Read nothing."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let signals wait for the end of a step from here on."""
        super().on_train_start(trainer, pl_module)
        self._last_global_step_saved = trainer.global_step
        alone = trainer.world_size == 1
        interrupts.postpone(*((interrupts.SIGINT, interrupts.SIGTERM) if alone else (interrupts.SIGTERM,)))

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:  # type: ignore[override]  # reads none
        """Remember that a step is under way."""
        self.is_between_steps = False

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *more: Any) -> None:  # type: ignore[override]  # passes them on
        """Save in the rhythm that was asked for; end here where a signal waits."""
        self.is_between_steps = True
        super().on_train_batch_end(trainer, pl_module, *more)
        if trainer.world_size == 1:
            interrupts.check()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let signals act at once again."""
        super().on_train_end(trainer, pl_module)
        interrupts.release()

    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        """Save the last whole step; after a value that is not finite, the last good coefficients."""
        interrupts.acknowledge()
        is_whole = self.is_between_steps or isinstance(exception, NumericError)
        if (
            is_whole
            and not getattr(trainer, "fast_dev_run", False)
            and self._last_global_step_saved != trainer.global_step
        ):
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
