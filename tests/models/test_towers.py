"""Architectures of open_clip that can be made small, and models of timm: our features are the libraries'.

A fixed sample runs always; `pytest -m sweep` runs all.
"""

import copy
import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
from architectures import examples, randomised
from open_clip.transform import PreprocessCfg, image_transform_v2
from safetensors.torch import save_file
from test_architectures import adamerge_logits, assert_same, marked
from torch import Tensor

from adamerge.checkpoints import open_checkpoint
from adamerge.data.tasks import TaskSpec
from adamerge.errors import InputError
from adamerge.models import open_backbone, open_heads

OPEN_CLIP_SAMPLE = """coca_ViT-B-32 EVA02-B-16 PE-Core-T-16-384 RN50-quickgelu ViT-B-16-SigLIP ViT-B-32
    ViT-H-14-CLIPA convnext_base roberta-ViT-B-32"""
TOO_LARGE = ("vitamin_base", "vitamin_large", "vitamin_xlarge", "vit_base_mci")  # of fixed sizes
SMALL_TRUNKS: dict[str, dict[str, Any]] = {
    "convnext": {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)},
    "swin": {"embed_dim": 16, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2)},
    "fastvit": {"layers": (1, 1, 1, 1), "embed_dims": (32, 32, 32, 32)},
    "fastvit_mci3": {"layers": (1, 1, 1, 1, 1), "embed_dims": (32, 32, 32, 32, 32)},
    "fastvit_mci4": {"layers": (1, 1, 1, 1, 1), "embed_dims": (32, 32, 32, 32, 32)},
    "vit": {"embed_dim": 32, "depth": 2, "num_heads": 2},
    "vitamin": {},
    "eva": {"embed_dim": 32, "depth": 2, "num_heads": 2},
}
PLAIN_TEXT = {"width": 16, "heads": 2, "layers": 1}
TIMM_SAMPLE = "test_byobnet test_convnext test_nfnet test_vit test_vit_relpos levit_128s starnet_s050"
TIMM = """test_byobnet test_coatnet test_convnext test_convnext2 test_convnext3 test_efficientnet
    test_efficientnet_evos test_efficientnet_gn test_efficientnet_ln test_mambaout test_maxvit test_nfnet
    test_resnet test_vit test_vit2 test_vit3 test_vit4 test_vit_relpos starnet_s050 mobilevit_xxs dla46_c
    edgenext_xx_small mobilenetv3_small_050 repghostnet_050 efficientvit_m0 ghostnet_050 cspnext_tiny
    xcit_nano_12_p8_224 cs3darknet_focus_s efficientvit_b0 swiftformer_xs efficientformerv2_s0 pvt_v2_b0
    convnext_atto_rms fasternet_t0 lcnetv2_small inception_next_atto efficientnet_lite0 rexnet_100
    mobileone_s1 pit_ti_224 hardcorenas_b resnet10t repvit_m0_9 eva02_tiny_patch14_224 convit_tiny
    deit_tiny_patch16_224 hgnetv2_b0 shvit_s1 ese_vovnet19b_dw crossvit_tiny_240 levit_128s densenet121"""
DISTILLED = "swiftformer_xs efficientformerv2_s0 repvit_m0_9 crossvit_tiny_240 levit_128s"
REFUSED = dict.fromkeys(DISTILLED.split(), "has 2 linear classifiers") | {
    "dla46_c": "has 0 linear classifiers"
}
pytestmark = pytest.mark.filterwarnings("ignore")  # of the libraries' own


@pytest.fixture(autouse=True)
def _small_trunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let open_clip make small towers of timm."""
    make = timm.create_model

    def small(name: str, *arguments: Any, **options: Any) -> Any:
        names = [start for start in SMALL_TRUNKS if name.startswith(start)]
        return make(name, *arguments, **SMALL_TRUNKS[max(names, key=len)], **options)

    monkeypatch.setattr("open_clip.timm_model.timm", _Timm(small))


class _Timm:
    """Stands for the module timm where open_clip makes towers."""

    def __init__(self, create_model: Any) -> None:
        self.create_model = create_model


def small_config(name: str) -> dict[str, Any]:
    """Shrink one of open_clip's configurations."""
    config = copy.deepcopy(open_clip.get_model_config(name))
    vision, text = config["vision_cfg"], config["text_cfg"]
    config["embed_dim"] = 16
    if isinstance(vision.get("layers"), list):
        vision |= {"layers": [1, 1, 1, 1], "width": 8, "image_size": 64, "head_width": 8}
    elif "timm_model_name" not in vision:
        vision |= {"layers": 2, "width": 32, "head_width": 16, "image_size": 2 * vision["patch_size"]}
        vision |= {"attn_pooler_heads": 2}
    if "hf_model_name" not in text:
        text |= PLAIN_TEXT
    if "multimodal_cfg" in config:
        config["multimodal_cfg"] |= PLAIN_TEXT | {"attn_pooler_heads": 2}
    return config


def open_clip_names() -> list[str]:
    """List one name of each configuration that is another one when it is small."""
    small: dict[str, str] = {}
    for name in open_clip.list_models():
        trunk = open_clip.get_model_config(name)["vision_cfg"].get("timm_model_name", "")
        if not trunk.startswith(TOO_LARGE):
            key = json.dumps(small_config(name), sort_keys=True)
            small[key] = min(small.get(key, name), name, key=lambda n: (n not in OPEN_CLIP_SAMPLE.split(), n))
    return sorted(small.values())


def with_plain_text(config: dict[str, Any]) -> dict[str, Any]:
    """Replace a text tower of the hub, which needs a network, by a plain one."""
    if "hf_model_name" not in config["text_cfg"]:
        return config
    return config | {"text_cfg": {"vocab_size": 64, "context_length": 8, **PLAIN_TEXT}, "custom_text": True}


def write_open_clip(folder: Path, config: dict[str, Any]) -> Any:
    """Write a random model, and return it as open_clip reads it."""
    folder.mkdir()
    file, preprocessing = folder / "open_clip_config.json", {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4]}
    file.write_text(json.dumps({"model_cfg": with_plain_text(config), "preprocess_cfg": preprocessing}))
    torch.manual_seed(0)
    model = randomised(open_clip.create_model(f"local-dir:{folder}"))
    state = {name: tensor.contiguous().clone() for name, tensor in model.state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors")
    model = open_clip.create_model(f"local-dir:{folder}").eval()
    file.write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocessing}))
    return model


@pytest.mark.parametrize("name", marked(open_clip_names(), OPEN_CLIP_SAMPLE))
def test_features_are_those_of_open_clips_encode_image(name: str, tmp_path: Path) -> None:
    config, images = small_config(name), examples("image")
    model = write_open_clip(tmp_path / "model", config)
    transform: Any = image_transform_v2(PreprocessCfg(**model.visual.preprocess_cfg), is_train=False)
    backbone, state = open_backbone(tmp_path / "model"), open_checkpoint(tmp_path / "model")
    batch = torch.stack([backbone.preprocess(image) for image in images])
    found = backbone.features({n: state[n] for n in backbone.names}, batch).detach()
    with torch.no_grad():
        expected = model.encode_image(torch.stack([transform(image) for image in images]), normalize=False)
    assert_same(found, expected)
    if not {"hf_model_name", "hf_tokenizer_name"} & {*config["text_cfg"]}:
        assert_same(
            head_logits(tmp_path / "model", found), library_logits(model, tmp_path / "model", expected)
        )


def head_logits(folder: Path, features: Tensor) -> Tensor:
    """Classify by a zero-shot head."""
    head = open_heads(folder, {"x": TaskSpec("memory", None, ["cat", "old dog"], ["a photo of a {}."])})["x"]
    return head.logits(features)


def library_logits(model: Any, folder: Path, features: Tensor) -> Tensor:
    """Classify as open_clip does."""
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(["a photo of a cat.", "a photo of a old dog."])
    with torch.no_grad():
        texts = torch.nn.functional.normalize(model.encode_text(tokens), dim=-1)
        return model.logit_scale.exp() * torch.nn.functional.normalize(features, dim=-1) @ texts.T


@pytest.mark.parametrize("name", marked(TIMM.split(), TIMM_SAMPLE))
def test_images_are_classified_as_by_timm(name: str, tmp_path: Path) -> None:
    images = examples("image")
    for seed, (part, n_classes) in enumerate({"base": 3, "expert": 5}.items()):
        torch.manual_seed(seed)
        model = randomised(timm.create_model(name, num_classes=n_classes), 1.0, 0.3)
        timm.models.save_for_hf(model, tmp_path / part, safe_serialization=True)
    if name in REFUSED:
        with pytest.raises(InputError, match=REFUSED[name]):
            adamerge_logits(tmp_path / "base", tmp_path / "expert", images, 5)
        return
    settings = timm.data.resolve_data_config(pretrained_cfg=model.pretrained_cfg)
    transform: Any = timm.data.create_transform(**settings)
    with torch.no_grad():
        expected = model(torch.stack([transform(image) for image in images]))
    assert_same(adamerge_logits(tmp_path / "base", tmp_path / "expert", images, 5), expected, name)
