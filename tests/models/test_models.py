"""open_clip towers, heads and evaluation against open_clip itself and against their formulas."""

import json
import shutil
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from conftest import SIZE, draw, tiny_config, write_clip
from PIL import Image
from safetensors.torch import save_file
from torch.nn import functional
from torch.testing import assert_close

from adamerge.checkpoints import open_checkpoint
from adamerge.data.tasks import TaskSpec
from adamerge.errors import InputError
from adamerge.models import (
    Head,
    ModuleBackbone,
    OpenClipBackbone,
    accuracy,
    heads,
    predict_all,
    zero_shot_heads,
)
from adamerge.models.open_clip import CONFIG, require_same_configuration

TEMPLATES = ["a photo of a {}.", "{}"]


@pytest.fixture
def base(clip: Path) -> Path:
    return clip / "base"


PICTURES = {
    "colour": draw(0, 1),
    "wide": draw(1, 0).resize((41, 17)),
    "one row": Image.fromarray(np.arange(90, dtype=np.uint8).reshape(1, 30, 3)),
    "grey": draw(2, 1).convert("L"),
    "cmyk": draw(3, 1).convert("CMYK"),
    "palette": draw(4, 1).convert("P"),
    "rgba": draw(5, 1).convert("RGBA"),
}


@pytest.mark.parametrize("picture", PICTURES)
def test_uint8_preprocessing_and_normalisation_are_open_clips_bit_for_bit(base: Path, picture: str) -> None:
    backbone = OpenClipBackbone(base)
    _, _, transform = open_clip.create_model_and_transforms(f"local-dir:{base}")
    module = ModuleBackbone(torch.nn.Identity(), mean=[0.4, 0.5, 0.6], std=[0.2, 0.3, 0.4])
    assert torch.equal(module.mean, backbone.mean)
    assert torch.equal(module.std, backbone.std)
    stored = backbone.preprocess(PICTURES[picture])
    assert stored.dtype == torch.uint8
    seen = (stored.float() / 255 - backbone.mean) / backbone.std
    assert torch.equal(seen, transform(PICTURES[picture].convert("RGB")))  # as image folders give them


def test_features_of_a_picture_are_open_clips(base: Path) -> None:
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{base}")
    backbone, weights = OpenClipBackbone(base), dict(open_checkpoint(base))
    inputs = backbone.preprocess(PICTURES["colour"])[None]
    with torch.no_grad():
        expected = model.eval().encode_image(transform(PICTURES["colour"])[None])
    assert torch.equal(backbone.features(weights, inputs), expected)


def test_a_backbone_holds_no_weights_of_its_own(base: Path) -> None:
    backbone = OpenClipBackbone(base)
    assert all(p.is_meta for p in backbone.module.parameters())
    assert not backbone.module.training


def test_a_backbone_without_transform_passes_tensors_on() -> None:
    tensor = torch.rand(3)
    assert ModuleBackbone(torch.nn.Linear(3, 2)).preprocess(tensor) is tensor


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "is no open_clip model folder: it has no open_clip_config.json"), ("{", "is no valid JSON")],
)
def test_a_folder_that_open_clip_cannot_describe_is_refused(
    tmp_path: Path, content: str | None, message: str
) -> None:
    if content is not None:
        (tmp_path / CONFIG).write_text(content)
    with pytest.raises(InputError, match=message):
        OpenClipBackbone(tmp_path)


def test_a_file_is_no_model_folder(tmp_path: Path) -> None:
    (tmp_path / "base.safetensors").touch()
    with pytest.raises(InputError, match="is no open_clip model folder"):
        OpenClipBackbone(tmp_path / "base.safetensors")


class TestZeroShotHeads:
    def test_they_are_the_normalised_mean_of_normalised_prompts_times_the_scale(self, base: Path) -> None:
        """Methods A1.5, class by class and prompt by prompt."""
        classes = ["dog", "café {noir}"]
        (head,) = zero_shot_heads(base, {"shapes": TaskSpec("x", None, classes, TEMPLATES)}).values()
        model = open_clip.create_model(f"local-dir:{base}").eval()
        tokenizer = open_clip.get_tokenizer(f"local-dir:{base}")
        for row, name in zip(head.weight, classes, strict=True):
            with torch.no_grad():
                prompts = [t.replace("{}", name) for t in TEMPLATES]
                texts = [model.encode_text(tokenizer([prompt]))[0] for prompt in prompts]
                mean = sum(text / text.norm() for text in texts) / len(texts)
                assert_close(row, model.logit_scale.exp() * mean / mean.norm())
        assert head.bias is None

    def test_logits_are_scaled_cosines(self) -> None:
        features, weight = torch.randn(4, 3), torch.randn(2, 3)
        expected = functional.cosine_similarity(features[:, None], weight[None], dim=-1) * weight.norm(dim=1)
        assert_close(Head(weight).logits(features), expected)

    def test_many_prompts_are_encoded_in_pieces(self, monkeypatch: pytest.MonkeyPatch) -> None:
        asked = []

        def encode(prompts: list[str]) -> torch.Tensor:
            asked.append(len(prompts))
            return torch.tensor([[float(len(p)), 1.0] for p in prompts])

        classes = ["a", "bb", "ccc"]
        whole = Head.zero_shot(encode, classes, TEMPLATES, 10.0)
        monkeypatch.setattr(heads, "_PROMPTS", 4)
        pieces = Head.zero_shot(encode, classes, TEMPLATES, 10.0)
        assert asked == [6, 4, 2]
        assert torch.equal(whole.weight, pieces.weight)

    def test_a_head_file_stands_in_for_prompts(self, base: Path, tmp_path: Path) -> None:
        save_file({"weight": torch.ones(2, 12)}, tmp_path / "head.safetensors")
        from_file = TaskSpec("x", head=str(tmp_path / "head.safetensors"))
        alone = zero_shot_heads(tmp_path, {"a": from_file})
        both = zero_shot_heads(
            base, {"a": from_file, "b": TaskSpec("x", None, ["cat", "dog", "ox"], TEMPLATES)}
        )
        assert torch.equal(alone["a"].weight, torch.ones(2, 12))
        assert {t: h.weight.shape[0] for t, h in both.items()} == {"a": 2, "b": 3}


class TestHead:
    def test_it_computes_in_fp32_under_autocast(self) -> None:
        features, head = torch.randn(4, 8), Head(100 * torch.randn(3, 8), torch.randn(3), normalize=False)
        with torch.autocast("cpu", torch.bfloat16):
            found = head.logits(features)
        assert found.dtype == torch.float32
        assert torch.equal(found, features @ head.weight.T + head.bias)

    def test_it_comes_back_from_a_file_in_fp32(self, tmp_path: Path) -> None:
        save_file(
            {"weight": torch.ones(2, 3).half(), "bias": torch.ones(2).half()}, tmp_path / "h.safetensors"
        )
        head = Head.from_file(tmp_path / "h.safetensors", normalize=False).to(torch.device("cpu"))
        assert head.weight.dtype == head.bias.dtype == torch.float32
        assert not head.normalize

    @pytest.mark.parametrize(
        ("tensors", "message"),
        [
            (
                {"kernel": torch.ones(2, 3)},
                "has no matrix 'weight' of numbers; it holds kernel torch.float32 .2, 3..\nSave {'weight'",
            ),
            ({"weight": torch.ones(3)}, "has no matrix 'weight'"),
            (
                {"weight": torch.ones(2, 3), "bias": torch.ones(3)},
                "bias \\[3\\] does not fit weight \\[2, 3\\]",
            ),
        ],
    )
    def test_a_wrong_file_is_refused(self, tmp_path: Path, tensors: dict, message: str) -> None:
        save_file(tensors, tmp_path / "h.safetensors")
        with pytest.raises(InputError, match=message):
            Head.from_file(tmp_path / "h.safetensors")

    def test_features_of_another_dimension_are_refused(self) -> None:
        with pytest.raises(InputError, match="the head reads 8 dimensions, the features have 5"):
            Head(torch.ones(3, 8)).logits(torch.ones(2, 5))


def test_predictions_keep_the_loaders_order_and_accuracy_is_a_micro_average() -> None:
    backbone = ModuleBackbone(torch.nn.Linear(3, 3, bias=False))
    head = Head(torch.eye(3), normalize=False)
    inputs = torch.eye(3)[[0, 1, 2, 0]]
    batches = [{"images": inputs[:3]}, {"images": inputs[3:]}]
    logits = predict_all({"weight": torch.eye(3)}, backbone, head, batches)
    assert torch.equal(logits, inputs)
    assert accuracy(logits, torch.tensor([0, 1, 2, 1])) == 75


class TestConfigurations:
    def write(self, folder: Path, **changes: dict[str, object]) -> Path:
        folder.mkdir()
        config = tiny_config()
        for part, change in changes.items():
            config[part] = config[part] | change
        (folder / CONFIG).write_text(json.dumps(config))
        return folder

    def test_equal_ones_and_plain_files_pass(self, base: Path, tmp_path: Path) -> None:
        shutil.copytree(base, tmp_path / "expert")
        require_same_configuration(base, {"a": tmp_path / "expert", "b": tmp_path / "b.safetensors"})

    @pytest.mark.parametrize(
        ("part", "change", "message"),
        [
            (
                "model_cfg",
                {"quick_gelu": True},
                "model_cfg.quick_gelu differs: base None, expert 'cars' True",
            ),
            ("model_cfg", {"embed_dim": 16}, "model_cfg.embed_dim differs: base 12, expert 'cars' 16"),
            (
                "preprocess_cfg",
                {"mean": [0.1, 0.2, 0.3]},
                r"preprocess_cfg.mean differs: base \[0.4, 0.5, 0.6\], expert 'cars' \[0.1, 0.2, 0.3\]",
            ),
        ],
    )
    def test_a_difference_that_weights_do_not_show_is_named(
        self, base: Path, tmp_path: Path, part: str, change: dict[str, object], message: str
    ) -> None:
        expert = self.write(tmp_path / "expert", **{part: change})
        with pytest.raises(InputError, match=message) as caught:
            require_same_configuration(base, {"cars": expert})
        assert "Experts must share" in str(caught.value)


def test_an_activation_of_the_configuration_is_used(tmp_path: Path, base: Path) -> None:
    """The same weights under another activation are another model."""
    config = tiny_config()
    config["model_cfg"]["quick_gelu"] = True
    write_clip(tmp_path / "quick", config=config)
    weights, image = dict(open_checkpoint(base)), torch.full((1, 3, SIZE, SIZE), 90, dtype=torch.uint8)
    quick, exact = OpenClipBackbone(tmp_path / "quick"), OpenClipBackbone(base)
    assert not torch.allclose(quick.features(weights, image), exact.features(weights, image), atol=1e-4)
