"""Every source and every kind of picture; what is skipped, and what is refused."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from conftest import draw
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as Pillow
from pyarrow import parquet
from torch import Tensor

from adamerge.data.datasets import Images, load_images
from adamerge.data.embedded import EMBEDDED_TASKS, SPLITS, load_split
from adamerge.errors import AdamergeWarning, DataError


def preprocess(picture: Pillow.Image) -> Tensor:
    assert picture.mode == "RGB"
    return torch.from_numpy(np.array(picture.resize((4, 4), Pillow.Resampling.NEAREST))).permute(2, 0, 1)


def load(source: Path | str, *, labelled: bool = True) -> Images:
    return load_images(str(source), preprocess, labelled=labelled, role="task 'cars', test images")


def refused(source: Path | str, *, labelled: bool = True) -> str:
    with pytest.raises(DataError) as caught:
        load(source, labelled=labelled)
    assert caught.value.exit_code == 3
    assert str(caught.value).startswith("task 'cars', test images: ")
    return str(caught.value)


def write_folder(root: Path, classes: tuple[str, ...] = ("0_small", "1_large"), each: int = 3) -> Path:
    for label, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(each):
            draw(10 * label + i, label).save(root / name / f"{i}.png")
    return root


def write_flat(root: Path, count: int = 3) -> Path:
    root.mkdir()
    for i in range(count):
        draw(i, 0).save(root / f"{i}.png")
    return root


def encoded(seed: int) -> bytes:
    stream = io.BytesIO()
    draw(seed, 0).save(stream, format="png")
    return stream.getvalue()


def write_rows(path: Path, images: list[bytes | None], labels: list[object] | None) -> Path:
    columns = {"img": [None if b is None else {"bytes": b, "path": None} for b in images]}
    features = {"img": Image()}
    if labels is not None:
        columns["label"] = labels
        features["label"] = Value("int64" if isinstance(labels[0], int | None) else "string")
    Dataset.from_dict(columns, Features(features)).to_parquet(path)
    return path


class TestSources:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        return write_folder(tmp_path / "images")

    def test_a_folder_of_classes(self, folder: Path) -> None:
        images = load(folder)
        assert images.images.shape == (6, 3, 4, 4)
        assert images.images.dtype == torch.uint8
        assert images.labels.tolist() == [0, 0, 0, 1, 1, 1]
        assert images.class_names == ("0_small", "1_large")
        assert torch.equal(images.images[4], preprocess(draw(11, 1)))

    def test_labels_are_dropped_where_nobody_may_see_them(self, folder: Path) -> None:
        images = load(folder, labelled=False)
        assert images.labels is None
        assert images.class_names == ()
        assert torch.equal(images.images, load(folder).images)

    def test_class_names_that_look_like_splits_are_classes(self, tmp_path: Path) -> None:
        assert load(write_folder(tmp_path / "x", ("bicycle", "test", "train"), 1)).labels.tolist() == [
            0,
            1,
            2,
        ]

    def test_a_class_without_images_keeps_its_number(self, folder: Path) -> None:
        for path in (folder / "0_small").iterdir():
            path.unlink()
        assert load(folder).labels.tolist() == [1, 1, 1]

    def test_deeper_folders_and_other_files_do_not_matter(self, folder: Path) -> None:
        (folder / "1_large" / "more").mkdir()
        draw(0, 1).save(folder / "1_large" / "more" / "x.JPG", format="jpeg")
        (folder / "1_large" / "notes.txt").touch()
        (folder / "1_large" / "._0.png").touch()
        (folder / ".cache").mkdir()
        (folder / "__MACOSX").mkdir()
        with pytest.warns(AdamergeWarning, match=r"test images: these were left out: 1_large/notes.txt\.$"):
            images = load(folder)
        assert images.labels.tolist() == [0, 0, 0, 1, 1, 1, 1]
        assert len(images.class_names) == 2

    def test_unusual_paths_and_symlinks(self, folder: Path, tmp_path: Path) -> None:
        odd = tmp_path / "Bilder [neu] ü 图 *"
        odd.mkdir()
        (odd / "a").symlink_to(folder / "0_small", target_is_directory=True)
        (odd / "b c").mkdir()
        (odd / "b c" / "é.png").symlink_to(folder / "1_large" / "0.png")
        assert load(odd).labels.tolist() == [0, 0, 0, 1]

    def test_a_flat_folder_has_no_labels(self, tmp_path: Path) -> None:
        folder = write_flat(tmp_path / "flat")
        assert len(load(folder, labelled=False)) == 3
        message = refused(folder)
        assert "has columns ['image'], and no 'label'" in message
        assert "Use one sub-folder per class" in message

    def test_parquet_files_and_folders_of_them(self, tmp_path: Path) -> None:
        write_rows(tmp_path / "b.parquet", [encoded(1), encoded(2)], [1, 0])
        write_rows(tmp_path / "a.parquet", [encoded(0)], [2])
        assert load(tmp_path / "b.parquet").labels.tolist() == [1, 0]
        assert load(tmp_path).labels.tolist() == [2, 1, 0]
        assert torch.equal(load(tmp_path).images[0], preprocess(draw(0, 0)))

    def test_a_folder_that_datasets_saved_keeps_its_class_names(self, tmp_path: Path) -> None:
        columns = {"image": [draw(0, 0), draw(1, 0)], "label": [1, 0]}
        features = Features({"image": Image(), "label": ClassLabel(names=["cat", "dog"])})
        Dataset.from_dict(columns, features).save_to_disk(tmp_path / "saved")
        images = load(tmp_path / "saved")
        assert images.labels.tolist() == [1, 0]
        assert images.class_names == ("cat", "dog")

    def test_embedded_tasks(self) -> None:
        name = next(iter(EMBEDDED_TASKS))
        images, labels = load_split(name, SPLITS[-1])
        found = load(f"embedded:{name}/{SPLITS[-1]}")
        assert torch.equal(found.images, images)
        assert torch.equal(found.labels, labels)
        assert load(f"embedded:{name}/{SPLITS[-1]}", labelled=False).labels is None


class TestRefusals:
    def test_a_missing_source(self, tmp_path: Path) -> None:
        (tmp_path / "cars").mkdir()
        told = f"{tmp_path / 'carz'} does not exist; {tmp_path} holds cars.\nGive a folder of images"
        for split in ("", "@test"):
            assert told in refused(f"{tmp_path / 'carz'}{split}")

    @pytest.mark.parametrize("labelled", [True, False])
    def test_an_empty_folder(self, tmp_path: Path, labelled: bool) -> None:
        assert "holds no images.\nGive a folder with files such as .png" in refused(
            tmp_path, labelled=labelled
        )

    def test_an_empty_parquet_file(self, tmp_path: Path) -> None:
        empty = Dataset.from_dict(
            {"image": [], "label": []}, Features({"image": Image(), "label": Value("int64")})
        )
        empty.to_parquet(tmp_path / "empty.parquet")
        assert "holds no images" in refused(tmp_path / "empty.parquet")

    def test_a_damaged_parquet_file(self, tmp_path: Path) -> None:
        (tmp_path / "x.parquet").write_bytes(b"PAR1 no")
        assert "x.parquet cannot be read: " in refused(tmp_path / "x.parquet")

    def test_a_file_that_is_no_source(self, tmp_path: Path) -> None:
        (tmp_path / "x.zip").touch()
        assert "x.zip" in refused(tmp_path / "x.zip")

    def test_rows_without_an_image_column(self, tmp_path: Path) -> None:
        Dataset.from_dict({"breed": ["a"], "label": [0]}).to_parquet(tmp_path / "x.parquet")
        assert "has columns ['breed', 'label'], and none named 'image'" in refused(tmp_path / "x.parquet")

    def test_rows_without_labels(self, tmp_path: Path) -> None:
        assert "and no 'label'" in refused(write_rows(tmp_path / "x.parquet", [encoded(0)], None))

    @pytest.mark.parametrize(
        ("labels", "problem"),
        [
            ([0, None], "are no numbers: row 1 has None"),
            (["cat", None], "are words elsewhere: row 1 has None"),
            (["cat", ""], "are words elsewhere: row 1 has ''"),
            ([0, -1], "are negative, as those of unlabelled rows are: row 1 has -1"),
            ([0.0, 1.5], "are no whole numbers: row 1 has 1.5"),
            ([0.0, float("nan")], "are no whole numbers: row 1 has nan"),
            ([0.0, float("inf")], "are no whole numbers: row 1 has inf"),
            ([[0], [1]], r"are no numbers: row 0 has [0]"),
            ([True, False], "are no numbers: row 0 has True"),
            ([0, 2**40], "are no class's: row 1 has 1099511627776"),
            ([None, None], "are no numbers: row 0 has None"),
            ([b"cat", b"dog"], "are no numbers: row 0 has b'cat'"),
        ],
    )
    def test_labels_that_are_neither_rows_nor_names(
        self, tmp_path: Path, labels: list[object], problem: str
    ) -> None:
        image = pa.array([{"bytes": encoded(i), "path": None} for i in range(2)])
        parquet.write_table(pa.table({"image": image, "label": labels}), tmp_path / "x.parquet")
        assert f"the labels of {tmp_path}/x.parquet {problem}" in refused(tmp_path / "x.parquet")
        assert len(load(tmp_path / "x.parquet", labelled=False)) == 2

    def test_words_as_labels_are_names(self, tmp_path: Path) -> None:
        images = load(write_rows(tmp_path / "x.parquet", [encoded(0), encoded(1)], ["dog", "cat"]))
        assert (images.labels.tolist(), images.class_names) == ([1, 0], ("cat", "dog"))
        assert images.origin.words

    def test_whole_numbers_may_be_stored_as_fractions(self, tmp_path: Path) -> None:
        image = pa.array([{"bytes": encoded(i), "path": None} for i in range(2)])
        parquet.write_table(pa.table({"image": image, "label": [1.0, 0.0]}), tmp_path / "x.parquet")
        assert load(tmp_path / "x.parquet").labels.tolist() == [1, 0]


def transparent_palette() -> Pillow.Image:
    picture = draw(0, 0).convert("P")
    picture.info["transparency"] = bytes(range(256))
    return picture


KINDS: dict[str, tuple[str, Callable[[], Pillow.Image]]] = {
    "grey": ("png", lambda: draw(0, 0).convert("L")),
    "grey and alpha": ("png", lambda: draw(0, 0).convert("LA")),
    "black and white": ("png", lambda: draw(0, 0).convert("1")),
    "rgba": ("png", lambda: draw(0, 0).convert("RGBA")),
    "palette": ("gif", lambda: draw(0, 0).convert("P")),
    "transparent palette": ("png", transparent_palette),
    "cmyk": ("jpg", lambda: draw(0, 0).convert("CMYK")),
    "tiff": ("tif", lambda: draw(0, 0)),
    "one row": ("png", lambda: draw(0, 0).resize((30, 1))),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_picture_becomes_rgb(tmp_path: Path, kind: str) -> None:
    suffix, make = KINDS[kind]
    make().save(tmp_path / f"x.{suffix}")
    (image,) = load(tmp_path, labelled=False).images
    with Pillow.open(tmp_path / f"x.{suffix}") as opened:
        assert torch.equal(image, preprocess(opened.convert("RGBA").convert("RGB")))


@pytest.mark.parametrize(("suffix", "dtype"), [("png", np.uint16), ("tif", np.uint16), ("tif", np.int32)])
def test_sixteen_bits_keep_their_upper_eight(tmp_path: Path, suffix: str, dtype: type) -> None:
    levels = np.array([[0, 255, 256, 65535]] * 4)
    Pillow.fromarray(levels.astype(dtype)).save(tmp_path / f"x.{suffix}")
    (image,) = load(tmp_path, labelled=False).images
    assert image[:, 0].tolist() == [[0, 0, 1, 255]] * 3


class TestCorruptImages:
    @pytest.mark.parametrize(
        "content",
        [b"", b"no image", encoded(0)[:-40], encoded(0)[:20] + bytes(40)],
        ids=["zero bytes", "text", "truncated", "a damaged header"],
    )
    def test_one_in_two_hundred_is_skipped_and_named(self, tmp_path: Path, content: bytes) -> None:
        folder = write_folder(tmp_path / "x", ("a", "b"), 100)
        whole = load(folder)
        (folder / "a" / "42.png").write_bytes(content)
        with pytest.warns(AdamergeWarning, match=r"skipped .*a/42.png \("):
            images = load(folder)
        place = sorted(path.name for path in (folder / "a").iterdir()).index("42.png")
        kept = [i for i in range(200) if i != place]
        assert torch.equal(images.images, whole.images[kept])
        assert torch.equal(images.labels, whole.labels[kept])

    def test_many_are_refused_with_the_first_paths(self, tmp_path: Path) -> None:
        folder = write_folder(tmp_path / "x", ("a", "b"), 10)
        for name in ("a/3.png", "b/4.png"):
            (folder / name).write_bytes(b"")
        message = refused(folder)
        assert "2 of 20 images cannot be decoded: " in message
        assert "a/3.png (" in message
        assert "at most 1 % is skipped" in message

    @pytest.mark.parametrize("content", [None, b""])
    def test_rows_without_bytes_are_corrupt_too(self, tmp_path: Path, content: bytes | None) -> None:
        file = write_rows(tmp_path / "x.parquet", [encoded(0), content], [0, 1])
        assert "1 of 2 images cannot be decoded: row 1 (" in refused(file)

    def test_a_row_with_neither_bytes_nor_path_is_corrupt(self, tmp_path: Path) -> None:
        kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
        rows = pa.array([{"bytes": encoded(0), "path": None}, {"bytes": None, "path": None}], kind)
        parquet.write_table(pa.table({"image": rows}), tmp_path / "x.parquet")
        told = "1 of 2 images cannot be decoded: row 1 (no image)"
        assert told in refused(tmp_path / "x.parquet", labelled=False)

    def test_a_decompression_bomb_is_corrupt(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        folder = write_flat(tmp_path / "flat")
        monkeypatch.setattr(Pillow, "MAX_IMAGE_PIXELS", 9)
        assert "decompression bomb" in refused(folder, labelled=False)


class TestImages:
    images = Images(
        torch.arange(48, dtype=torch.uint8).reshape(4, 3, 2, 2), torch.tensor([3, 2, 1, 0]), ("a",)
    )

    def test_a_batch_comes_in_one_piece(self) -> None:
        (batch,) = self.images.__getitems__([2, 0])
        assert torch.equal(batch["images"], self.images.images[[2, 0]])
        assert batch["index"].tolist() == [2, 0]
        assert batch["labels"].tolist() == [1, 3]
        assert "labels" not in Images(self.images.images).__getitems__([0])[0]

    def test_a_part_keeps_labels_and_names(self) -> None:
        part = self.images.part(torch.tensor([1, 3]))
        assert part.labels.tolist() == [2, 0]
        assert part.class_names == ("a",)
        assert Images(self.images.images).part(torch.tensor([1])).labels is None

    def test_equal_pixels_have_equal_digests(self) -> None:
        twice = self.images.part(torch.tensor([1, 1, 2])).digests()
        assert twice[0] == twice[1] != twice[2]
