"""Every layout that can be opened, and every damaged file that is refused with its reason."""

import json
import shutil
from collections.abc import Callable, Mapping
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
    (folder / INDEX).write_text(
        json.dumps({"metadata": {"total_size": 13_500_000_000}, "weight_map": weight_map})
    )
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


def refused(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        open_checkpoint(path, role="expert 'cars'")
    assert caught.value.exit_code == 2
    assert str(path.name) in str(caught.value)
    assert str(caught.value).startswith("expert 'cars': ")
    return str(caught.value)


def test_a_file_without_tensors_is_refused(tmp_path: Path) -> None:
    save_file({}, tmp_path / "empty.safetensors")
    assert "holds no tensors" in refused(tmp_path / "empty.safetensors")


def write_raw(file: Path, dtypes: Mapping[str, str], values: bytes) -> Path:
    """Write one tensor per name, of eight bytes each, under a header that is not padded."""
    rows = {
        name: {"dtype": dtype, "shape": [2 if dtype == "F32" else 8], "data_offsets": [8 * i, 8 * i + 8]}
        for i, (name, dtype) in enumerate(dtypes.items())
    }
    header = json.dumps(rows).encode()
    header += b" " * (1 - len(header) % 2)
    file.write_bytes(len(header).to_bytes(8, "little") + header + values)
    return file


def test_a_dtype_that_torch_lacks_is_named(tmp_path: Path) -> None:
    file = write_raw(tmp_path / "quantised.safetensors", {"a": "F32", "w": "F8_E8M0"}, bytes(16))
    with pytest.raises(
        InputError, match=r"tensor w has dtype F8_E8M0\.\nIt looks quantised: dequantise first"
    ):
        open_checkpoint(file).info("w")


def test_a_missing_path_is_named(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    told = f"{tmp_path / 'modle'} does not exist; {tmp_path} holds model.\nGive a safetensors file"
    assert told in refused(tmp_path / "modle")


def test_a_folder_without_weights_lists_what_it_holds(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    assert "It holds: nothing" in refused(folder)
    (folder / "config.json").touch()
    assert "It holds: config.json" in refused(folder)
    (folder / "adapter_config.json").touch()
    assert "merge_and_unload()" in refused(folder)


def test_a_folder_with_pickled_weights_is_told_what_they_are(tmp_path: Path) -> None:
    torch.save(state(), tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match="pytorch_model.bin cannot be read: it is a pickle"):
        open_checkpoint(tmp_path)


def test_missing_shards_are_counted_and_the_present_ones_listed(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "model")
    (folder / "model-00002-of-00002.safetensors").unlink()
    message = refused(folder)
    missing = "1 of 2 shards are missing: model-00002-of-00002.safetensors; 0.0 of 13.5 GB are there"
    assert missing in message
    assert "Present: model-00001-of-00002.safetensors. Download the others" in message
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a.weight": "nowhere.safetensors"}}))
    assert "1 of 1 shards are missing: nowhere.safetensors.\n" in refused(folder)


def test_an_index_that_names_absent_tensors_is_refused(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "model")
    shutil.copy(folder / "model-00001-of-00002.safetensors", folder / "model-00002-of-00002.safetensors")
    message = refused(folder)
    assert "names tensors that its shards lack: " in message
    assert "a.bias" in message


@pytest.mark.parametrize("text", ["{", "[]", '{"metadata": {}}', '{"weight_map": {"a": 1}}'])
def test_a_damaged_index_is_refused(tmp_path: Path, text: str) -> None:
    folder = write_shards(tmp_path / "model")
    (folder / INDEX).write_text(text)
    assert "is damaged or no index.\nDownload it again" in refused(folder)


def test_an_index_stays_in_its_folder(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "model")
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": "../other.safetensors"}}))
    assert "names shards in other folders" in refused(folder)


def maps() -> str:
    return Path("/proc/self/maps").read_text()


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="the system does not list its maps")
def test_a_tensor_is_mapped_alone_and_its_map_goes_with_it(tmp_path: Path) -> None:
    file = tmp_path / "any.safetensors"
    save_file({name: torch.ones(2**14) for name in "abc"}, file)
    checkpoint = open_checkpoint(file)
    assert str(file) not in maps()
    tensor = checkpoint["b"]
    assert str(file) in maps()
    assert tensor.untyped_storage().nbytes() == tensor.nbytes
    del tensor
    assert str(file) not in maps()


def test_changing_a_tensor_in_place_does_not_change_the_file(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_file(tmp_path / "x", "model.safetensors"))
    checkpoint["ids"].zero_()
    assert torch.equal(checkpoint["ids"], state()["ids"])


def test_tensors_that_lie_askew_are_read(tmp_path: Path) -> None:
    values = torch.tensor([1.0, 2.0])
    file = write_raw(tmp_path / "any.safetensors", {"w": "F32"}, values.numpy().tobytes())
    assert torch.equal(open_checkpoint(file)["w"] * 1, values)


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "any.safetensors"
    save_file(state(), file)
    checkpoint = open_checkpoint(file)
    save_file(state() | {"a.weight": torch.zeros(9, 9)}, file)
    with pytest.raises(InputError, match="any.safetensors has changed since it was opened"):
        checkpoint["ids"]
    file.unlink()
    with pytest.raises(InputError, match="any.safetensors is gone"):
        checkpoint["ids"]
