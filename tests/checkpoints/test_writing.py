"""What is written has the layout of its model, appears whole, and is readable by others."""

import errno
import json
import os
import shutil
import subprocess
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from adamerge.checkpoints import open_checkpoint, save, save_tensors, writing
from adamerge.checkpoints.reading import INDEX
from adamerge.errors import EnvironmentProblem, InputError, NumericError


def state() -> dict[str, Tensor]:
    return {"b.weight": torch.arange(6.0).reshape(2, 3), "b.bias": torch.ones(2), "ids": torch.arange(3)}


@pytest.fixture
def like(tmp_path: Path) -> Path:
    """A sharded folder in mixed dtypes, with companions."""
    folder = tmp_path / "like"
    (folder / "nested").mkdir(parents=True)
    save_file({"b.weight": state()["b.weight"].half()}, folder / "one.safetensors")
    save_file({"b.bias": state()["b.bias"], "ids": state()["ids"]}, folder / "two.safetensors")
    weight_map = {"b.weight": "one.safetensors", "b.bias": "two.safetensors", "ids": "two.safetensors"}
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    for name in ("config.json", "README.md", "pytorch_model.bin"):
        (folder / name).write_text("{}")
    return folder


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "merged"


def entries(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def test_a_folder_keeps_shards_dtypes_and_companions(like: Path, out: Path) -> None:
    assert save(state(), out, like=like, card="# merged") == out
    assert entries(out) == ["README.md", "config.json", INDEX, "one.safetensors", "two.safetensors"]
    assert (out / "README.md").read_text() == "# merged"
    assert json.loads((out / INDEX).read_text())["metadata"]["total_size"] == 6 * 2 + 2 * 4 + 3 * 8
    reread = open_checkpoint(out)
    assert {n: t.dtype for n, t in reread.items()} == {n: t.dtype for n, t in open_checkpoint(like).items()}
    assert all(torch.equal(reread[n].float(), t.float()) for n, t in state().items())


def test_a_dtype_that_was_asked_for_leaves_integers_alone(like: Path, out: Path) -> None:
    save(state(), out, like=like, dtype=torch.bfloat16)
    assert [open_checkpoint(out).info(n).dtype for n in ("b.weight", "b.bias", "ids")] == [
        torch.bfloat16,
        torch.bfloat16,
        torch.int64,
    ]


def test_a_file_is_written_like_a_file(tmp_path: Path, out: Path) -> None:
    save_file(state(), tmp_path / "like.safetensors")
    save(state(), out, like=tmp_path / "like.safetensors")
    assert set(load_file(out)) == set(state())


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_modes_follow_the_umask(tmp_path: Path, like: Path, out: Path, kind: str) -> None:
    save_file(state(), tmp_path / "like.safetensors")
    before = os.umask(0o027)
    try:
        save(state(), out, like=like if kind == "folder" else tmp_path / "like.safetensors")
    finally:
        os.umask(before)
    assert out.stat().st_mode & 0o777 == (0o750 if kind == "folder" else 0o640)
    assert all(path.stat().st_mode & 0o777 == 0o640 for path in out.glob("*"))


def test_open_clip_loads_the_merged_folder_without_us(clip: Path, out: Path) -> None:
    merged = {name: tensor + 1 for name, tensor in open_checkpoint(clip / "base").items()}
    save(merged, out, like=clip / "base")
    model = open_clip.create_model(f"local-dir:{out}")
    assert torch.equal(model.visual.proj, merged["visual.proj"])


def test_symlinks_and_unusual_names(tmp_path: Path, like: Path) -> None:
    (tmp_path / "link").symlink_to(like, target_is_directory=True)
    (like / "config.json").rename(tmp_path / "blob")
    (like / "config.json").symlink_to(tmp_path / "blob")  # as the hub's cache has it
    out = save(state(), tmp_path / "Modèle β [1]" / "fusionné", like=tmp_path / "link")
    assert not (out / "config.json").is_symlink()
    assert torch.equal(open_checkpoint(out)["ids"], state()["ids"])


def test_tensors_that_share_memory_are_written_apart(tmp_path: Path, out: Path) -> None:
    save_file({"a": torch.ones(2), "b": torch.ones(2)}, tmp_path / "like.safetensors")
    tied = torch.full((2,), 3.0)
    save({"a": tied, "b": tied}, out, like=tmp_path / "like.safetensors")
    assert torch.equal(load_file(out)["b"], tied)


def test_an_existing_output_is_kept_unless_told_otherwise(like: Path, out: Path) -> None:
    save(state(), out, like=like)
    doubled = {name: 2 * tensor for name, tensor in state().items()}
    with pytest.raises(InputError, match=r"exists already\.\nChoose another path, or pass overwrite=True"):
        save(doubled, out, like=like)
    assert torch.equal(open_checkpoint(out)["ids"], state()["ids"])
    save(doubled, out, like=out, overwrite=True)  # its own layout may be the model
    assert torch.equal(open_checkpoint(out)["ids"], 2 * state()["ids"])
    assert entries(out.parent) == ["like", "merged"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": None}, "lacks 1 tensors of .* \\(ids\\)"),
        ({"new": torch.ones(1)}, "has 1 others \\(new\\)"),
        ({"b.bias": torch.ones(3)}, "1 tensors have another shape than in .*: b.bias"),
    ],
    ids=["missing", "extra", "shape"],
)
def test_a_state_of_another_model_is_refused(
    like: Path, out: Path, change: dict[str, Tensor | None], message: str
) -> None:
    wrong = {name: tensor for name, tensor in (state() | change).items() if tensor is not None}
    with pytest.raises(InputError, match=message):
        save(wrong, out, like=like)
    assert entries(out.parent) == ["like"]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (float("nan"), r"b.weight\[0, 0\] is not finite; nothing was written"),
        (7e4, "b.weight reaches 7e\\+04, which torch.float16 cannot hold.\nPass dtype=torch.bfloat16"),
    ],
)
def test_values_that_cannot_be_stored_stop_with_nothing_written(
    like: Path, out: Path, value: float, message: str
) -> None:
    wrong = state()
    wrong["b.weight"][0, 0] = value
    with pytest.raises(NumericError, match=message) as caught:
        save(wrong, out, like=like)
    assert caught.value.exit_code == 4
    assert entries(out.parent) == ["like"]


def test_too_little_free_space_is_found_before_writing(
    like: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1, 1, 5))
    with pytest.raises(EnvironmentProblem, match="needs 0 MiB, 0 MiB are free"):
        save(state(), out / "deep" / "er", like=like)
    assert entries(out.parent) == ["like"]


@pytest.mark.parametrize("nth", [1, 2])
def test_a_disk_that_fills_up_at_any_write_leaves_the_old_output(
    like: Path, out: Path, monkeypatch: pytest.MonkeyPatch, nth: int
) -> None:
    save(state(), out, like=like)
    writes = iter(range(1, 9))

    def fill_up(*args: object, **options: object) -> None:
        if next(writes) == nth:
            raise OSError(errno.ENOSPC, "No space left on device")
        save_file(*args, **options)

    monkeypatch.setattr(writing, "save_file", fill_up)
    with pytest.raises(
        EnvironmentProblem, match=r"the disk is full\.\nNothing was left half-written"
    ) as caught:
        save({n: 2 * t for n, t in state().items()}, out, like=like, overwrite=True)
    assert caught.value.exit_code == 5
    assert entries(out.parent) == ["like", "merged"]
    assert torch.equal(open_checkpoint(out)["ids"], state()["ids"])


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
    like = small_disk.parent / "like.safetensors"
    big = {"w": torch.zeros(2**19)}
    save_file(big, like)
    with pytest.raises(EnvironmentProblem, match="the disk is full"):
        save(big, small_disk / "out.safetensors", like=like)
    assert entries(small_disk) == []


def test_small_files_of_our_own_take_views_and_metadata(tmp_path: Path) -> None:
    file = tmp_path / "run" / "coefficients.safetensors"
    save_tensors({"values": torch.ones(2, 3, requires_grad=True).t()}, file, {"tasks": "a,b"})
    assert load_file(file)["values"].shape == (3, 2)
