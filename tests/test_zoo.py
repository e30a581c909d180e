import importlib.util
import json
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import open_clip
import pytest
import torch
from safetensors.torch import load_file

from adamerge import zoo
from adamerge.data.embedded import EMBEDDED_TASKS, load_split

MANIFEST = json.loads((zoo.ZOO / "manifest.json").read_text())
SCRIPT = Path(__file__).parents[1] / "scripts" / "train_zoo.py"


def visual(path: Path) -> dict[str, torch.Tensor]:
    return {key: value for key, value in load_file(path).items() if key.startswith("visual.")}


@pytest.fixture(scope="module")
def base() -> dict[str, torch.Tensor]:
    return visual(zoo.base() / "open_clip_model.safetensors")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_zoo", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_manifest_describes_every_file() -> None:
    stored = {path.relative_to(zoo.ZOO).as_posix() for path in zoo.ZOO.rglob("*") if path.is_file()}
    described = set(MANIFEST["files"])
    assert described <= stored
    assert {name for name in stored if "." in name and not name.endswith((".py", ".pyc"))} == (
        described | {"manifest.json"}
    )
    for name, facts in MANIFEST["files"].items():
        content = (zoo.ZOO / name).read_bytes()
        assert (len(content), sha256(content).hexdigest()) == (facts["bytes"], facts["sha256"])


def test_the_zoo_is_small_and_readable_by_all() -> None:
    assert sum(facts["bytes"] for facts in MANIFEST["files"].values()) <= 12_000_000
    for name in MANIFEST["files"]:
        assert (zoo.ZOO / name).stat().st_mode & 0o444 == 0o444


def test_the_tasks_are_those_of_the_embedded_benchmark() -> None:
    assert list(zoo.experts()) == list(EMBEDDED_TASKS)
    for name, task in EMBEDDED_TASKS.items():
        assert MANIFEST["tasks"][name]["classes"] == list(task.classes)


@pytest.mark.skipif(
    MANIFEST["versions"]["pillow"] != version("pillow"),
    reason="another FreeType draws glyphs with other grey values",
)
@pytest.mark.parametrize("task", list(EMBEDDED_TASKS))
def test_images_are_those_that_the_manifest_names(task: str) -> None:
    images, _ = load_split(task, "test")
    assert sha256(images.numpy().tobytes()).hexdigest() == MANIFEST["tasks"][task]["images_sha256"]["test"]


def test_plain_open_clip_loads_the_base_and_its_tokenizer() -> None:
    name = f"local-dir:{zoo.base()}"
    model, transform = open_clip.create_model_from_pretrained(name)
    tokens = open_clip.get_tokenizer(name)(["the letter a", "greek omega"])
    assert tokens.shape == (2, model.context_length)
    assert transform.transforms[0].size == 28
    images = load_split("letters", "validation")[0][:4].float() / 127.5 - 1
    with torch.no_grad():
        assert model.encode_image(images).isfinite().all()
        assert model.encode_text(tokens).isfinite().all()


@pytest.mark.parametrize("task", list(EMBEDDED_TASKS))
def test_experts_are_image_towers_near_their_base(task: str, base: dict[str, torch.Tensor]) -> None:
    expert = load_file(zoo.experts()[task])
    assert {key: (value.shape, value.dtype) for key, value in expert.items()} == {
        key: (value.shape, torch.float16) for key, value in base.items()
    }
    moved = sum((expert[key].float() - base[key].float()).square().sum() for key in base).sqrt()
    length = sum(base[key].float().square().sum() for key in base).sqrt()
    assert 0.005 < moved / length < 0.05


def test_experts_beat_the_base_on_every_task() -> None:
    means = dict.fromkeys(("zero_shot", "expert"), 0.0)
    for facts in MANIFEST["tasks"].values():
        assert facts["accuracy"]["zero_shot"]["test"] < facts["accuracy"]["expert"]["test"]
        for model in means:
            means[model] += facts["accuracy"][model]["test"] / len(MANIFEST["tasks"])
    assert means["expert"] >= 88
    assert 30 <= means["zero_shot"] <= 75


def test_stored_weights_have_the_accuracy_of_the_manifest(script: ModuleType) -> None:
    measured = script.measured(zoo.ZOO, EMBEDDED_TASKS["greek"])["accuracy"]
    assert measured["expert"]["test"] == pytest.approx(
        MANIFEST["tasks"]["greek"]["accuracy"]["expert"]["test"], abs=0.5
    )


def test_the_script_makes_a_complete_zoo_and_keeps_what_is_there(
    tmp_path: Path, script: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--quick", "--out", str(tmp_path)]
    script.main(arguments)
    made = json.loads((tmp_path / "manifest.json").read_text())
    assert list(made["tasks"]) == list(MANIFEST["tasks"])[:2]
    assert set(made["files"]) < set(MANIFEST["files"])
    for name, facts in made["files"].items():
        assert facts["bytes"] == MANIFEST["files"][name]["bytes"]
    capsys.readouterr()
    script.main(arguments)
    assert capsys.readouterr().out.count("kept") == 1 + 2
    assert json.loads((tmp_path / "manifest.json").read_text()) == made
