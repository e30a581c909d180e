"""Corruptions: the same ones each time, before resizing, and nobody else's random numbers."""

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import draw
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor

from adamerge.data.corruptions import CORRUPTIONS, make_corruption, parse_corruption
from adamerge.data.datasets import load_images
from adamerge.errors import EnvironmentProblem, InputError


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, object]]:
    """Put a small library of the same form in the place of imagecorruptions; note its calls."""
    calls: list[dict[str, object]] = []

    def corrupt(
        image: np.ndarray, severity: int, corruption_name: str, seed: int | None = None
    ) -> np.ndarray:
        calls.append({"shape": image.shape, "severity": severity, "name": corruption_name, "seed": seed})
        noise = np.random.default_rng(seed) if corruption_name == "impulse_noise" else np.random
        return (image // 2 + noise.normal(40, 9, image.shape)).clip(0, 255).astype(np.uint8)

    monkeypatch.setitem(sys.modules, "imagecorruptions", SimpleNamespace(corrupt=corrupt))
    return calls


PICTURE = draw(0, 0).resize((40, 50))


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_an_image_at_a_place_is_corrupted_in_one_way(seen: list[dict[str, object]], name: str) -> None:
    apply = make_corruption(f"{name}/3")
    first, again, elsewhere = (np.asarray(apply(PICTURE, index)) for index in (4, 4, 5))
    assert first.shape == (50, 40, 3)
    assert (first == again).all()
    assert (first != elsewhere).any()
    assert (seen[0]["name"], seen[0]["severity"]) == (name, 3)


@pytest.mark.usefixtures("seen")
def test_the_global_random_numbers_go_on_as_if_nothing_had_been() -> None:
    np.random.seed(3)
    expected = np.random.rand(2)
    np.random.seed(3)
    first = np.random.rand()
    make_corruption("spatter")(PICTURE, 0)
    assert [first, np.random.rand()] == list(expected)


def test_images_too_small_for_the_library_are_enlarged(seen: list[dict[str, object]]) -> None:
    make_corruption("contrast")(Image.new("RGB", (28, 14)), 0)
    assert seen[0]["shape"] == (32, 64, 3)


def test_images_are_corrupted_before_they_are_resized(seen: list[dict[str, object]], tmp_path: Path) -> None:
    PICTURE.save(tmp_path / "x.png")

    def preprocess(picture: Image.Image) -> Tensor:
        return pil_to_tensor(picture.resize((4, 4)))

    def load(corruption: str | None) -> Tensor:
        found = load_images(
            str(tmp_path), preprocess, labelled=False, role="x", corruption=corruption, transform_key="4 px"
        )
        return found.images[0]

    corrupted = load("motion_blur/2")
    assert torch.equal(corrupted, preprocess(make_corruption("motion_blur/2")(PICTURE, 0)))
    assert seen[0]["shape"] == (50, 40, 3)
    assert not torch.equal(corrupted, load(None))
    assert torch.equal(corrupted, load("motion_blur/2"))


def test_what_another_version_corrupted_is_not_mapped(
    seen: list[dict[str, object]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "images").mkdir()
    PICTURE.save(tmp_path / "images" / "x.png")
    source, installed = str(tmp_path / "images"), tmp_path / "imagecorruptions_imaug-0.dist-info"
    installed.mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("ADAMERGE_CACHE", str(tmp_path / "cache"))
    calls = []
    for version in ("1.1.5", "1.1.5", "1.1.6"):
        (installed / "METADATA").write_text(f"Name: imagecorruptions-imaug\nVersion: {version}\n")
        options = {"labelled": False, "role": "x", "corruption": "contrast", "transform_key": "as it is"}
        load_images(source, pil_to_tensor, **options)
        calls.append(len(seen))
    assert calls == [1, 1, 2]


def test_the_strongest_is_the_default() -> None:
    assert parse_corruption("pixelate") == ("pixelate", 5)
    assert parse_corruption("pixelate/1") == ("pixelate", 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pixelated/1", "corruption 'pixelated' is unknown.\nDid you mean 'pixelate'"),
        ("pixelate/6", "the severity must be 1 to 5.\nWrite pixelate/5"),
        ("pixelate/45", "must be 1 to 5"),
    ],
)
def test_other_texts_are_refused(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_corruption(text)


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "imagecorruptions", None)
    with pytest.raises(EnvironmentProblem, match=r"pip install imagecorruptions-imaug"):
        make_corruption("contrast")
