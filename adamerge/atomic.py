"""Files and folders that appear whole or not at all.

Everything is written under a temporary name beside its target and renamed at the end, so a reader sees
the old content or the complete new one, also after ``kill -9``. What is written ``durable`` outlives a loss
of power, too.
"""

import contextlib
import ctypes
import errno
import os
import shutil
from collections.abc import Iterator, Mapping
from glob import escape
from pathlib import Path

from adamerge import ownership
from adamerge.documents import require_path
from adamerge.errors import EnvironmentProblem, InputError
from adamerge.interrupts import cleaning
from adamerge.locks import is_another_process as _is_another_process
from adamerge.locks import locked

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


@contextlib.contextmanager
def atomic_file(target: Path, *, durable: bool = False) -> Iterator[Path]:
    """Give a temporary path to write to; it becomes ``target`` when the block ends well.

    Args:
        target: The file to write or replace.
        durable: Wait until the disk has it, so that it outlives a loss of power.

    Raises:
        EnvironmentProblem: The disk is full or the folder cannot be written.
    """
    ownership.note(target)
    temporary = _fresh_temporary(target)  # a folder: libraries leave temporaries of their own
    try:
        with _named_disk_errors(target), cleaning(lambda: _remove(temporary)):
            temporary.mkdir()
            yield temporary / target.name
            _share(temporary / target.name)
            if durable:
                _synchronise(temporary / target.name)
            os.replace(temporary / target.name, target)
            if durable and os.name == "posix":
                _synchronise(target.parent)
    finally:
        _remove(temporary)


@contextlib.contextmanager
def atomic_folder(target: Path, *, overwrite: bool = False, is_cache: bool = False) -> Iterator[Path]:
    """Give a temporary folder to fill; it becomes ``target``, with a list of its files, at the block's end.

    Args:
        target: The folder to make.
        overwrite: Replace an old one, if adamerge wrote all that it holds.
        is_cache: The folder is ours by its place, and several processes may write the same at once.

    Raises:
        InputError: ``target`` exists and ``overwrite`` is false, holds files of somebody else, or is being
            written by another process.
        EnvironmentProblem: The disk is full or the folder cannot be written.
    """
    if not is_cache:
        refuse_existing(target, overwrite=overwrite)
    ownership.note(target, is_folder=True)
    with contextlib.nullcontext() if is_cache else exclusive(target):
        temporary = _fresh_temporary(target)
        try:
            with _named_disk_errors(target), cleaning(lambda: _remove(temporary)):
                temporary.mkdir()
                yield temporary
                if not is_cache:
                    ownership.list_folder(temporary)
                for path in temporary.rglob("*"):
                    _share(path)
                _share(temporary)
                if not is_cache:
                    refuse_existing(target, overwrite=overwrite)  # as it is now
                _swap(temporary, target)
        finally:
            _remove(temporary)


@contextlib.contextmanager
def exclusive(target: Path) -> Iterator[None]:
    """Keep other processes from writing to a target within the block.

    Raises:
        InputError: One does.
    """
    with _named_disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    with locked(target.parent / f".{target.name}.lock", target):
        yield


def write_text(target: Path, text: str) -> None:
    """Write a small text file atomically, making its folder if need be."""
    with atomic_file(target) as temporary:
        temporary.write_text(text, encoding="utf-8")


def refuse_existing(target: Path, *, overwrite: bool, inputs: Mapping[str, str | Path] | None = None) -> None:
    """Raise InputError if the target is already there and may not be replaced.

    Args:
        target: The file or folder to write.
        overwrite: Replace what adamerge wrote; what anybody else did stays.
        inputs: What is read, by its role: no output may take its place.
    """
    require_path("output", str(target))
    _restore(target)
    if target.exists() and not overwrite:
        raise InputError(
            f"output {target} exists already.",
            "Choose another path, or pass overwrite=True (--overwrite) to replace it.",
        )
    ownership.protect(target, inputs or {})
    if target.exists():
        ownership.require_ours(target)


def require_free_space(folder: Path, n_bytes: int) -> None:
    """Raise EnvironmentProblem unless the disk that holds ``folder`` has ``n_bytes`` free."""
    existing = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    free = shutil.disk_usage(existing).free
    if free < n_bytes:
        raise EnvironmentProblem(
            f"writing to {folder} needs {n_bytes / 2**20:.0f} MiB, {free / 2**20:.0f} MiB are free.",
            "Free some space or choose another disk; nothing was written.",
        )


def _fresh_temporary(target: Path) -> Path:
    """Make the parent folder, sweep what dead processes left, and name a temporary path."""
    with _named_disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        for stale in target.parent.glob(f".{escape(target.name)}.tmp-*"):
            pid = stale.name.rsplit("-", 1)[1]
            if pid.isdigit() and not _is_another_process(int(pid)):
                _remove(stale)
        _restore(target)
    return target.parent / f".{target.name}.tmp-{os.getpid()}"


def _restore(target: Path) -> None:
    """Undo or complete what a process did that was killed while it replaced a folder in two steps."""
    for old in target.parent.glob(f".{escape(target.name)}.old-*"):
        pid = old.name.rsplit("-", 1)[1]
        if pid.isdigit() and not _is_another_process(int(pid)):
            if os.path.lexists(target):
                _remove(old)
            else:
                os.replace(old, target)


def _swap(temporary: Path, target: Path) -> None:
    """Put a folder in the place of another in one step where the system can, else in two."""
    if not target.exists():
        os.replace(temporary, target)
    elif not _exchange(temporary, target):
        old = target.with_name(f".{target.name}.old-{os.getpid()}")
        os.replace(target, old)
        os.replace(temporary, target)
        _remove(old)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two paths atomically (Linux); false where the call or the file system lacks it."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None) if os.name == "posix" else None
    if renameat2 is None:
        return False
    return renameat2(_AT_FDCWD, bytes(a), _AT_FDCWD, bytes(b), _RENAME_EXCHANGE) == 0


def _synchronise(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _share(path: Path) -> None:
    """Give ordinary permissions: safetensors writes files that only their owner can read."""
    if path.is_symlink():
        return  # what it leads to is not ours
    umask = os.umask(0)
    os.umask(umask)
    path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def _named_disk_errors(target: Path) -> Iterator[None]:
    """Turn the operating system's errors, and safetensors' wrapping of them, into ours."""
    try:
        yield
    except Exception as error:
        reasons = {errno.ENOSPC: "the disk is full", errno.EROFS: "the disk is read-only"}
        reasons |= {errno.EACCES: "permission was denied", errno.EDQUOT: "the disk quota is used up"}
        reasons |= {errno.ENOTDIR: "a parent is a file", errno.EEXIST: "a parent is a file"}
        reasons |= {errno.EISDIR: "a folder has that name", errno.ENOENT: "no folder can be made there"}
        number = getattr(error, "errno", None)
        if number is None and "No space left" in str(error):
            number = errno.ENOSPC
        if number not in reasons:
            raise
        raise EnvironmentProblem(
            f"cannot write {target}: {reasons[number]}.", "Nothing was left half-written."
        ) from error
