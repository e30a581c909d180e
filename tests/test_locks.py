"""One process at a time: a lock names its holder, and is free when that process is gone."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from adamerge import locks
from adamerge.errors import EnvironmentProblem, InputError
from adamerge.locks import locked

HOLD = """
import sys, time
from pathlib import Path
from adamerge.locks import locked
with locked(Path(sys.argv[1]), "run"):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path: Path):
    """A process that holds the lock ``tmp_path / "lock"``."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_it_is_there_within_the_block_alone(tmp_path: Path) -> None:
    with locked(tmp_path / "lock", "run"), locked(tmp_path / "lock", "run"):
        assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


def test_another_process_is_refused_and_told_who_holds_it(tmp_path: Path, holder: subprocess.Popen) -> None:
    refused = pytest.raises(
        InputError, match=f"run is in use by process {holder.pid} on {socket.gethostname()}"
    )
    with refused, locked(tmp_path / "lock", "run"):
        pass
    assert (tmp_path / "lock").exists()


def test_it_is_free_after_a_kill(tmp_path: Path, holder: subprocess.Popen) -> None:
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (tmp_path / "lock").exists()
    with locked(tmp_path / "lock", "run"):
        pass
    assert not (tmp_path / "lock").exists()


def test_another_host_cannot_be_asked(tmp_path: Path) -> None:
    (tmp_path / "lock").write_text(json.dumps({"host": "elsewhere", "pid": 1, "start": None}))
    refused = pytest.raises(
        InputError, match=r"process 1 on elsewhere\.\nIf that process is gone, remove .*lock"
    )
    with refused, locked(tmp_path / "lock", "run"):
        pass
    assert "elsewhere" in (tmp_path / "lock").read_text()


@pytest.mark.parametrize("is_alive", [True, False])
def test_without_locks_of_the_system_identifier_and_start_decide(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, holder: subprocess.Popen, is_alive: bool
) -> None:
    monkeypatch.setattr(locks, "fcntl", None)
    lock = tmp_path / "lock"
    if not is_alive:  # the identifier belongs to another process by now
        lock.write_text(json.dumps({"host": socket.gethostname(), "pid": holder.pid, "start": "1"}))
    if is_alive:
        with pytest.raises(InputError, match="in use"), locked(lock, "run"):
            pass
    else:
        with locked(lock, "run"):
            pass


def test_another_thread_is_refused(tmp_path: Path) -> None:
    found: list[str] = []

    def try_it() -> None:
        try:
            with locked(tmp_path / "lock", "run"):
                pass
        except InputError as error:
            found.append(str(error))

    with locked(tmp_path / "lock", "run"):
        thread = threading.Thread(target=try_it)
        thread.start()
        thread.join()
    assert "in use by process" in found[0]


def test_what_is_no_lock_stays(tmp_path: Path) -> None:
    (tmp_path / "lock").write_text("mine")
    (tmp_path / "target").touch()
    (tmp_path / "link").symlink_to(tmp_path / "target")
    with pytest.raises(InputError, match="is in the way"), locked(tmp_path / "lock", "run"):
        pass
    with pytest.raises(EnvironmentProblem, match="cannot write"), locked(tmp_path / "link", "run"):
        pass
    assert (tmp_path / "lock").read_text() == "mine"
