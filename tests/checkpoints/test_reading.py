"""Every layout that can be opened, and every damaged file that is refused with its reason."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from adamerge.checkpoints import open_checkpoint
from adamerge.checkpoints.reading import INDEX
from adamerge.errors import InputError
from adamerge.state import LazyState, TensorInfo


def state() -> dict[str, Tensor]:
    return {
        "a.weight": torch.arange(6.0).reshape(2, 3),
        "a.bias": torch.ones(2, dtype=torch.bfloat16),
        "ids": torch.arange(3),
    }


def write_shards(folder: Path) -> Path:
    folder.mkdir()
    shards = {
        "model-00001-of-00002.safetensors": ["a.weight"],
        "model-00002-of-00002.safetensors": ["a.bias", "ids"],
    }
    for shard, names in shards.items():
        save_file({name: state()[name] for name in names}, folder / shard)
    weight_map = {name: shard for shard, names in shards.items() for name in names}
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 52}, "weight_map": weight_map}))
    return folder


def write_file(folder: Path, name: str) -> Path:
    folder.mkdir()
    save_file(state(), folder / name)
    return folder


LAYOUTS: dict[str, Callable[[Path], Path]] = {
    "a file": lambda root: write_file(root / "x", "any.safetensors") / "any.safetensors",
    "a Hugging Face folder": lambda root: write_file(root / "x", "model.safetensors"),
    "an open_clip folder": lambda root: write_file(root / "x", "open_clip_model.safetensors"),
    "a sharded folder": lambda root: write_shards(root / "x"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_opens_as_a_lazy_mapping(tmp_path: Path, layout: str) -> None:
    checkpoint = open_checkpoint(LAYOUTS[layout](tmp_path))
    assert isinstance(checkpoint, LazyState)
    assert set(checkpoint) == set(state())
    assert len(checkpoint) == 3
    assert "ids" in checkpoint
    assert "idz" not in checkpoint
    for name, tensor in state().items():
        assert torch.equal(checkpoint[name], tensor)
        assert checkpoint.info(name) == TensorInfo(tuple(tensor.shape), tensor.dtype)


def test_the_file_digest_follows_the_bytes(tmp_path: Path) -> None:
    a, b = (write_file(tmp_path / x, "model.safetensors") for x in "ab")
    assert open_checkpoint(a).file_digest() == open_checkpoint(b).file_digest()
    save_file(state() | {"ids": torch.zeros(3)}, b / "model.safetensors")
    assert open_checkpoint(a).file_digest() != open_checkpoint(b).file_digest()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return LAYOUTS["a file"](tmp_path)


def refused(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        open_checkpoint(path, role="expert 'cars'")
    assert caught.value.exit_code == 2
    assert str(path.name) in str(caught.value)
    assert str(caught.value).startswith("expert 'cars': ")
    return str(caught.value)


def cut(file: Path, n_bytes: int) -> bytes:
    return file.read_bytes()[:n_bytes]


DAMAGED: dict[str, tuple[Callable[[Path], bytes], str]] = {
    "truncated": (lambda f: cut(f, -5), "cut off at"),
    "cut inside the header": (lambda f: cut(f, 40), "cut off inside its header"),
    "empty": (lambda f: b"", "cut off inside its header (or is no safetensors file): 0 bytes"),
    "a git-LFS pointer": (
        lambda f: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
        "git-LFS pointer; run `git lfs pull`",
    ),
    "an HTML page": (lambda f: b"\n<!DOCTYPE html><html>404</html>" + b" " * 600, "an HTML page was saved"),
    "a pickle": (lambda f: pickle.dumps({"a": 1}), "it is a pickle, which can run code"),
    "a zip": (lambda f: b"PK\x03\x04" + bytes(50), "it is a pickle"),
    "a header of noise": (lambda f: (20).to_bytes(8, "little") + b"x" * 30, "its header is damaged"),
    "trailing bytes": (lambda f: f.read_bytes() + b"more", "bytes where its header describes"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_file_is_diagnosed(file: Path, damage: str) -> None:
    content, reason = DAMAGED[damage]
    file.write_bytes(content(file))
    assert reason in refused(file)


def test_a_torch_file_is_a_pickle_that_is_never_loaded(tmp_path: Path) -> None:
    torch.save(state(), tmp_path / "expert.pt")
    assert "save its state dict as safetensors first" in refused(tmp_path / "expert.pt")


def test_a_file_without_tensors_is_refused(tmp_path: Path) -> None:
    save_file({}, tmp_path / "empty.safetensors")
    assert "holds no tensors" in refused(tmp_path / "empty.safetensors")


def test_a_dtype_that_torch_lacks_is_named(tmp_path: Path) -> None:
    header = json.dumps({"w": {"dtype": "F8_E8M0", "shape": [2], "data_offsets": [0, 2]}}).encode()
    file = tmp_path / "quantised.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(2))
    with pytest.raises(
        InputError, match=r"tensor w has dtype F8_E8M0\.\nIt looks quantised: dequantise first"
    ):
        open_checkpoint(file).info("w")


def test_a_missing_path_is_named(tmp_path: Path) -> None:
    assert "does not exist.\nGive a safetensors file" in refused(tmp_path / "nowhere")


def test_a_folder_without_weights_lists_what_it_holds(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    assert "It holds: nothing" in refused(folder)
    (folder / "pytorch_model.bin").touch()
    assert "It holds: pytorch_model.bin" in refused(folder)
    (folder / "adapter_config.json").touch()
    assert "merge_and_unload()" in refused(folder)


def test_missing_shards_are_counted_and_the_present_ones_listed(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "model")
    (folder / "model-00002-of-00002.safetensors").unlink()
    message = refused(folder)
    assert "1 of 2 shards are missing: model-00002-of-00002.safetensors" in message
    assert "Present: model-00001-of-00002.safetensors" in message


def test_an_index_that_names_absent_tensors_is_refused(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "model")
    shutil.copy(folder / "model-00001-of-00002.safetensors", folder / "model-00002-of-00002.safetensors")
    message = refused(folder)
    assert "names tensors that its shards lack: " in message
    assert "a.bias" in message


@pytest.mark.parametrize("text", ["{", "[]", '{"metadata": {}}'])
def test_a_damaged_index_is_refused(tmp_path: Path, text: str) -> None:
    folder = write_shards(tmp_path / "model")
    (folder / INDEX).write_text(text)
    assert "is damaged or no index.\nDownload it again" in refused(folder)
