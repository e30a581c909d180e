"""Small models and images that every test can use: made here, seeded, without network."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import annotations
import jaxtyping
import numpy as np
import open_clip
import pytest
import torch
from coverage import Coverage
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

annotations.install()

TASKS = ("circles", "bars", "dots")
CLASSES = {"circles": ["small", "large"], "bars": ["flat", "steep", "upright"], "dots": ["one", "two"]}
SIZE = 14


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Iterator[None]:
    """Count no lines in what a test marked no_cover sets up, as pytest-cov counts none in the test itself."""
    counter = Coverage.current() if item.get_closest_marker("no_cover") else None
    if counter is None:
        return (yield)
    counter.stop()
    try:
        return (yield)
    finally:
        counter.start()


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ADAMERGE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Turn annotations' checks off, as they are for users, to see our own complaint of a wrong value."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


def tiny_config(**vision: object) -> dict[str, object]:
    """Describe an open_clip model of a few thousand parameters (plus its vocabulary)."""
    tower = {"image_size": SIZE, "patch_size": 7, "width": 16, "layers": 2, "head_width": 8} | vision
    text = {"context_length": 16, "vocab_size": 49408, "width": 8, "heads": 1, "layers": 1}
    preprocess = {"size": SIZE, "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4]}
    preprocess |= {"mode": "RGB", "interpolation": "bicubic", "resize_mode": "shortest"}
    return {
        "model_cfg": {"embed_dim": 12, "vision_cfg": tower, "text_cfg": text},
        "preprocess_cfg": preprocess,
    }


def write_clip(folder: Path, seed: int = 0, config: dict[str, object] | None = None) -> dict[str, Tensor]:
    """Write a random open_clip folder and give its state."""
    folder.mkdir(parents=True)
    config = config or tiny_config()
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    torch.manual_seed(seed)
    state = open_clip.CLIP(**config["model_cfg"]).state_dict()
    state.pop("attn_mask", None)
    save_file(state, folder / "open_clip_model.safetensors")
    return state


def nudge(state: dict[str, Tensor], seed: int, size: float = 0.02) -> dict[str, Tensor]:
    """Give the image tower of an expert: the base's, moved a little."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: tensor + size * torch.randn(tensor.shape, generator=generator)
        for name, tensor in state.items()
        if name.startswith("visual.")
    }


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `base/` (open_clip) and `experts/TASK.safetensors` (image towers)."""
    root = tmp_path_factory.mktemp("clip")
    state = write_clip(root / "base")
    (root / "experts").mkdir()
    for seed, task in enumerate(TASKS, 1):
        save_file(nudge(state, seed), root / "experts" / f"{task}.safetensors")
    return root


def draw(seed: int, label: int) -> Image.Image:
    """Draw one noisy image whose brightness and colour depend on its label."""
    noise = np.random.default_rng(seed).integers(0, 90, (SIZE + 4, SIZE + 2, 3))
    noise[:, :, label % 3] += 60 * (1 + label)
    return Image.fromarray(noise.astype(np.uint8))


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Image folders `TASK/{adapt,test}/CLASS/*.png`, twelve and nine images a task."""
    root = tmp_path_factory.mktemp("pictures")
    for t, task in enumerate(TASKS):
        for part, count in (("adapt", 12), ("test", 9)):
            for i in range(count):
                label = i % len(CLASSES[task])
                folder = root / task / part / f"{label}_{CLASSES[task][label]}"
                folder.mkdir(parents=True, exist_ok=True)
                draw(1000 * t + 100 * len(part) + i, label).save(folder / f"{i}.png")
    return root


@pytest.fixture
def rows(pictures: Path) -> dict[str, dict[str, object]]:
    """The tasks' rows, as a configuration file has them."""
    return rows_of(pictures)


def rows_of(pictures: Path) -> dict[str, dict[str, object]]:
    """Give the rows for a fixture of a module."""
    return {
        task: {
            "adapt": str(pictures / task / "adapt"),
            "test": str(pictures / task / "test"),
            "classes": CLASSES[task],
        }
        for task in TASKS
    }


@pytest.fixture
def stacks() -> Callable[..., dict[str, Tensor]]:
    """Random stacks of every rank, `[task, *param]`."""

    def make(n_tasks: int = 3, seed: int = 0) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        shapes = {"scalar": (), "bias": (5,), "weight": (5, 7), "kernel": (3, 2, 2, 2)}
        return {n: torch.randn(n_tasks, *s, generator=generator) for n, s in shapes.items()}

    return make
