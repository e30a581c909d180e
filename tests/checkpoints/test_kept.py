"""What is kept for another time knows whether it is whole: every flipped bit is seen, and made again."""

import json
import random
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from adamerge import digests
from adamerge.checkpoints import converted, open_clip_source
from adamerge.checkpoints.kept import keep, read_kept
from adamerge.data import decoded
from adamerge.errors import AdamergeWarning
from adamerge.models import ModuleBackbone
from adamerge.models.experts import Experts, short_hash
from adamerge.models.grams import Trace
from adamerge.task.known import kept


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ADAMERGE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def flips(content: bytes, count: int = 24) -> Iterator[bytes]:
    """Give copies of which one bit is another: spread over all bytes, the first and the last among them."""
    places = [0, 7, 8, len(content) - 1, *random.Random(0).sample(range(len(content)), count)]
    for place in places:
        yield content[:place] + bytes([content[place] ^ 1 << place % 8]) + content[place + 1 :]


def told() -> pytest.WarningsRecorder:
    return pytest.warns(AdamergeWarning, match="is damaged: it is made again")  # type: ignore[return-value]


def test_tensors_come_back_mapped_and_equal(tmp_path: Path) -> None:
    tensors = {
        "a": torch.randn(3, 4),
        "b": torch.arange(5),
        "c": torch.tensor(2.5),
        "h": torch.ones(3).bfloat16(),
    }
    first = keep(tensors, tmp_path / "x.safetensors")
    again = read_kept(tmp_path / "x.safetensors")
    for found in (first, again):
        assert found is not None
        assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert read_kept(tmp_path / "nothing.safetensors") is None


def test_every_flipped_bit_of_tensors_is_seen_or_harmless(tmp_path: Path) -> None:
    file, tensors = tmp_path / "x.safetensors", {"a": torch.randn(6)}
    keep(tensors, file)
    content, n_seen = file.read_bytes(), 0
    for damaged in flips(content, 60):
        file.unlink()  # another run may have mapped it
        file.write_bytes(damaged)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", AdamergeWarning)
            found = read_kept(file)
        n_seen += found is None
        assert found is None or torch.equal(found["a"], tensors["a"])  # a bit of the header's padding
    assert n_seen > 40


@pytest.mark.parametrize("damage", ["", "cut off", "folder", "link to nothing"])
def test_features_are_computed_again(damage: str, cache: Path) -> None:
    calls: list[int] = []

    def compute() -> Tensor:
        calls.append(1)
        return torch.ones(3, 2)

    kept(compute, ["x"])
    (file,) = (cache / "features").iterdir()
    content = file.read_bytes()
    file.unlink()
    if damage == "folder":
        file.mkdir()
        (file / "mine.txt").write_text("mine")
    elif damage == "link to nothing":
        file.symlink_to(cache / "nothing")
    else:
        file.write_bytes(content[:50] if damage else b"")
    message = "nothing is kept" if damage == "folder" else "is damaged: it is made again"
    with pytest.warns(AdamergeWarning, match=message) as warned:
        assert torch.equal(kept(compute, ["x"])[0], torch.ones(3, 2))
    assert (len(warned), len(calls)) == (1, 2)
    assert damage != "folder" or (file / "mine.txt").exists()


def test_a_flipped_bit_of_images_is_never_believed(cache: Path) -> None:
    images = [torch.full((3, 2, 2), i, dtype=torch.uint8) for i in range(4)]
    rows: list[Tensor | str] = [images[0], "row 1 (why)", *images[1:]]
    whole = decoded.decode_once(lambda: rows, "key", 5)
    (file,) = (cache / "images").iterdir()
    content = file.read_bytes()
    tail = content[900:]  # behind the padding of the header
    for damaged in (*flips(content), *(content[:900] + part for part in flips(tail, 40))):
        file.unlink()
        file.write_bytes(damaged)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", AdamergeWarning)
            found = decoded.decode_once(lambda: rows, "key", 5)
        assert torch.equal(found.images, whole.images)
        assert torch.equal(found.digests, whole.digests)
        assert found.skipped == whole.skipped


def test_a_damaged_note_of_a_digest_is_not_believed(tmp_path: Path, cache: Path) -> None:
    source = tmp_path / "weights"
    source.write_bytes(b"123")
    expected = digests.sha256(source)
    (note,) = (cache / "digests").iterdir()
    content = note.read_bytes()
    for damaged in (*flips(content, 40), b"", b"[" * 100_000):
        note.write_bytes(damaged)
        assert digests.sha256(source) == expected
    note.unlink()
    note.mkdir()
    assert digests.sha256(source) == expected


@pytest.mark.filterwarnings("ignore:.* has no safetensors")
@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_damaged_conversion_is_made_again(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "old"
    folder.mkdir()
    torch.save({"w": torch.arange(64.0)}, folder / "pytorch_model.bin")
    (folder / "config.json").write_text("{}")
    made = converted.with_safetensors(folder, "old")
    content = (made / name).read_bytes()
    (made / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with told():
        assert converted.with_safetensors(folder, "old") == made
    assert (made / name).read_bytes() == content
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert converted.with_safetensors(folder, "old") == made


def test_a_damaged_folder_of_bare_weights_is_made_again(clip: Path) -> None:
    weights = clip / "base" / "open_clip_model.safetensors"
    made = open_clip_source._linked('{"a": 1}', weights)
    (made / "open_clip_config.json").write_text('{"a": 2}')
    with told():
        assert open_clip_source._linked('{"a": 1}', weights) == made
    assert json.loads((made / "open_clip_config.json").read_text()) == {"a": 1}


def test_a_damaged_trace_is_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = Trace({"w": 4}, {"w": 2}, {"w": 1})
    monkeypatch.setattr("adamerge.models.experts.trace", lambda *_: found)
    options = {"samples": 1, "batch_size": 1, "seed": 0, "budget": 1, "device": torch.device("cpu")}

    def experts() -> Experts:
        given = {"backbone": ModuleBackbone(nn.Identity()), "heads": {}, "images": {"a": torch.ones(1, 1)}}
        return Experts(**given, **options, expert_weights=lambda _: {}, folder=tmp_path, keys={})

    assert experts().trace == found
    (file,) = tmp_path.iterdir()
    content = file.read_bytes()
    for damaged in (content.replace(b"4", b"5", 1), content[:9], b"", b"[]"):
        file.write_bytes(damaged)
        with told():
            assert experts().trace == found
        assert file.read_bytes() == content
    assert short_hash({"a": 1}) != short_hash({"a": 2})
    shutil.rmtree(tmp_path)
    tmp_path.write_text("no folder")
    with pytest.warns(AdamergeWarning, match="nothing is kept"):
        assert experts().trace == found
