"""Remembered digests are those of the bytes."""

import hashlib
import os
from pathlib import Path

import pytest

from adamerge import digests
from adamerge.digests import sha256


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ADAMERGE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "weights").write_bytes(b"before")
    return tmp_path / "weights"


def true_digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.fixture
def readings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Note every reading of a file's bytes."""
    done: list[str] = []

    def counted(stream: object, name: str) -> object:
        done.append(name)
        return hashlib.file_digest(stream, name)

    monkeypatch.setattr(digests, "hashlib", type("H", (), {"file_digest": counted, "sha256": hashlib.sha256}))
    return done


def test_a_file_is_read_once(file: Path, readings: list[str]) -> None:
    assert [sha256(file), sha256(file)] == [true_digest(file)] * 2
    assert len(readings) == 1


def test_unless_asked_for_a_fresh_look(file: Path, readings: list[str]) -> None:
    assert [sha256(file), sha256(file, fresh=True)] == [true_digest(file)] * 2
    assert len(readings) == 2


def test_a_changed_file_is_read_again_even_with_its_old_time(file: Path) -> None:
    sha256(file)
    old = file.stat()
    file.write_bytes(b"after!")
    os.utime(file, ns=(old.st_atime_ns, old.st_mtime_ns))
    assert sha256(file) == true_digest(file)


@pytest.mark.parametrize("note", [b"", b"{", b"[]", b'{"identity": 3}', b"\xff"])
def test_a_damaged_note_counts_as_none(file: Path, tmp_path: Path, note: bytes) -> None:
    sha256(file)
    for path in (tmp_path / "cache" / "digests").iterdir():
        path.write_bytes(note)
    assert sha256(file) == true_digest(file)


def test_without_a_place_to_remember_the_bytes_are_read(
    file: Path, tmp_path: Path, readings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "taken").write_text("a file where the folder should be")
    monkeypatch.setenv("ADAMERGE_CACHE", str(tmp_path / "taken"))
    assert [sha256(file), sha256(file)] == [true_digest(file)] * 2
    assert len(readings) == 2
