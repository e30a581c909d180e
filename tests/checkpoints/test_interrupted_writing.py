"""Killed, or out of space: the old output or the complete new one is there, and never anything else."""

import errno
import json
import multiprocessing
import os
import random
import shutil
import subprocess
import time
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from adamerge.checkpoints import save, save_stream, writing
from adamerge.checkpoints.reading import INDEX
from adamerge.errors import EnvironmentProblem
from adamerge.ownership import LIST

SHARDS = {
    name: shard
    for shard in ("one.safetensors", "two.safetensors")
    for name in (f"{shard}/{i}" for i in range(8))
}
SECONDS = 0.002  # per tensor


def filled(value: int, seconds: float = 0.0) -> Iterator[tuple[str, Tensor]]:
    """Give all tensors, slowly, filled with one value."""
    for name in SHARDS:
        time.sleep(seconds)
        yield name, torch.full((64,), float(value))


@pytest.fixture
def like(tmp_path: Path) -> Path:
    folder = tmp_path / "like"
    folder.mkdir()
    for shard in set(SHARDS.values()):
        save_file({name: t for name, t in filled(0) if SHARDS[name] == shard}, folder / shard)
    (folder / INDEX).write_text(json.dumps({"weight_map": SHARDS}))
    return folder


def write(value: int, out: Path, like: Path, seconds: float = 0.0) -> None:
    save_stream(filled(value, seconds), out, like=like, overwrite=True, card=str(value))


def write_again_and_again(out: Path, like: Path) -> None:
    for value in range(1, 1000):
        write(value, out, like, SECONDS)


def version_of(out: Path) -> int:
    """Give the one value that all of an output has."""
    assert sorted(os.listdir(out)) == [LIST, "README.md", INDEX, "one.safetensors", "two.safetensors"]
    assert json.loads((out / INDEX).read_text())["weight_map"] == SHARDS
    tensors = {name: t for shard in set(SHARDS.values()) for name, t in load_file(out / shard).items()}
    assert set(tensors) == set(SHARDS)
    values = {value for tensor in tensors.values() for value in tensor.tolist()}
    assert values == {float((out / "README.md").read_text())}
    return int(values.pop())


def test_a_writer_killed_at_any_moment_leaves_a_complete_output(tmp_path: Path, like: Path) -> None:
    moments, out = random.Random(0), tmp_path / "merged"
    processes = multiprocessing.get_context("forkserver")  # imports once, and starts each writer in no time
    processes.set_forkserver_preload(["adamerge.checkpoints"])
    left, versions = 0, set()
    for moment in range(10):
        write(0, out, like)
        first = out.stat().st_ino
        writer = processes.Process(target=write_again_and_again, args=(out, like))
        writer.start()
        while not list(tmp_path.glob(".merged.tmp-*")) or (moment % 2 and out.stat().st_ino == first):
            assert writer.is_alive()
            time.sleep(SECONDS)
        time.sleep(moments.uniform(0, 2 * len(SHARDS) * SECONDS))
        writer.kill()
        writer.join()
        left += len(list(tmp_path.glob(".merged.tmp-*")))
        versions.add(version_of(out))
    assert left > 0  # some were in the middle
    assert max(versions) > 0  # and some had come to an end before
    write(0, out, like)
    assert sorted(os.listdir(tmp_path)) == ["like", "merged"]


def test_too_little_free_space_is_found_before_writing(
    like: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1, 1, 5))
    with pytest.raises(EnvironmentProblem, match="needs 0 MiB, 0 MiB are free"):
        write(1, tmp_path / "deep" / "er", like)
    assert os.listdir(tmp_path) == ["like"]


@pytest.mark.parametrize("nth", [1, 2, len(SHARDS)])
def test_a_disk_that_fills_up_at_any_write_leaves_the_old_output(
    like: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nth: int
) -> None:
    out = tmp_path / "merged"
    write(1, out, like)
    write_at, writes = writing._write_at, iter(range(1, 99))

    def fill_up(file: Path, offset: int, tensor: Tensor) -> None:
        if next(writes) == nth:
            raise OSError(errno.ENOSPC, "No space left on device")
        write_at(file, offset, tensor)

    monkeypatch.setattr(writing, "_write_at", fill_up)
    with pytest.raises(
        EnvironmentProblem, match=r"the disk is full\.\nNothing was left half-written"
    ) as caught:
        write(2, out, like)
    assert caught.value.exit_code == 5
    assert version_of(out) == 1
    assert sorted(os.listdir(tmp_path)) == ["like", "merged"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one MiB, where this user may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting needs rights that this user lacks")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_that_is_really_full(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "require_free_space", lambda *_: None)  # another process took the space
    like, out = small_disk.parent / "like", small_disk / "merged"
    like.mkdir()
    model = {"w": torch.zeros(2**17), "v": torch.ones(2**10)}  # half of the disk: two do not fit
    save_file(model, like / "model.safetensors")
    save(model, out, like=like)
    with pytest.raises(EnvironmentProblem, match="the disk is full"):
        save({name: tensor + 1 for name, tensor in model.items()}, out, like=like, overwrite=True)
    assert os.listdir(small_disk) == ["merged"]
    assert torch.equal(load_file(out / "model.safetensors")["v"], model["v"])
