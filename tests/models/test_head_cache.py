"""Zero-shot heads are kept by content: what determines them is in the key, and names are not."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import write_clip
from safetensors.torch import load_file, save_file

from adamerge import TaskSpec
from adamerge.cache import cache_folder
from adamerge.errors import AdamergeWarning, InputError
from adamerge.models import Head, head_cache, open_heads
from adamerge.models.head_cache import TextTower, zero_shot

TASKS = {
    "a": TaskSpec("x", None, ["dog", "cat"], ["a {}."]),
    "b": TaskSpec("x", None, ["bird", "fish"], ["{}"]),
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ADAMERGE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "heads"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model folder of which only bytes matter here."""
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"w": torch.ones(2)}, folder / "model.safetensors")
    for name in ("config.json", "tokenizer.json", "merges.txt", "adamerge.json"):
        (folder / name).write_text("{}")
    return folder


class Loads:
    """Counts how often a text tower was loaded."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self) -> TextTower:
        self.count += 1
        return TextTower(lambda prompts: torch.tensor([[float(len(p)), 1.0] for p in prompts]), 10.0)


@pytest.fixture
def load() -> Loads:
    return Loads()


def weights(heads: dict[str, Head]) -> dict[str, list[list[float]]]:
    return {task: head.weight.tolist() for task, head in heads.items()}


def test_a_tower_is_loaded_once_and_then_not_at_all(folder: Path, load: Loads) -> None:
    first = zero_shot(folder, "library 1", load, TASKS)
    assert load.count == 1
    again = zero_shot(folder, "library 1", load, TASKS)
    assert load.count == 1
    assert weights(again) == weights(first)
    assert first["a"].weight.shape == (2, 2)


def test_neither_folder_nor_task_names_matter(folder: Path, load: Loads, tmp_path: Path) -> None:
    zero_shot(folder, "library 1", load, TASKS)
    moved = shutil.move(folder, tmp_path / "elsewhere")
    (moved / "adamerge.json").write_text("{}\n")  # ours, which says nothing of the text tower
    zero_shot(moved, "library 1", load, {"other": TASKS["a"]})
    assert load.count == 1


def rewritten(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text('{"a": 1}')


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: save_file({"w": torch.zeros(2)}, folder / "model.safetensors"),
        rewritten("config.json"),
        rewritten("tokenizer.json"),
        rewritten("merges.txt"),
    ],
)
def test_other_weights_configuration_or_tokenizer_are_other_heads(
    folder: Path, load: Loads, change: Callable[[Path], object]
) -> None:
    zero_shot(folder, "library 1", load, TASKS)
    change(folder)
    zero_shot(folder, "library 1", load, TASKS)
    assert load.count == 2


@pytest.mark.parametrize(
    "spec", [TaskSpec("x", None, ["dog", "cow"], ["a {}."]), TaskSpec("x", None, ["dog", "cat"], ["{}."])]
)
def test_other_prompts_are_other_heads(folder: Path, load: Loads, spec: TaskSpec) -> None:
    zero_shot(folder, "library 1", load, TASKS)
    zero_shot(folder, "library 1", load, {"a": spec})
    assert load.count == 2


def test_another_library_or_recipe_is_another_head(
    folder: Path, load: Loads, monkeypatch: pytest.MonkeyPatch
) -> None:
    zero_shot(folder, "library 1", load, TASKS)
    zero_shot(folder, "library 2", load, TASKS)
    monkeypatch.setattr(head_cache, "_RECIPE", 3)
    zero_shot(folder, "library 2", load, TASKS)
    assert load.count == 3


DAMAGES: dict[str, Callable[[Path], object]] = {
    "cut off": lambda file: file.write_bytes(file.read_bytes()[:-3]),
    "empty": lambda file: file.write_bytes(b""),
    "not finite": lambda file: save_file({"weight": torch.full((2, 2), torch.nan)}, file),
    "of another size": lambda file: save_file({"weight": torch.ones(3, 2)}, file),
    "no head": lambda file: save_file({"kernel": torch.ones(2, 2)}, file),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_file_is_made_again(folder: Path, load: Loads, cache: Path, kind: str) -> None:
    one = {"a": TASKS["a"]}
    expected = zero_shot(folder, "library 1", load, one)
    (file,) = cache.glob("*.safetensors")
    DAMAGES[kind](file)
    with pytest.warns(AdamergeWarning, match="is damaged: it is made again"):
        assert weights(zero_shot(folder, "library 1", load, one)) == weights(expected)
    assert load.count == 2
    assert torch.equal(load_file(file)["weight"], expected["a"].weight)


def test_a_cache_that_cannot_be_written_is_done_without(
    folder: Path, load: Loads, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("ADAMERGE_CACHE", str(tmp_path / "file"))
    with pytest.warns(AdamergeWarning, match="nothing is kept in") as warned:
        assert weights(zero_shot(folder, "library 1", load, TASKS))
    assert len(warned) == 1
    zero_shot(folder, "library 1", load, TASKS)
    assert load.count == 2


def test_the_folder_is_the_users_choice(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("ADAMERGE_CACHE")
    assert cache_folder() == Path.home() / ".cache" / "adamerge"


def test_heads_of_a_real_tower_come_back_to_the_last_bit(tmp_path: Path, cache: Path) -> None:
    write_clip(tmp_path / "clip")
    first, again = (open_heads(tmp_path / "clip", TASKS) for _ in range(2))
    assert len([*cache.iterdir()]) == 2
    assert weights(first) == weights(again)
    config = tmp_path / "clip" / "open_clip_config.json"
    document = json.loads(config.read_text())
    document["model_cfg"]["quick_gelu"] = True
    config.write_text(json.dumps(document))
    assert weights(open_heads(tmp_path / "clip", TASKS)) != weights(first)


def test_a_task_without_class_names_is_refused_before_any_work(folder: Path, load: Loads) -> None:
    with pytest.raises(InputError, match="task 'birds' has no class names.\nGive `classes"):
        zero_shot(folder, "library 1", load, {**TASKS, "birds": TaskSpec("x")})
    assert load.count == 0
