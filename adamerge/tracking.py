"""Weights & Biases as a guest: offline unless a key is there, and never able to stall or end a run."""

import os
import socket
import uuid
import warnings
from collections.abc import Callable, Sequence
from functools import wraps
from netrc import NetrcParseError, netrc
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlparse

from jaxtyping import Float
from lightning_fabric.loggers.logger import rank_zero_experiment
from pytorch_lightning.loggers import WandbLogger
from pytorch_lightning.loggers.logger import DummyLogger
from torch import Tensor

from adamerge.atomic import write_text
from adamerge.errors import AdamergeWarning, EnvironmentProblem
from adamerge.plots import heat_map

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SECONDS = 10


def _guarded(method: Callable[..., Any]) -> Callable[..., Any]:
    """Turn a logger's failure into one warning, after which it stays silent."""

    @wraps(method)
    def run(self: "SafeWandbLogger", *args: Any, **kwargs: Any) -> Any:
        if self.failed:
            return None
        try:
            return method(self, *args, **kwargs)
        except Exception as error:
            self.failed = True
            warnings.warn(f"W&B failed and is off from here on: {error}", AdamergeWarning, stacklevel=2)
            return None

    return run


class SafeWandbLogger(WandbLogger):
    """A `WandbLogger` that is offline by default and cannot hurt the run.

    It is online only where an API key is found and the host answers. The run's id is kept in
    ``save_dir``, so that an online run continues after a resume.

    Args:
        save_dir: The run folder.
        project: The W&B project.
        name: The run's name.
        offline: True or False decide; None: look for a key and a host.

    Raises:
        EnvironmentProblem: wandb is not installed.
    """

    def __init__(
        self,
        save_dir: str = "runs",
        project: str = "adamerge",
        name: str | None = None,
        offline: bool | None = None,
    ) -> None:
        os.environ.setdefault("WANDB_SILENT", "true")  # read when wandb is imported
        try:
            import wandb
        except ImportError as error:
            raise EnvironmentProblem(
                "the W&B logger needs wandb, which is not installed.", "pip install wandb"
            ) from error
        self.failed = False
        offline = not can_go_online() if offline is None else offline
        folder = Path(save_dir)
        folder.mkdir(parents=True, exist_ok=True)
        more: dict[str, Any] = {} if offline else {"id": _run_id(folder), "resume": "allow"}
        if os.environ.get("WANDB_MODE") == "disabled":
            more["mode"] = "disabled"
        super().__init__(
            name=name,
            save_dir=folder,
            project=project,
            offline=offline,
            settings=wandb.Settings(init_timeout=_SECONDS, console="off"),
            **more,
        )
        self._wandb_init.pop("anonymous", None)  # Lightning's; wandb warns of it whatever its value

    log_metrics = _guarded(WandbLogger.log_metrics)
    log_hyperparams = _guarded(WandbLogger.log_hyperparams)
    finalize = _guarded(WandbLogger.finalize)
    watch = _guarded(WandbLogger.watch)

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The wandb run, or a stand-in that swallows everything once W&B has failed."""
        if not self.failed:
            try:
                return super().experiment
            except Exception as error:
                self.failed = True
                warnings.warn(f"W&B failed and is off for this run: {error}", AdamergeWarning, stacklevel=2)
        return DummyLogger().experiment

    @_guarded
    def log_coefficients(
        self,
        tasks: Sequence[str],
        groups: Sequence[str],
        values: Float[Tensor, "task group"],
        step: int,
    ) -> None:
        """Log one table (task x group) and one heat map."""
        rows = [[task, *row.tolist()] for task, row in zip(tasks, values, strict=True)]
        self.log_table("coef/table", columns=["task", *groups], data=rows, step=step)
        self.log_picture("coef/heat_map", heat_map(tasks, groups, values))

    @_guarded
    def log_picture(self, name: str, picture: "Figure | str") -> None:
        """Log one picture: a figure, or a file."""
        import wandb

        self.experiment.log({name: wandb.Image(picture)})

    @_guarded
    def close(self) -> None:
        """End the W&B run, so that the next run of this process gets one of its own."""
        self.experiment.finish()


def can_go_online() -> bool:
    """Tell whether W&B could be reached with a key, within two seconds."""
    if os.environ.get("WANDB_MODE", "online") != "online":
        return False
    url = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai"))
    return _has_key(url.hostname or "") and _answers(url.hostname or "", url.port or 443)


def _has_key(host: str) -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc().authenticators(host) is not None
    except (OSError, NetrcParseError):
        return False


def _answers(host: str, port: int, seconds: float = 2.0) -> bool:
    try:
        with socket.create_connection((host, port), timeout=seconds):
            return True
    except OSError:
        return False


def _run_id(folder: Path) -> str:
    path = folder / "wandb-run-id.txt"
    if not path.exists():
        write_text(path, uuid.uuid4().hex[:8])
    return path.read_text(encoding="utf-8").strip()
