"""An expert whose text tower was fine-tuned, too, gets the zero-shot head of its own, everywhere."""

import shutil
from pathlib import Path

import open_clip
import pytest
import torch
import yaml
from builders import fit
from conftest import CLASSES, write_clip
from hub_mirror import write_base
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close
from transformers import CLIPModel

import adamerge
from adamerge import TaskSpec, open_heads
from adamerge.cli import main
from adamerge.errors import AdamergeWarning

SPEC = {"bars": TaskSpec("memory", None, CLASSES["bars"])}
WEIGHTS = "open_clip_model.safetensors"


def moved(state: dict[str, Tensor], *prefixes: str) -> dict[str, Tensor]:
    """Move the tensors below some prefixes, those of the image tower a little."""
    torch.manual_seed(1)
    sizes = {n: 0.02 if n.startswith("visual.") else 0.3 for n in state if n.startswith(prefixes)}
    return {n: t + sizes[n] * torch.randn(t.shape) if n in sizes else t for n, t in state.items()}


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, and experts in several forms: with the base's text tower, and with towers of their own."""
    root = tmp_path_factory.mktemp("towers")
    state = write_clip(root / "base")
    own = moved(state, "visual.", "text_projection", "transformer.")
    for name, tensors in {
        "own": own,
        "same": moved(state, "visual."),
        "half": {n: t.half() for n, t in moved(state, "visual.").items()},
        "scale": moved(state, "visual.", "logit_scale"),
    }.items():
        shutil.copytree(root / "base", root / name)
        save_file(tensors, root / name / WEIGHTS)
    save_file(own, root / "own.safetensors")
    save_file({n: t for n, t in own.items() if n.startswith("visual.")}, root / "images.safetensors")
    return root


def expected(folder: Path) -> Tensor:
    """Make a zero-shot head by open_clip itself."""
    model = open_clip.create_model(f"local-dir:{folder}").eval()
    prompts = open_clip.get_tokenizer(f"local-dir:{folder}")([f"a photo of a {n}." for n in CLASSES["bars"]])
    with torch.no_grad():
        return model.logit_scale.exp() * torch.nn.functional.normalize(model.encode_text(prompts), dim=-1)


@pytest.mark.parametrize("form", ["own", "own.safetensors", "scale"])
def test_another_tower_makes_the_head(towers: Path, form: str) -> None:
    with pytest.warns(AdamergeWarning, match="'bars' has a text tower of its own"):
        head = open_heads(towers / "base", SPEC, {"bars": towers / form})["bars"]
    assert head.own_tower
    assert_close(head.weight, expected(towers / form.removesuffix(".safetensors")), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(head.weight, expected(towers / "base"), atol=1e-2)


@pytest.mark.parametrize("form", ["same", "half", "images.safetensors"])
def test_the_bases_tower_makes_the_others(towers: Path, form: str) -> None:
    """No warning: the same tower, the same rounded, or none at all."""
    head = open_heads(towers / "base", SPEC, {"bars": towers / form})["bars"]
    assert not head.own_tower
    assert_close(head.weight, expected(towers / "base"), atol=1e-5, rtol=1e-5)


def test_individual_fit_card_and_predictions_agree(towers: Path, pictures: Path, tmp_path: Path) -> None:
    task = {part: str(pictures / "bars" / part) for part in ("adapt", "test")}
    model = {"base": str(towers / "base"), "experts": {"bars": str(towers / "own")}}
    document = {
        "model": model,
        "data": {"batch_size": 4, "tasks": {"bars": task | {"classes": CLASSES["bars"]}}},
    }
    (tmp_path / "b.yaml").write_text(yaml.safe_dump(document))
    methods = ["--methods", "individual,zero_shot", "--out", str(tmp_path / "bench")]
    with pytest.warns(AdamergeWarning, match="text tower of its own"):
        assert main(["bench", "run", str(tmp_path / "b.yaml"), *methods]) == 0
    with pytest.warns(AdamergeWarning, match="text tower of its own"):
        assert fit(tmp_path / "b.yaml", tmp_path / "run") == 0
    merged = adamerge.load(tmp_path / "run" / "merged")
    assert_close(merged.heads["bars"].weight, expected(towers / "own"), atol=1e-5, rtol=1e-5)
    assert (
        "Heads of bars: made with the experts' own" in (tmp_path / "run" / "merged" / "README.md").read_text()
    )
    kept = load_file(tmp_path / "run" / "merged" / WEIGHTS)
    assert torch.equal(kept["text_projection"], load_file(towers / "base" / WEIGHTS)["text_projection"])


def test_transformers_experts_may_lack_the_tokenizer(tmp_path: Path) -> None:
    write_base(tmp_path / "base")
    model = CLIPModel.from_pretrained(tmp_path / "base")
    with torch.no_grad():
        model.text_projection.weight.add_(0.3 * torch.randn_like(model.text_projection.weight))
        model.vision_model.post_layernorm.weight.add_(0.1)
    model.save_pretrained(tmp_path / "expert")
    with pytest.warns(AdamergeWarning, match=r"text tower of its own \(text_projection.weight\)"):
        head = open_heads(tmp_path / "base", SPEC, {"bars": tmp_path / "expert"})["bars"]
    for path in (tmp_path / "base").iterdir():
        if not (tmp_path / "expert" / path.name).exists():
            shutil.copy(path, tmp_path / "expert" / path.name)
    assert_close(head.weight, open_heads(tmp_path / "expert", SPEC)["bars"].weight, atol=1e-6, rtol=1e-6)
