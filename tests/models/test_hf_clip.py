"""CLIP in transformers' format: the same model as in open_clip's, from features to learned coefficients."""

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import PIL.Image
import pytest
import torch
from builders import adapt
from hub_mirror import SIZE, draw, write_base, write_open_clip
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close
from transformers import (
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    EfficientNetImageProcessor,
)

from adamerge import Learned, MultiTaskData, TaskSpec
from adamerge.checkpoints import open_checkpoint, save
from adamerge.errors import InputError
from adamerge.fitting import merge_task, open_vectors
from adamerge.models import open_backbone, open_heads
from adamerge.models.hf_clip import HfClipBackbone

TASKS = {"cars": ["a", "b", "c"], "dots": ["one", "two"]}
TEMPLATES = ["a photo of a {}.", "{}"]
HF_BLOCKS = {  # open_clip's names of what stands outside the layers
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1": "vision_model.embeddings.patch_embedding",
    "visual.ln_post": "vision_model.post_layernorm",
    "visual.ln_pre": "vision_model.pre_layrnorm",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding",
    "visual.proj": "visual_projection",
}


class Form(NamedTuple):
    base: Path
    experts: dict[str, str]


class Forms(NamedTuple):
    hugging_face: Form
    open_clip: Form
    images: Path


def nudged(state: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Give a fine-tuned image tower, without its projection, in the old layout."""
    generator = torch.Generator().manual_seed(seed)
    tower = {n: t for n, t in state.items() if n.startswith("vision_model.")}
    return {n: t + 0.05 * torch.randn(t.shape, generator=generator) for n, t in tower.items()}


@pytest.fixture(scope="module")
def forms(tmp_path_factory: pytest.TempPathFactory) -> Forms:
    """One CLIP and two experts in two formats: HF experts are a flat file and a folder of the old layout."""
    root = tmp_path_factory.mktemp("forms")
    model = write_base(root / "hf")
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    write_open_clip(root / "open_clip", state)
    cars, dots = nudged(state, 1), nudged(state, 2)
    save_file({n.removeprefix("vision_model."): t for n, t in cars.items()}, root / "cars.safetensors")
    (root / "dots").mkdir()
    save_file(dots, root / "dots" / "model.safetensors")
    model.config.vision_config.save_pretrained(root / "dots")
    ours = {}
    for task, tower in (("cars", cars), ("dots", dots)):
        write_open_clip(root / "ours" / task, state | tower, text=False)
        ours[task] = str(root / "ours" / task)
    for t, (task, classes) in enumerate(TASKS.items()):
        for i in range(12):
            folder = root / "images" / task / classes[i % len(classes)]
            folder.mkdir(parents=True, exist_ok=True)
            draw(100 * t + i).save(folder / f"{i}.png")
    theirs = {"cars": str(root / "cars.safetensors"), "dots": str(root / "dots")}
    return Forms(Form(root / "hf", theirs), Form(root / "open_clip", ours), root / "images")


def specs(forms: Forms) -> dict[str, TaskSpec]:
    return {
        task: TaskSpec(str(forms.images / task), str(forms.images / task), classes, TEMPLATES)
        for task, classes in TASKS.items()
    }


def images(count: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, SIZE, SIZE), generator=generator, dtype=torch.uint8)


class TestTheSameModelInTwoFormats:
    def test_images_are_prepared_bit_by_bit_alike(self, forms: Forms) -> None:
        ours, theirs = (open_backbone(form.base) for form in forms[:2])
        for mode in ("RGB", "L", "RGBA", "CMYK"):  # data come as RGB; open_clip resizes palettes
            assert torch.equal(
                ours.preprocess(draw(1).convert(mode)), theirs.preprocess(draw(1).convert(mode))
            )

    def test_features_are_equal(self, forms: Forms) -> None:
        found = [
            open_backbone(form.base).features(dict(open_checkpoint(form.base)), images())
            for form in forms[:2]
        ]
        assert_close(*found, atol=1e-5, rtol=1e-5)

    def test_heads_are_equal(self, forms: Forms) -> None:
        ours, theirs = (open_heads(form.base, specs(forms)) for form in forms[:2])
        for task in TASKS:
            assert_close(ours[task].weight, theirs[task].weight, atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize("grouping", ["task", "block"])
    def test_ten_steps_learn_equal_coefficients(self, forms: Forms, grouping: str) -> None:
        learned = []
        for form in forms[:2]:
            task = merge_task(
                str(form.base), form.experts, specs(forms), coefficients=Learned(grouping=grouping)
            )
            data = MultiTaskData(specs(forms), batch_size=4)
            data.use(task.backbone)
            adapt(task, data, 10)
            learned.append(dict(zip(task.coefficients.groups, task.coefficients.table()[1].T, strict=True)))
        theirs, ours = learned
        for group, values in ours.items():
            name = group.replace("visual.transformer.resblocks", "vision_model.encoder.layers")
            if group != "visual.proj":  # no HF expert has one
                assert_close(values, theirs.pop(HF_BLOCKS.get(name, name)), atol=1e-5, rtol=0)
                assert (values != 0.3).all()
        assert not theirs


@pytest.mark.parametrize(
    ("kind", "prefix"),
    [
        (CLIPModel, "vision_model."),
        (CLIPVisionModelWithProjection, "vision_model."),
        (CLIPVisionModel, "vision_model."),
        (CLIPVisionModel, ""),
    ],
)
class TestLayouts:
    """A base may be a whole CLIP or a tower, and a `CLIPVisionModel` comes with and without a prefix."""

    @pytest.fixture
    def base(self, forms: Forms, tmp_path: Path, kind: type, prefix: str) -> Path:
        folder = shutil.copytree(forms.hugging_face.base, tmp_path / "base")
        if kind is not CLIPModel:
            kind.from_pretrained(folder).save_pretrained(folder)
        state = load_file(folder / "model.safetensors")
        if not prefix:
            state = {name.removeprefix("vision_model."): tensor for name, tensor in state.items()}
        assert f"{prefix}encoder.layers.0.mlp.fc1.weight" in state
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    def test_features_are_those_of_plain_transformers_before_and_after_a_merge(
        self, forms: Forms, base: Path, tmp_path: Path, kind: type
    ) -> None:
        vectors, backbone = open_vectors(str(base), forms.hugging_face.experts)
        save(vectors.state(vectors.uniform(0.4)), tmp_path / "merged", like=base)
        picture = backbone.preprocess(draw(1))[None]
        pixels = (picture / 255 - backbone.mean) / backbone.std
        for folder in (base, tmp_path / "merged"):
            plain, report = kind.from_pretrained(folder, output_loading_info=True)
            assert not report["missing_keys"] | report["unexpected_keys"]
            with torch.no_grad():
                output = (
                    plain.eval().get_image_features(pixels) if kind is CLIPModel else plain.eval()(pixels)
                )
            expected = output.image_embeds if "image_embeds" in output else output.pooler_output
            assert_close(backbone.features(dict(open_checkpoint(folder)), picture), expected)

    def test_experts_of_both_layouts_fit(self, forms: Forms, base: Path, kind: type, prefix: str) -> None:
        vectors, backbone = open_vectors(str(base), forms.hugging_face.experts, codec="stream")
        merged = vectors.merge(vectors.one_hot("cars"))
        name = "encoder.layers.0.mlp.fc1.weight"
        assert_close(merged[prefix + name], load_file(forms.hugging_face.experts["cars"])[name])
        frozen = set() if kind is CLIPVisionModel else {"visual_projection.weight"}
        assert set(backbone.names) - set(merged) == frozen


def test_a_projection_that_experts_have_is_merged(forms: Forms, tmp_path: Path) -> None:
    state = load_file(forms.hugging_face.base / "model.safetensors")
    expert = nudged(state, 3) | {"visual_projection.weight": 2 * state["visual_projection.weight"]}
    save_file(expert, tmp_path / "x.safetensors")
    vectors, _ = open_vectors(str(forms.hugging_face.base), {"x": str(tmp_path / "x.safetensors")})
    assert "visual_projection.weight" in vectors.names


def test_a_lora_of_a_tower_is_an_expert_of_the_whole_clip(forms: Forms, tmp_path: Path) -> None:
    base = forms.hugging_face.base
    tower = CLIPVisionModel.from_pretrained(base)
    config = LoraConfig(r=2, target_modules=["q_proj", "fc1"], init_lora_weights="gaussian")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT asks transformers by a name of old
        adapted = get_peft_model(tower, config)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT cannot ask the hub for the vocabulary
        adapted.save_pretrained(tmp_path / "lora")
    vectors, backbone = open_vectors(str(base), {"lora": str(tmp_path / "lora")})
    merged = adapted.merge_and_unload().eval()
    pixels = (images() / 255 - backbone.mean) / backbone.std
    with torch.no_grad():
        pooled = merged(pixels).pooler_output
        expected = CLIPModel.from_pretrained(base).visual_projection(pooled)
    found = backbone.features(vectors.state(vectors.one_hot("lora")), images())
    assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_a_tower_of_one_channel_reads_grey_images(tmp_path: Path) -> None:
    small = {"image_size": 16, "patch_size": 8, "projection_dim": 8, "num_channels": 1}
    small |= {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
    config = CLIPVisionConfig(**small)
    CLIPVisionModelWithProjection(config).save_pretrained(tmp_path)
    size = {"height": 16, "width": 16}
    options = {
        "size": size,
        "crop_size": size,
        "image_mean": [0.5],
        "image_std": [0.25],
        "do_convert_rgb": False,
    }
    settings = {"image_processor_type": "CLIPImageProcessor", **options}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    backbone = open_backbone(tmp_path)
    assert backbone.preprocess(PIL.Image.new("RGB", (20, 30), (90, 90, 90))).shape == (1, 16, 16)


def test_one_number_stands_for_all_channels(forms: Forms, tmp_path: Path) -> None:
    base = Path(shutil.copytree(forms.hugging_face.base, tmp_path / "base"))
    edit(base / "preprocessor_config.json", lambda c: c.update(image_mean=0.5, image_std=0.25))
    backbone = open_backbone(base)
    assert (backbone.mean.unique().tolist(), backbone.std.unique().tolist()) == ([0.5], [0.25])


class TestRefusals:
    @pytest.fixture
    def base(self, forms: Forms, tmp_path: Path) -> Path:
        return shutil.copytree(forms.hugging_face.base, tmp_path / "base")

    @pytest.mark.parametrize(
        ("damage", "message"),
        [
            (
                lambda base: (base / "preprocessor_config.json").unlink(),
                "does not say how images are prepared: it has neither preprocessor_config.json nor",
            ),
            (
                lambda base: (base / "preprocessor_config.json").write_text("{"),
                "the image processor of .* cannot be read",
            ),
            (
                lambda base: edit(base / "preprocessor_config.json", lambda c: c.update(image_std=[1, 0, 1])),
                r"has image_std \[1.0, 0.0, 1.0\], which divides nothing",
            ),
            (
                lambda base: edit(base / "preprocessor_config.json", lambda c: c.update(rescale_factor=0)),
                r"has rescale_factor \[0.0\], which divides nothing",
            ),
            (
                lambda base: EfficientNetImageProcessor().save_pretrained(base),
                "the image processor .* does more than resize, crop, rescale and normalise",
            ),
            (
                lambda base: edit(base / "config.json", lambda c: c["vision_config"].update(hidden_size=33)),
                "cannot read .*config.json",
            ),
            (
                lambda base: edit(
                    base / "config.json", lambda c: c["vision_config"].update(num_hidden_layers=3)
                ),
                "lack 16 tensors that its Hugging Face CLIP configuration asks for: vision_model.*layers.2",
            ),
        ],
    )
    def test_a_folder_that_does_not_describe_itself(
        self, base: Path, damage: Callable[[Path], object], message: str
    ) -> None:
        damage(base)
        with pytest.raises(InputError, match=message):
            open_backbone(base)

    @pytest.mark.parametrize(
        ("damage", "message"),
        [
            (
                lambda base: [
                    (base / n).unlink() for n in ("vocab.json", "tokenizer.json") if (base / n).exists()
                ],
                "has no text tower .*it has no tokenizer",
            ),
            (
                lambda base: CLIPVisionModel.from_pretrained(base).save_pretrained(base),
                "it is an image tower.\nGive as base the complete CLIP",
            ),
            (
                lambda base: edit(
                    base / "config.json", lambda c: c["text_config"].update(num_hidden_layers=2)
                ),
                "its weights lack text_model.encoder.layers.1",
            ),
            (
                lambda base: [
                    path.write_text(path.read_text().replace("<|startoftext|>", "<start>"))
                    for path in (base / "vocab.json", base / "tokenizer.json")
                    if path.exists()
                ],
                "its tokenizer has .* tokens, its embedding .* rows",
            ),
        ],
    )
    def test_heads_without_text_tower(
        self, forms: Forms, base: Path, damage: Callable[[Path], object], message: str
    ) -> None:
        damage(base)
        with pytest.raises(InputError, match=message):
            open_heads(base, specs(forms))


def edit(file: Path, change: Callable[[dict], object]) -> None:
    """Change a JSON file."""
    document = json.loads(file.read_text())
    change(document)
    file.write_text(json.dumps(document))


def test_the_size_of_the_projection_is_that_of_the_complete_clip(forms: Forms, tmp_path: Path) -> None:
    """Some published configurations leave a default in the part."""
    base = shutil.copytree(forms.hugging_face.base, tmp_path / "base")
    edit(base / "config.json", lambda c: c["vision_config"].update(projection_dim=512))
    state = dict(open_checkpoint(base))
    assert HfClipBackbone(base).features(state, images(1)).shape == (1, 16)


def test_rescaling_that_is_not_one_in_255_is_part_of_the_normalisation(forms: Forms, tmp_path: Path) -> None:
    base = shutil.copytree(forms.hugging_face.base, tmp_path / "base")
    edit(base / "preprocessor_config.json", lambda c: c.update(rescale_factor=1 / 127.5))
    backbone, plain = HfClipBackbone(base), HfClipBackbone(forms.hugging_face.base)
    pixels = [(images() / 255 - b.mean) / b.std for b in (backbone, plain)]
    assert_close(pixels[0], (images() / 127.5 - plain.mean) / plain.std)
    assert backbone.transform_key != plain.transform_key
