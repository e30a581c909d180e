"""SIGINT and SIGTERM end a command with exit code 130 and one line, at whatever moment they arrive.

The first signal raises `Interrupted` where the main thread stands, so that locks are released, temporaries
removed and checkpoints written on the way out. Three situations are special: while the libraries are
imported, the process ends at once (nothing is held yet, and an import may swallow an exception); within an
import of a running command, the exception waits until that import is done; within a training step, it waits
for the end of the step, whose state is whole. A second signal ends the process at once.
"""

import _thread
import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

EXIT_CODE = 130
SIGINT, SIGTERM = signal.SIGINT, signal.SIGTERM
_SAME = 0.3  # seconds within which a second signal is the first one, sent to process and group
_RETRY, _SWALLOWED, _NOTICE = 0.05, 10.0, 2.0  # seconds


class Interrupted(KeyboardInterrupt):
    """A signal asked the process to end."""


class _State:
    """What the handler knows of the command that runs.

    Attributes:
        pid: The process that installed the handler; forked children are others.
        message: Gives the line that is written where the process ends at once.
        first: When the first signal arrived.
        phase: "importing", "running", "postponing" or "finished".
        waits: Whether a signal waits for the end of a step.
        is_unwinding: Whether the exception has been seen.
    """

    def __init__(self, message: Callable[[], str]) -> None:
        self.pid, self.message = os.getpid(), message
        self.first: float | None = None
        self.phase, self.waits, self.is_unwinding = "running", False, False
        self.postponed: tuple[int, ...] = ()

    @property
    def received(self) -> bool:
        """Whether a signal arrived."""
        return self.first is not None


_states: list[_State] = []  # of the commands that run: one, but for tests
_cleanups: list[Callable[[], None]] = []


@contextlib.contextmanager
def handled(message: Callable[[], str], *, until_exit: bool = False) -> Iterator[_State]:
    """Handle both signals within the block; elsewhere than in the main thread, do nothing.

    Args:
        message: Gives the line for standard error where the process ends at once.
        until_exit: Keep the handlers after the block, where a signal can change nothing any more.
    """
    state = _State(message)
    if threading.current_thread() is not threading.main_thread():
        yield state
        return
    _states.append(state)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    hook, sys.unraisablehook = sys.unraisablehook, _unraisable(sys.unraisablehook)
    for number, handler in before.items():
        if handler not in (signal.SIG_IGN, None):  # a background job ignores Ctrl-C
            signal.signal(number, _on_signal)
    try:
        yield state
    finally:
        state.phase = "finished"
        sys.unraisablehook = hook
        if not until_exit:
            _states.remove(state)
            for number, handler in before.items():
                if handler is not None:
                    signal.signal(number, handler)


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Let a signal end the process at once: nothing is held, and imports may swallow exceptions."""
    state = _now()
    if state is None:
        yield
        return
    state.phase = "importing"
    try:
        yield
    finally:
        state.phase = "running"


def postpone(*numbers: int) -> None:
    """Let these signals wait for `release` or `check`: a step begins, whose half is of no use."""
    if state := _now():
        state.postponed = numbers


def check() -> None:
    """Raise Interrupted if a signal waits."""
    state = _now()
    if state is not None and state.waits:
        state.waits = False
        _raise()


def release() -> None:
    """Let signals act at once again, and one that waits now."""
    postpone()
    check()


def acknowledge() -> None:
    """State that the exception was seen: an orderly end follows, which a further signal cuts short."""
    if state := _now():
        state.is_unwinding, state.postponed, state.waits = True, (), False
        if threading.current_thread() is threading.main_thread() and state.received:
            signal.signal(signal.SIGINT, _on_signal)  # the trainer ignores it while it shuts down


def is_received() -> bool:
    """Return whether a signal arrived while the present command ran."""
    state = _now()
    return state is not None and state.received


@contextlib.contextmanager
def cleaning(cleanup: Callable[[], None]) -> Iterator[None]:
    """Register what is to be done where a signal ends the process within the block."""
    _cleanups.append(cleanup)
    try:
        yield
    finally:
        _cleanups.remove(cleanup)


def _now() -> _State | None:
    return _states[-1] if _states else None


def _on_signal(number: int, frame: FrameType | None) -> None:
    state = _now()
    if state is None or state.pid != os.getpid():
        _as_a_child(number)
        return
    if state.phase == "finished":
        return
    now, is_second = time.monotonic(), state.received
    if state.first is None:
        state.first = now
    if is_second and now - state.first < _SAME:
        return
    if is_second or state.phase == "importing":
        _leave(state)
    if number in state.postponed:
        state.waits = True
        _later(_NOTICE, _notice)
        return
    _deliver(frame)


def _deliver(frame: FrameType | None) -> None:
    """Raise the exception, but not where an import would swallow it."""
    if _is_importing(frame):
        _later(_RETRY, _again)
    else:
        _raise()


def _raise() -> None:
    _later(_SWALLOWED, _again)
    raise Interrupted


def _again() -> None:
    """Deliver the signal once more, from another thread, unless the first exception was seen."""
    state = _now()
    if state is not None and not state.is_unwinding and state.phase != "finished":
        state.first = None
        _thread.interrupt_main(signal.SIGINT)


def _notice() -> None:
    state = _now()
    if state is not None and state.waits:
        sys.stderr.write("adamerge: stopping after this step; once more stops at once, without saving.\n")


def _later(seconds: float, what: Callable[[], None]) -> None:
    timer = threading.Timer(seconds, what)
    timer.daemon = True
    timer.start()


def _leave(state: _State) -> None:
    """End the process: remove what is temporary, tell how to go on."""
    for cleanup in reversed(_cleanups):
        with contextlib.suppress(Exception):
            cleanup()
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        sys.stderr.write(f"adamerge: {state.message()}\n")
        sys.stderr.flush()
    os._exit(EXIT_CODE)


def _as_a_child(number: int) -> None:
    """Act as if no handler were there: a forked worker has none of its own."""
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def _unraisable(before: Callable[[Any], Any]) -> Callable[[Any], None]:
    """Return a hook that raises an interrupt again which a finalizer has swallowed."""

    def hook(unraisable: Any) -> None:
        if unraisable.exc_type is Interrupted:
            _later(_RETRY, _again)
        else:
            before(unraisable)

    return hook
