"""Decode once: what is kept, when it is used, and when it is not."""

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from conftest import draw
from pyarrow import parquet
from safetensors.torch import load_file
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor

from adamerge.data import decoded
from adamerge.data.datasets import Images, load_images
from adamerge.errors import AdamergeWarning, DataError

Load = Callable[..., Images]
calls: list[int] = []


def preprocess(picture: object) -> Tensor:
    calls.append(1)
    return pil_to_tensor(picture.resize((4, 4)))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder."""
    calls.clear()
    monkeypatch.setenv("ADAMERGE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "images"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a", "b"):
        (tmp_path / "source" / name).mkdir(parents=True)
        for i in range(3):
            draw(10 * len(name) + i, 0).save(tmp_path / "source" / name / f"{i}.png")
    return tmp_path / "source"


def load(source: Path, *, labelled: bool = True, key: str | None = "4 px", **options: str) -> Images:
    return load_images(str(source), preprocess, labelled=labelled, role="test", transform_key=key, **options)


def same(a: Images, b: Images) -> bool:
    return torch.equal(a.images, b.images) and a.digests() == b.digests()


def test_images_are_decoded_once_and_then_mapped(folder: Path, cache: Path) -> None:
    first, second = load(folder), load(folder)
    assert len(calls) == 6
    assert same(first, second)
    assert same(first, load(folder, key=None))
    assert second.labels.tolist() == [0, 0, 0, 1, 1, 1]
    (file,) = cache.iterdir()
    assert torch.equal(load_file(file)["images"], first.images)


@pytest.mark.parametrize("key", ["as it is", None])
@pytest.mark.parametrize("size", [(48, 32), (8, 8)])
def test_a_preprocessing_must_give_one_size(
    folder: Path, cache: Path, key: str | None, size: tuple[int, int]
) -> None:
    for file in folder.rglob("*.png"):
        draw(0, 0).resize(size if file.parent.name == "b" else (32, 48)).save(file)
    shapes = rf"a/0.png \[3, 48, 32\] torch.uint8 and b/0.png \[3, {size[1]}, {size[0]}\] torch.uint8"
    with pytest.raises(DataError, match=f"test: .* different sizes: {shapes}.\nIt must give one size"):
        load_images(str(folder), pil_to_tensor, labelled=True, role="test", transform_key=key)
    assert list(cache.glob("*")) == []


def test_labels_are_not_kept(folder: Path, cache: Path) -> None:
    load(folder)
    (file,) = cache.iterdir()
    assert set(load_file(file)) == {"images", "digests", "skipped", "check"}
    (folder / "b").rename(folder / "c")
    (folder / "b").mkdir()
    assert load(folder).labels.tolist() == [0, 0, 0, 2, 2, 2]
    assert load(folder, labelled=False).labels is None
    assert len(calls) == 6


def test_a_copy_with_the_same_bytes_is_the_same_source(folder: Path, tmp_path: Path) -> None:
    load(folder)
    folder.rename(tmp_path / "moved")
    load(tmp_path / "moved")
    assert len(calls) == 6


def test_another_transform_or_source_is_decoded(folder: Path) -> None:
    load(folder)
    load(folder, key="other")
    assert len(calls) == 12
    draw(99, 0).save(folder / "a" / "0.png")
    load(folder)
    assert len(calls) == 18


def test_without_a_named_transform_nothing_is_kept(folder: Path, cache: Path) -> None:
    load(folder, key=None)
    assert not cache.exists()


def test_skipped_images_are_told_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adamerge.data.datasets.CORRUPT_CEILING", 0.2)
    (folder / "a" / "1.png").write_bytes(b"no image")
    for _ in range(2):
        with pytest.warns(AdamergeWarning, match=r"skipped a/1.png \(cannot identify"):
            images = load(folder)
        assert images.labels.tolist() == [0, 0, 1, 1, 1]
    assert len(calls) == 5


def test_a_link_to_nothing_is_an_image_that_cannot_be_decoded(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("adamerge.data.datasets.CORRUPT_CEILING", 0.2)
    (folder / "b" / "9.png").symlink_to(folder / "nowhere")
    with pytest.warns(AdamergeWarning, match=r"skipped b/9.png \(.*No such file"):
        assert len(load(folder)) == 6


def test_too_many_corrupt_images_leave_no_file(folder: Path, cache: Path) -> None:
    (folder / "a" / "1.png").write_bytes(b"no image")
    with pytest.raises(DataError, match="1 of 6 images cannot be decoded"):
        load(folder)
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize(
    "damage",
    [lambda b: b[:-1], lambda b: b[:100], lambda _: b"", lambda b: b[:1030] + b"?" + b[1031:]],
    ids=["cut off", "header alone", "empty", "one byte"],
)
def test_a_damaged_file_is_replaced(folder: Path, cache: Path, damage: Callable[[bytes], bytes]) -> None:
    whole = load(folder).images.clone()
    (file,) = cache.iterdir()
    content = file.read_bytes()
    file.unlink()
    file.write_bytes(damage(content))
    with pytest.warns(AdamergeWarning, match="is damaged: it is made again"):
        assert torch.equal(load(folder).images, whole)
    assert file.read_bytes() == content
    load(folder)
    assert len(calls) == 12


def test_where_nothing_can_be_written_images_stay_in_memory(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "taken").write_text("a file where the folder should be")
    monkeypatch.setenv("ADAMERGE_CACHE", str(tmp_path / "taken"))
    with pytest.warns(AdamergeWarning, match="decoded images are not kept.*a parent is a file"):
        images = load(folder)
    assert same(images, load(folder, key=None))


def test_a_full_disk_is_no_reason_to_stop(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 7}))
    with pytest.warns(AdamergeWarning, match="decoded images are not kept.*are free"):
        images = load(folder)
    assert len(images) == 6
    assert list(cache.iterdir()) == []


def test_a_disk_that_fills_up_meanwhile_neither(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(decoded, "_header", full)
    with pytest.warns(AdamergeWarning, match="the disk is full"):
        assert len(load(folder)) == 6
    assert list(cache.iterdir()) == []


def test_parts_share_the_mapped_pixels(folder: Path) -> None:
    images = load(folder)
    part = images.part(torch.tensor([4, 1]))
    again = part.part(torch.tensor([1]))
    assert torch.equal(part.images, images.images[[4, 1]])
    assert torch.equal(again.images, images.images[[1]])
    assert part.digests() == [images.digests()[i] for i in (4, 1)]
    assert part.labels.tolist() == [1, 0]
    (batch,) = part.__getitems__([1, 0])
    assert torch.equal(batch["images"], images.images[[1, 4]])
    assert batch["index"].tolist() == [1, 0]
    assert part._whole.data_ptr() == images.images.data_ptr()


def test_images_in_other_files_than_the_source_are_not_kept(folder: Path, cache: Path) -> None:
    row = {"bytes": None, "path": str(folder / "a" / "0.png")}
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    parquet.write_table(pa.table({"image": pa.array([row], kind)}), folder / "x.parquet")
    assert len(load(folder / "x.parquet", labelled=False)) == 1
    assert not cache.exists()
