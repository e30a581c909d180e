"""Locks that name who holds them: two processes never write to one output.

A lock is a file that holds host, process and the moment of its start. While its process lives, the system
holds a record lock on it (not inherited by forked workers, gone with the process, also after ``kill -9``);
where the file system knows no such locks, process and start time are compared.
"""

import contextlib
import json
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from adamerge.errors import EnvironmentProblem, InputError
from adamerge.interrupts import cleaning

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_held: dict[str, tuple[int, int]] = {}  # by path: process and thread


@contextlib.contextmanager
def locked(path: Path, what: object) -> Iterator[None]:
    """Hold a lock within the block; a thread that holds it already goes on.

    Args:
        path: The lock file; its folder must exist.
        what: What is locked, for the message.

    Raises:
        InputError: Another process, or thread, holds it.
        EnvironmentProblem: The file cannot be written.
    """
    key, owner = os.path.abspath(path), (os.getpid(), threading.get_ident())
    if _held.get(key) == owner:
        yield
        return
    if _held.get(key, (0, 0))[0] == owner[0]:
        raise _refusal(path, what, _myself())
    descriptor = _acquire(path, what)
    _held[key] = owner

    def release() -> None:
        if os.getpid() == owner[0] and _held.pop(key, None) is not None:
            with contextlib.suppress(OSError):
                path.unlink()
            os.close(descriptor)

    try:
        with cleaning(release):
            yield
    finally:
        release()


def is_another_process(pid: int) -> bool:
    """Return whether a living process other than this one has the identifier (containers repeat them)."""
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def _acquire(path: Path, what: object) -> int:
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        except OSError as error:
            reason = error.strerror or type(error).__name__
            raise EnvironmentProblem(f"cannot write {path}: {reason}.", "Nothing was changed.") from error
        try:
            _require_free(descriptor, path, what)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                    _write(descriptor)
                    return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its holder removed it meanwhile


def _require_free(descriptor: int, path: Path, what: object) -> None:
    """Take the system's lock; where another process holds it, or may hold it, refuse."""
    is_free = _system_lock(descriptor)
    text = os.pread(descriptor, 4096, 0)
    if not text.strip() and is_free is not False:
        return
    holder = _read(text)
    if holder is None:
        if is_free is False:  # it is just being written
            raise _refusal(path, what, {"host": "this host", "pid": "?"})
        raise InputError(f"{path} is in the way: it is no lock of adamerge.", "Move it away.")
    is_here = holder["host"] == socket.gethostname()
    if is_free is None:
        is_free = not _is_alive(holder)
    if not (is_here and is_free):
        raise _refusal(path, what, holder)


def _system_lock(descriptor: int) -> bool | None:
    """Return whether the system's lock was free and is ours now; None where it has no locks."""
    if fcntl is None:
        return None
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        return None
    return True


def _refusal(path: Path, what: object, holder: dict[str, Any]) -> InputError:
    is_here = holder["host"] == socket.gethostname()
    hint = "Wait until it ends, or choose another output."
    if not is_here:
        hint = f"If that process is gone, remove {path}"
    return InputError(f"{what} is in use by process {holder['pid']} on {holder['host']}.", hint)


def _read(text: bytes) -> dict[str, Any] | None:
    with contextlib.suppress(ValueError):
        holder = json.loads(text)
        if isinstance(holder, dict) and {"host", "pid", "start"} <= holder.keys():
            return holder
    return None


def _write(descriptor: int) -> None:
    text = json.dumps(_myself()).encode()
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, text, 0)


def _myself() -> dict[str, Any]:
    return {"host": socket.gethostname(), "pid": os.getpid(), "start": _start_of(os.getpid())}


def _start_of(pid: int) -> str | None:
    """Read when a process began, in the system's own unit: identifiers are given again."""
    with contextlib.suppress(OSError, IndexError):
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19]
    return None


def _is_alive(holder: dict[str, Any]) -> bool:
    try:
        os.kill(int(holder["pid"]), 0)
    except (ProcessLookupError, ValueError, OverflowError):
        return False
    except PermissionError:
        return True
    return _start_of(int(holder["pid"])) == holder["start"]
