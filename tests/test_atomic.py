"""Files and folders appear whole or not at all, whatever happens meanwhile."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from adamerge import atomic
from adamerge.atomic import atomic_file, atomic_folder, require_free_space, write_text
from adamerge.errors import EnvironmentProblem, InputError
from adamerge.ownership import LIST


def entries(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def fill(target: Path, text: str, *, overwrite: bool = True) -> None:
    with atomic_folder(target, overwrite=overwrite) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "a.txt").write_text(text)


def test_a_file_appears_at_the_end_with_its_folder(tmp_path: Path) -> None:
    target = tmp_path / "new" / "deep" / "ü ñ.txt"
    with atomic_file(target) as temporary:
        temporary.write_text("whole")
        assert not target.exists()
    assert target.read_text() == "whole"
    assert entries(target.parent) == ["ü ñ.txt"]


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    write_text(target, "old")

    def write_half() -> None:
        with atomic_file(target) as temporary:
            temporary.write_text("half")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        write_half()
    assert target.read_text() == "old"
    assert entries(tmp_path) == ["a.txt"]


def test_an_error_leaves_the_old_folder_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "run"
    fill(target, "old")

    def fill_half() -> None:
        with atomic_folder(target, overwrite=True) as folder:
            (folder / "b.txt").touch()
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fill_half()
    assert (target / "sub" / "a.txt").read_text() == "old"
    assert entries(tmp_path) == ["run"]


@pytest.mark.parametrize("can_exchange", [True, False])
def test_a_folder_is_replaced_as_a_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, can_exchange: bool
) -> None:
    if not can_exchange:
        monkeypatch.setattr(atomic, "_exchange", lambda a, b: False)
    target = tmp_path / "run"
    fill(target, "old")
    (target / "stray").touch()
    with pytest.raises(InputError, match=r"holds what adamerge did not write: stray\.\nMove that away"):
        fill(target, "new")
    assert (target / "sub" / "a.txt").read_text() == "old"
    (target / "stray").unlink()
    fill(target, "new")
    assert (target / "sub" / "a.txt").read_text() == "new"
    assert entries(target) == [LIST, "sub"]
    assert entries(tmp_path) == ["run"]


def test_a_system_without_exchange_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atomic.ctypes, "CDLL", lambda _: object())
    assert not atomic._exchange(tmp_path, tmp_path)


def test_an_existing_folder_is_refused_by_default(tmp_path: Path) -> None:
    fill(tmp_path / "run", "old")
    with pytest.raises(InputError, match=r"run exists already\.\nChoose another path.*--overwrite"):
        fill(tmp_path / "run", "new", overwrite=False)


def test_a_symlink_is_replaced_and_what_it_points_to_stays(tmp_path: Path) -> None:
    fill(tmp_path / "kept", "old")
    (tmp_path / "run").symlink_to(tmp_path / "kept")
    fill(tmp_path / "run", "new")
    assert (tmp_path / "run" / "sub" / "a.txt").read_text() == "new"
    assert (tmp_path / "kept" / "sub" / "a.txt").read_text() == "old"
    assert entries(tmp_path) == ["kept", "run"]


def test_what_dead_processes_left_is_swept_and_only_that(tmp_path: Path) -> None:
    """A container's processes get the same ids again, so our own id marks a dead one too."""
    leftovers = [f".a [1].tmp-{dead_pid()}", f".a [1].tmp-{os.getpid()}"]
    others = [".a [1].tmp-1", ".a [1].tmp-mine", f".b.tmp-{dead_pid()}"]
    for name in leftovers + others:
        (tmp_path / name).mkdir()
    write_text(tmp_path / "a [1]", "new")
    assert entries(tmp_path) == sorted([*others, "a [1]"])


def test_a_process_of_somebody_else_counts_as_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    def deny(pid: int, signal: int) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "kill", deny)
    assert atomic._is_another_process(12345)


def test_a_killed_writer_leaves_the_old_file_and_the_next_one_sweeps(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    write_text(target, "old")
    kill = "import os, pathlib; from adamerge.atomic import atomic_file\n"
    kill += (
        f"with atomic_file(pathlib.Path({str(target)!r})) as f: f.write_text('half'); os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", kill], check=False).returncode == -9
    assert target.read_text() == "old"
    assert len(entries(tmp_path)) == 2
    write_text(target, "new")
    assert entries(tmp_path) == ["a.txt"]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.ENOSPC, "full"), "the disk is full"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "the disk is full"),
        (OSError(errno.EROFS, "ro"), "the disk is read-only"),
        (PermissionError(errno.EACCES, "no"), "permission was denied"),
        (OSError(errno.EDQUOT, "quota"), "the disk quota is used up"),
    ],
)
def test_the_systems_errors_are_named(tmp_path: Path, error: Exception, reason: str) -> None:
    expected = pytest.raises(EnvironmentProblem, match=f"cannot write .*a.txt: {reason}")
    with expected as caught, atomic_file(tmp_path / "a.txt"):
        raise error
    assert caught.value.exit_code == 5
    assert entries(tmp_path) == []


@pytest.mark.parametrize("below", ["file/a.txt", "file/deep/a.txt"])
def test_a_file_where_a_folder_should_be_is_named(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(EnvironmentProblem, match="a parent is a file"):
        write_text(tmp_path / below, "x")


def test_a_folder_where_a_file_should_be_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").mkdir()
    with pytest.raises(EnvironmentProblem, match="a folder has that name"):
        write_text(tmp_path / "a.txt", "x")


def test_free_space_is_asked_of_the_disk_that_will_hold_the_output(tmp_path: Path) -> None:
    require_free_space(tmp_path / "not" / "yet", 1)
    with pytest.raises(EnvironmentProblem, match=r"MiB are free\.\nFree some space"):
        require_free_space(tmp_path / "not" / "yet", 2**60)
