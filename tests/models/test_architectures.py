"""Every architecture that a library classifies with: our logits are the library's, or a refusal says why not.

A fixed sample runs always; `pytest -m sweep` runs all. What is refused is listed with its reason, so that an
architecture that stops working fails here.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from architectures import (
    DUAL,
    examples,
    image_features,
    kinds,
    library_inputs,
    make_classifier,
    make_dual,
    write_model,
)
from torch import Tensor

from adamerge.checkpoints import open_checkpoint
from adamerge.data.tasks import TaskSpec
from adamerge.errors import InputError
from adamerge.models import open_backbone, open_heads

SAMPLE = {
    "image": """beit bit clip cvt donut-swin perceiver pp_lcnet resnet siglip siglip2 swiftformer timm_wrapper
        vit""",
    "text": """bart bert fnet funnel gemma3 gpt2 llama mixtral modernbert mra mt5 perceiver roberta t5 xlnet
        zamba2""",
}
WITHOUT_LIBRARY = {  # of another package that the library asks for, or of no class scores
    "dinat": "natten",
    "layoutlmv2": "detectron2",
    "shieldgemma2": "answers questions on images in words",
}
JOINED = """axk1 axk2 deepseek_v2 deepseek_v3 gte hunyuan_v1_moe jamba jina_embeddings_v3 minimax mixtral
    nomic_bert phimoe qwen2_moe qwen3_moe qwen3_next"""
REFUSED = dict.fromkeys(JOINED.split(), "transformers joins or splits the file's tensors") | {
    "efficientnet": "does more than resize, crop, rescale and normalise",
    "imagegpt": "cannot prepare images",
    "siglip2": "does more than resize, crop, rescale and normalise",
    "swiftformer": "has 2 linear classifiers",
    "align": "does more than resize, crop, rescale and normalise",
    "owlv2": "does more than resize, crop, rescale and normalise",
    "aya_vision": "gives \\[4, 32\\] for an image, no one vector",
    "cohere2_vision": "gives \\[4, 32\\] for an image, no one vector",
    "flava": "gives \\[17, 32\\] for an image, no one vector",
    "tipsv2": "transformers joins or splits the file's tensors",
    "tipsv2_vision_model": "transformers joins or splits the file's tensors",
}
DUAL_SAMPLE = "align altclip blip flava metaclip_2 siglip siglip_vision_model vision-text-dual-encoder"
# these random ones score all inputs alike
CONSTANT = "mobilevit mobilevitv2 mra cspnext_tiny efficientvit_b0 lcnetv2_small"


def every(modality: str) -> list[Any]:
    """List the model types that classify."""
    return marked([kind for kind in kinds(modality) if kind not in WITHOUT_LIBRARY], SAMPLE[modality])


def marked(names: list[str], sample: str) -> list[Any]:
    """Mark the cases outside a sample."""
    return [pytest.param(name, marks=[] if name in sample.split() else [pytest.mark.sweep]) for name in names]


def library_logits(folder: Path, modality: str, values: list[Any]) -> Tensor:
    """Classify as transformers does."""
    part = {"image": "Image", "text": "Sequence"}[modality]
    model = getattr(transformers, f"AutoModelFor{part}Classification").from_pretrained(folder)
    with torch.no_grad():
        output = model.eval()(**library_inputs(folder, values))
    return output.logits if "logits" in output else output[0]


def adamerge_logits(base: Path, expert: Path, values: list[Any], n_classes: int) -> Tensor:
    """Classify with an expert's weights in the base's backbone, and with the expert's own head."""
    backbone, state = open_backbone(base), open_checkpoint(base)
    weights = backbone.expert(
        expert, "expert 'x'", state, lambda path, role, _: open_checkpoint(path, role=role)
    )
    spec = TaskSpec("memory", None, [f"class {i}" for i in range(n_classes)])
    head = open_heads(base, {"x": spec}, {"x": expert})["x"]
    batch = torch.stack([backbone.preprocess(value) for value in values])
    return head.logits(backbone.features({name: weights[name] for name in backbone.names}, batch)).detach()


def assert_same(found: Tensor, expected: Tensor, kind: str = "") -> None:
    """Compare logits by the largest of them; they must be numbers, and differ from input to input."""
    assert found.shape == expected.shape
    assert expected.isfinite().all()
    scale = expected.abs().max()
    assert kind in CONSTANT.split() or expected.std(0).max() > 1e-4 * scale
    assert (found - expected).abs().max() <= 1e-4 * scale


def check(kind: str, modality: str, folder: Path) -> None:
    """Compare a model type's logits with the library's, or look for the reason of its refusal."""
    base, expert, values = folder / "base", folder / "expert", examples(modality, kind)
    write_model(base, make_classifier(kind, modality, 3, 0), modality)
    write_model(expert, make_classifier(kind, modality, 5, 1), modality)
    if kind in REFUSED:
        with pytest.raises(InputError, match=REFUSED[kind]):
            adamerge_logits(base, expert, values, 5)
        return
    assert_same(adamerge_logits(base, expert, values, 5), library_logits(expert, modality, values), kind)


@pytest.mark.filterwarnings("ignore")  # of the libraries' own
@pytest.mark.parametrize("kind", every("image"))
def test_images_are_classified_as_by_transformers(kind: str, tmp_path: Path) -> None:
    check(kind, "image", tmp_path)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", every("text"))
def test_texts_are_classified_as_by_transformers(kind: str, tmp_path: Path) -> None:
    check(kind, "text", tmp_path)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", marked(DUAL.split(), DUAL_SAMPLE))
def test_features_of_dual_encoders_are_those_of_get_image_features(kind: str, tmp_path: Path) -> None:
    model = make_dual(kind)
    write_model(tmp_path, model, "image")
    images = examples("image")
    if kind in REFUSED:
        with pytest.raises(InputError, match=REFUSED[kind]):
            open_backbone(tmp_path)
        return
    backbone, state = open_backbone(tmp_path), open_checkpoint(tmp_path)
    batch = torch.stack([backbone.preprocess(image) for image in images])
    found = backbone.features({name: state[name] for name in backbone.names}, batch).detach()
    assert_same(found, image_features(type(model).from_pretrained(tmp_path), tmp_path, images))
    assert not [name for name in backbone.names if name.startswith("text_model")]
