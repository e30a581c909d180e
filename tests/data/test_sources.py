"""How sources are written, and which files they mean."""

import io
import socket
import tarfile
from pathlib import Path

import huggingface_hub
import pytest
from conftest import draw
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value

from adamerge.data.rows import Rows, open_rows
from adamerge.data.sources import find_source
from adamerge.errors import DataError, EnvironmentProblem

ROLE = "task 'cars', test images"
NAMES = {"label": ClassLabel(names=["cat", "dog"])}


def encoded(seed: int) -> bytes:
    stream = io.BytesIO()
    draw(seed, 0).save(stream, format="png")
    return stream.getvalue()


def table(seeds: list[int], **columns: list[object]) -> Dataset:
    """Rows whose single label is their seed, unless columns are given."""
    images = [{"bytes": encoded(seed), "path": None} for seed in seeds]
    return Dataset.from_dict({"image": images, **(columns or {"label": seeds})}).cast_column("image", Image())


def write(path: Path, seeds: list[int]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    table(seeds).to_parquet(path)
    return path


def opened(given: object) -> Rows:
    return open_rows(find_source(str(given), ROLE), ROLE)


def labels(given: object) -> list[int]:
    """Labels of a source; with `table`, these tell which rows were found."""
    rows = opened(given)
    return rows.labels(rows.label_column()).tolist()


def refused(given: object) -> str:
    with pytest.raises(DataError) as caught:
        opened(given)
    assert str(caught.value).startswith(ROLE)
    return str(caught.value)


class TestParquetSplits:
    @pytest.fixture
    def mirror(self, tmp_path: Path) -> Path:
        """A repository as the hub lays it out."""
        for i in range(2):
            write(tmp_path / "data" / f"test-0000{i}-of-00002.parquet", [2 * i, 2 * i + 1])
        write(tmp_path / "data" / "train-00000-of-00001-0b2f.parquet", [7])
        (tmp_path / "README.md").touch()
        return tmp_path

    def test_shards_come_in_order(self, mirror: Path) -> None:
        assert labels(f"{mirror}@test") == [0, 1, 2, 3]
        assert labels(f"{mirror}@train") == [7]

    def test_an_unknown_split_names_the_nearest(self, mirror: Path) -> None:
        assert "has no split 'tests'.\nDid you mean 'test'?" in refused(f"{mirror}@tests")

    def test_several_splits_must_be_told_apart(self, mirror: Path, tmp_path: Path) -> None:
        assert f"has the splits test, train.\nName one: {mirror}@test" in refused(mirror)
        for split in ("test", "train"):
            write(tmp_path / "direct" / f"{split}.parquet", [1])
        assert "has the splits test, train" in refused(tmp_path / "direct")

    def test_a_file_beside_that_of_a_split_is_another_split(self, tmp_path: Path) -> None:
        for split in ("spatter", "test", "contrast"):
            write(tmp_path / f"{split}.parquet", [1])
        assert f"splits contrast, spatter, test.\nName one: {tmp_path}@contrast" in refused(tmp_path)

    def test_a_folder_named_by_its_split_may_hold_tables_of_any_name(self, tmp_path: Path) -> None:
        for split, seeds in (("test", [1, 2]), ("train", [3])):
            for seed in seeds:
                write(tmp_path / split / f"part-{seed}.parquet", [seed])
        assert labels(f"{tmp_path}@test") == labels(tmp_path / "test") == [1, 2]
        (tmp_path / "void").mkdir()
        assert f"{tmp_path}/void holds no images" in refused(f"{tmp_path}@void")

    def test_a_single_split_needs_no_name(self, tmp_path: Path) -> None:
        write(tmp_path / "data" / "test-00000-of-00001.parquet", [3])
        assert labels(tmp_path) == [3]

    def test_files_named_by_their_split(self, tmp_path: Path) -> None:
        write(tmp_path / "test.parquet", [1])
        write(tmp_path / "contrast.parquet", [2])
        write(tmp_path / "val" / "0000.parquet", [3])
        assert [labels(f"{tmp_path}@{split}") for split in ("test", "contrast", "val")] == [[1], [2], [3]]

    def test_configurations(self, tmp_path: Path) -> None:
        for i, config in enumerate(("cropped_digits", "full_numbers")):
            write(tmp_path / config / "test-00000-of-00001.parquet", [i])
        assert labels(f"{tmp_path}#full_numbers@test") == [1]
        assert labels(f"{tmp_path}#full_numbers") == [1]
        told = refused(f"{tmp_path}@test")
        assert "'test' is in several folders of" in told
        assert f"cropped_digits, full_numbers.\nName one: {tmp_path}#cropped_digits@test" in told
        assert "has no folder 'full'.\nDid you mean 'full_numbers'" in refused(f"{tmp_path}#full@test")

    def test_a_file_has_no_splits(self, tmp_path: Path) -> None:
        assert "is one file, which has no" in refused(f"{write(tmp_path / 'x.parquet', [1])}@test")

    def test_class_names_survive(self, tmp_path: Path) -> None:
        features = Features({"image": Image(), **NAMES})
        columns = {"image": [draw(0, 0)], "label": [1]}
        Dataset.from_dict(columns, features).to_parquet(tmp_path / "x.parquet")
        assert opened(tmp_path / "x.parquet").class_names("label") == ("cat", "dog")


class TestSavedDatasets:
    @pytest.fixture
    def saved(self, tmp_path: Path) -> Path:
        DatasetDict(test=table([1, 2]), train=table([3])).save_to_disk(tmp_path / "saved")
        return tmp_path / "saved"

    def test_a_split_of_several(self, saved: Path) -> None:
        assert labels(f"{saved}@test") == [1, 2]
        assert labels(saved / "train") == [3]
        assert "has the splits test, train" in refused(saved)
        assert "has no split 'val'" in refused(f"{saved}@val")

    def test_a_single_split_needs_no_name(self, tmp_path: Path) -> None:
        DatasetDict(test=table([5])).save_to_disk(tmp_path)
        assert labels(tmp_path) == [5]

    def test_a_damaged_index(self, saved: Path) -> None:
        (saved / "dataset_dict.json").write_text("{")
        assert "dataset_dict.json cannot be read" in refused(f"{saved}@test")


class TestTars:
    """Web data sets: what shares a key is a row."""

    @pytest.fixture
    def shards(self, tmp_path: Path) -> Path:
        (tmp_path / "test").mkdir()
        for shard in range(2):
            with tarfile.open(tmp_path / "test" / f"{shard}.tar", "w") as tar:
                for i in range(3):
                    seed = 3 * shard + i
                    for name, content in ((f"s{i}.cls", b"%d" % seed), (f"s{i}.jpg", encoded(seed))):
                        member = tarfile.TarInfo(f"deep/{name}")
                        member.size = len(content)
                        tar.addfile(member, io.BytesIO(content))
        (tmp_path / "test" / "nshards.txt").write_text("2")
        return tmp_path

    def test_rows_are_keys_of_all_shards(self, shards: Path) -> None:
        rows = opened(f"{shards}@test")
        assert rows.image_column() == "jpg"
        assert rows.labels("cls").tolist() == [0, 1, 2, 3, 4, 5]
        assert [row["bytes"] for row in rows.images("jpg")] == [encoded(seed) for seed in range(6)]
        assert labels(shards) == labels(shards / "test") == [0, 1, 2, 3, 4, 5]
        assert labels(shards / "test" / "1.tar") == [3, 4, 5]

    def test_a_cut_off_tar(self, shards: Path) -> None:
        (shards / "test" / "0.tar").write_bytes(b"no tar" * 100)
        assert "cannot be read" in refused(shards)


def test_a_folder_of_images_has_splits_too(tmp_path: Path) -> None:
    for split, names in {"train": ("a", "b"), "test": ("b",)}.items():
        for name in names:
            (tmp_path / split / name).mkdir(parents=True)
            draw(0, 0).save(tmp_path / split / name / "x.png")
    assert labels(f"{tmp_path}@train") == [0, 1]
    assert labels(f"{tmp_path}@test") == [0]
    assert "has no split 'val'.\nIt holds: test, train" in refused(f"{tmp_path}@val")


def test_a_table_beside_classes_is_not_their_images(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        draw(0, 0).save(tmp_path / name / "x.png")
    write(tmp_path / "b" / "notes.parquet", [9])
    assert labels(tmp_path) == [0, 1]


@pytest.mark.parametrize("name", ["mine@home", "a#b", "v1#x@test"])
def test_a_path_that_exists_is_that_path(tmp_path: Path, name: str) -> None:
    write(tmp_path / name / "test-0.parquet", [4])
    write(tmp_path / name.partition("#")[0].partition("@")[0] / "test-0.parquet", [5])
    assert labels(tmp_path / name) == [4]
    assert labels(f"{tmp_path / name}@test") == [4]


class TestColumns:
    @pytest.mark.parametrize("name", ["label", "fine_label", "cls", "labels"])
    def test_labels_go_by_many_names(self, tmp_path: Path, name: str) -> None:
        table([0, 1], **{name: [1, 0], "coarse_label": [7, 7]}).to_parquet(tmp_path / "x.parquet")
        assert labels(tmp_path / "x.parquet") == [1, 0]

    def test_truth_values_are_no_labels(self, tmp_path: Path) -> None:
        table([0, 1], label=[True, False]).to_parquet(tmp_path / "x.parquet")
        with pytest.raises(DataError, match="are no numbers: row 0 has True"):
            labels(tmp_path / "x.parquet")

    def test_web_data_sets_name_their_columns_by_suffix(self, tmp_path: Path) -> None:
        found = table([0], cls=[3], __key__=["0001"]).rename_column("image", "jpg")
        found.to_parquet(tmp_path / "x.parquet")
        assert opened(tmp_path / "x.parquet").image_column() == "jpg"
        assert labels(tmp_path / "x.parquet") == [3]

    def test_plain_bytes_are_images_too(self, tmp_path: Path) -> None:
        Dataset.from_dict({"image": [encoded(0)]}, Features({"image": Value("binary")})).to_parquet(
            tmp_path / "x.parquet"
        )
        assert next(opened(tmp_path / "x.parquet").images("image"))["bytes"] == encoded(0)

    def test_a_column_that_is_asked_for_must_be_there(self, tmp_path: Path) -> None:
        table([0], label=[1], breed=[2]).to_parquet(tmp_path / "x.parquet")
        rows = opened(tmp_path / "x.parquet")
        assert rows.label_column("breed") == "breed"
        with pytest.raises(DataError, match=r"has no column 'bread'.\nDid you mean 'breed'"):
            rows.label_column("bread")


class TestHub:
    @pytest.fixture(autouse=True)
    def _no_proxy(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("HTTPS_PROXY", raising=False)
        monkeypatch.delenv("https_proxy", raising=False)

    @pytest.fixture
    def asked(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
        """Answer every download from a folder, and note what was asked for."""
        asked: dict[str, object] = {}
        write(tmp_path / "cropped_digits" / "test-00000-of-00001.parquet", [6])

        def download(repo_id: str, **options: object) -> str:
            asked.update(options, repo_id=repo_id)
            return str(tmp_path)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
        monkeypatch.setattr("adamerge.hub.reachable", lambda _: True)
        return asked

    def test_only_the_files_of_a_split_are_downloaded(self, asked: dict[str, object]) -> None:
        assert labels("ufldl-stanford/svhn#cropped_digits@test") == [6]
        assert (asked["repo_id"], asked["repo_type"]) == ("ufldl-stanford/svhn", "dataset")
        assert all(str(p).startswith("cropped_digits/") for p in asked["allow_patterns"])
        assert "cropped_digits/test-*.parquet" in asked["allow_patterns"]
        assert labels("ufldl-stanford/svhn@test") == [6]
        assert "*/test-*.parquet" in asked["allow_patterns"]

    def test_without_a_split_all_files_are(self, asked: dict[str, object]) -> None:
        assert labels("ufldl-stanford/svhn") == [6]
        assert "*" in asked["allow_patterns"]

    def test_without_network_one_line_tells_the_local_form(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(*_args: object, **_options: object) -> None:
            raise OSError("Network is unreachable")

        monkeypatch.setattr(socket, "create_connection", refuse)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
        with pytest.raises(EnvironmentProblem, match="'tanganke/dtd' is no local path .*cannot be reached"):
            opened("tanganke/dtd@test")
