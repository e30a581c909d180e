"""Where a run writes: its folder, or beside an old run that stays until the new one is complete."""

import os
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from adamerge import ownership, provenance
from adamerge.errors import InputError
from adamerge.ownership import NEW

LAST = Path("checkpoints") / "last.ckpt"
_RANKS = ("RANK", "SLURM_PROCID", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK")


class Asked(NamedTuple):
    """What a command line asks of a run folder.

    Attributes:
        run: The folder.
        overwrite: Replace an old run.
        checkpoint: What to resume from: "last", a file's path, or None.
        config: The resolved configuration.
        inputs: Paths that are read, by role.
    """

    run: Path
    overwrite: bool
    checkpoint: str | None
    config: Mapping[str, Any]
    inputs: Mapping[str, str]


class Place(NamedTuple):
    """Where a run writes.

    Attributes:
        folder: The folder to write to.
        run: Where the run is at the end.
        is_resuming: Whether it continues what is there.
    """

    folder: Path
    run: Path
    is_resuming: bool

    @property
    def replaces(self) -> bool:
        """Whether an old run stands there until this one is complete."""
        return self.folder != self.run


def claim_run(asked: Asked, stack: ExitStack) -> Place:
    """Claim a run's folder until the stack is closed; other processes of the same run claim nothing.

    Raises:
        InputError: The folder holds something else or an old run, or another process writes to it.
    """
    if not is_first_process():
        return _place(asked)
    _require_free(asked)
    claim = stack.enter_context(ownership.claimed(asked.run, "run"))
    _require_free(asked)
    place = _place(asked)
    if place.replaces or not place.is_resuming:
        stack.callback(_discard_unstarted, asked.run)
    if place.replaces:
        ownership.protect(asked.run, asked.inputs)
    if not place.is_resuming:
        ownership.discard_new(asked.run)
    if place.replaces:
        stack.enter_context(ownership.claimed(place.folder, "run", lock=False))
    if (place.folder / "merged").exists():
        ownership.require_ours(place.folder / "merged")
    if place.is_resuming and not place.replaces:
        _remove_strays(claim)
    return place


def _remove_strays(claim: ownership.Claim) -> None:
    """Remove the second checkpoint that earlier versions left of an interrupted run."""
    for file in (claim.folder / LAST).parent.glob("epoch=*-step=*.ckpt"):
        if (claim.folder / LAST).is_file() and claim.holds(file.relative_to(claim.folder).as_posix()):
            file.unlink()


def pending(run: Path) -> Path | None:
    """Return the checkpoint of a new run that was interrupted before it could replace the old one."""
    checkpoint = run / NEW / LAST
    return checkpoint if checkpoint.is_file() else None


def complete(place: Place) -> None:
    """Let a run that is complete take the place of the old one."""
    if place.replaces:
        ownership.promote(place.run)


def is_first_process() -> bool:
    """Return whether this is the process that writes, of all that take part in a run."""
    ranks = [os.environ.get(name, "0") for name in _RANKS]
    return ranks[0] == "0" if "RANK" in os.environ else set(ranks[1:]) <= {"0"}


def _place(asked: Asked) -> Place:
    """Decide between the run's folder and the new run beside it."""
    run, new = asked.run, asked.run / NEW
    is_resuming = asked.checkpoint is not None
    if asked.checkpoint == "last" and pending(run) and (asked.overwrite or _is_same(new, asked.config)):
        return Place(new, run, is_resuming=True)
    if is_resuming and not (asked.overwrite and asked.checkpoint == "last" and new.is_dir()):
        return Place(run, run, is_resuming=True)
    has_old = bool(set(ownership.survey(run).files) - {ownership.LIST})
    return Place(new if has_old else run, run, is_resuming=False)


def _is_same(folder: Path, config: Mapping[str, Any]) -> bool:
    """Return whether a run began with this configuration."""
    try:
        before = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return False
    return not provenance.changes({"config": before}, {"config": dict(config)})


def _require_free(asked: Asked) -> None:
    """Refuse to mix two runs, or a run and anything else, in one folder.

    Raises:
        InputError: What is there.
    """
    run = asked.run
    if run.exists() and not run.is_dir():
        raise InputError(f"{run} is a file.", "Choose another --run_dir.")
    if ownership.is_empty(run):
        return
    if ownership.kind_of(run) != "run":
        raise InputError(f"{run} is not empty and holds no run.", "Choose another --run_dir.")
    if asked.checkpoint is None and not asked.overwrite:
        raise InputError(
            f"{run} holds a run already.",
            "Resume it with --ckpt_path last, replace it with --overwrite true, or choose --run_dir.",
        )
    if asked.checkpoint is None:
        ownership.require_ours(run)


def _discard_unstarted(run: Path) -> None:
    """Remove a new run that cannot be resumed."""
    if pending(run) is None:
        ownership.discard_new(run)
