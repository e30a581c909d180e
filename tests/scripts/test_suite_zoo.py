"""The zoo of a folder of image tasks: a tiny one, made of a few noisy images in a few steps."""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pyarrow
import pytest
import torch
import yaml
from builders import REPOSITORY
from conftest import draw
from pyarrow import parquet
from torch.nn.functional import cross_entropy, normalize, one_hot

from adamerge import Head, MultiTaskData, OpenClipBackbone
from adamerge.benchmarks import Benchmark
from adamerge.data.tasks import TaskSpec

CLASSES = {"red": ["dark", "light"], "wide": ["low", "middle", "high"]}
COUNTS = {"train": 24, "test": 9}


def write_images(path: Path, labels: list[int], seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    images = []
    for i, label in enumerate(labels):
        encoded = io.BytesIO()
        draw(seed + i, label).save(encoded, "png")
        images.append({"bytes": encoded.getvalue(), "path": None})
    parquet.write_table(pyarrow.table({"image": images, "label": labels}), path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`images/TASK/{train,test}.parquet`, `images/tasks.json`, `photos/`."""
    root = tmp_path_factory.mktemp("suite")
    for t, (task, classes) in enumerate(CLASSES.items()):
        for part, count in COUNTS.items():
            labels = [i % len(classes) for i in range(count)]
            write_images(root / "images" / task / f"{part}.parquet", labels, 1000 * t + 100 * len(part))
    rows = {task: {"classes": classes} for task, classes in CLASSES.items()}
    (root / "images" / "tasks.json").write_text(json.dumps(rows))
    write_images(root / "photos" / "photos.parquet", [i % 4 for i in range(16)], 5000)
    return root


@pytest.fixture(scope="module")
def scripts() -> Iterator[tuple[ModuleType, ModuleType]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(REPOSITORY / "scripts")
        import suite_zoo
        import train_zoo

        yield train_zoo, suite_zoo


@pytest.fixture(scope="module")
def arguments(folder: Path) -> list[str]:
    places = {"tasks": "images", "pretrain": "photos", "out": "zoo"}
    return ["--quick", *(word for key, at in places.items() for word in (f"--{key}", str(folder / at)))]


@pytest.fixture(scope="module")
def zoo(folder: Path, scripts, arguments: list[str]) -> Path:
    scripts[0].main(arguments)
    return folder / "zoo"


def test_a_benchmark_of_it_repeats_the_accuracies_of_its_manifest(zoo: Path, tmp_path: Path) -> None:
    rows = Benchmark(zoo / "benchmark.yaml", tmp_path).run(["zero_shot", "individual"])
    tasks = json.loads((zoo / "manifest.json").read_text())["tasks"]
    for row, model in zip(rows, ("zero_shot", "expert"), strict=True):
        assert row.accuracy == pytest.approx({t: facts["accuracy"][model] for t, facts in tasks.items()})


def test_heads_fit_the_features_of_the_base(zoo: Path) -> None:
    backbone = OpenClipBackbone(zoo / "base")
    rows = yaml.safe_load((zoo / "benchmark.yaml").read_text())["data"]["tasks"]
    assert backbone.preprocess(draw(0, 0)).shape == (3, 32, 32)
    for task, row in rows.items():
        assert Head.from_file(row["head"]).weight.shape == (len(CLASSES[task]), 128)


def test_adaptation_images_are_unlabelled_and_no_others_have_them(zoo: Path, folder: Path, scripts) -> None:
    rows = yaml.safe_load((zoo / "benchmark.yaml").read_text())["data"]["tasks"]
    data = MultiTaskData({name: TaskSpec(**row) for name, row in rows.items()}, holdout=0.0)
    data.use(OpenClipBackbone(zoo / "base"))
    for name, row in rows.items():
        task = scripts[1].Task(name, CLASSES[name], folder / "images" / name, zoo, 0)
        adapt, trained = set(data.adaptation(name).digests()), set(task.train.digests())
        assert parquet.read_schema(row["adapt"]).names == ["image"]
        assert (len(adapt), len(trained), len(adapt & trained)) == (6, 18, 0)
        whole = scripts[1].read(zoo, folder / "images" / name / "train.parquet")
        assert adapt | trained == set(whole.digests())
    assert data.transductive() == dict.fromkeys(CLASSES, 0)


def test_a_second_run_keeps_what_is_there(zoo: Path, scripts, arguments: list[str], capsys) -> None:
    before = (zoo / "manifest.json").read_bytes()
    scripts[0].main(arguments)
    assert capsys.readouterr().out.count("kept") == 1 + 2 * len(CLASSES)
    assert (zoo / "manifest.json").read_bytes() == before


def test_the_probe_is_at_the_optimum_of_logistic_regression(scripts) -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 3
    noise = torch.randn(60, 8, generator=generator)
    inputs = normalize(noise + one_hot(labels, 8), dim=-1)
    suite = scripts[1]
    weight = (suite.probe(inputs, labels, 3) / suite.SCALE).requires_grad_()
    loss = cross_entropy(suite.SCALE * inputs @ weight.T, labels) + suite.DECAY / 2 * weight.square().sum()
    loss.backward()
    assert weight.grad is not None
    assert weight.grad.abs().max() < 1e-3
    assert loss < torch.tensor(3.0).log()


def test_a_shifted_image_is_a_crop_of_its_padded_self_perhaps_mirrored(scripts) -> None:
    images = torch.randint(1, 255, (40, 3, 4, 4), dtype=torch.uint8)
    made = scripts[1].shifted(images, 1, True, torch.Generator().manual_seed(0))
    mirrored = 0
    for before, after in zip(images, made, strict=True):
        padded = torch.nn.functional.pad(before, (1,) * 4)
        crops = [padded[:, y : y + 4, x : x + 4] for y in range(3) for x in range(3)]
        assert any(torch.equal(after, found) for crop in crops for found in (crop, crop.flip(2)))
        mirrored += any(torch.equal(after, crop.flip(2)) for crop in crops)
    assert 5 < mirrored < 35


@pytest.mark.parametrize(
    "given", [["--tasks", "a"], ["--pretrain", "a"], ["--tasks", "a", "--pretrain", "b"]]
)
def test_incomplete_arguments_are_refused(given: list[str], scripts, capsys) -> None:
    with pytest.raises(SystemExit, match="2"):
        scripts[0].main(given)
    assert "--tasks" in capsys.readouterr().err
