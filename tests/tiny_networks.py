"""Tiny timm models and Hugging Face classifiers as folders, and short runs with them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
import transformers
from builders import make_trainer
from conftest import draw
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor

from adamerge import MergeTask, MultiTaskData, TaskSpec

State = dict[str, Tensor]
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "b", "c", "d", "good", "bad", "red", "blue"]
TIMM: Mapping[str, tuple[str, dict[str, Any]]] = {
    "vit": (
        "vit_tiny_patch16_224",
        {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2},
    ),
    "resnet": ("resnet10t", {"block_args": {}, "channels": (8, 8, 16, 16), "stem_width": 8}),
}


def write_timm(folder: Path, kind: str, n_classes: int = 3, seed: int = 0) -> State:
    """Write a random timm folder and give its state."""
    torch.manual_seed(seed)
    name, arguments = TIMM[kind]
    model = timm.create_model(name, num_classes=n_classes, **arguments)
    for layer in model.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):  # as after training
            layer.running_mean.normal_(0, 0.1)
            layer.running_var.uniform_(0.5, 1.5)
            layer.num_batches_tracked.fill_(seed + 7)
    model.pretrained_cfg["input_size"] = (3, 16, 16)
    save_for_hf(model, folder, safe_serialization=True, model_args=arguments)
    return model.state_dict()


def texts(kind: str, **more: Any) -> Any:
    """Configure a tiny model of texts."""
    sizes = {"vocab_size": len(WORDS), "max_position_embeddings": 24, "pad_token_id": 0, **more}
    if kind == "DistilBert":
        sizes |= {"dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 24}
        return transformers.DistilBertConfig(**sizes)
    return getattr(transformers, f"{kind}Config")(**sizes, **SIZES)


def images(kind: str, **more: Any) -> Any:
    """Configure a tiny model of images."""
    sizes: dict[str, Any] = {
        "ViT": {"image_size": 14, "patch_size": 7, **SIZES},
        "ConvNext": {"hidden_sizes": [8, 8, 8, 16], "depths": [1, 1, 1, 1], "image_size": 32},
        "ResNet": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"},
    }[kind]
    return getattr(transformers, f"{kind}Config")(**sizes, **more)


def make_hf(config: Any, n_classes: int = 3, seed: int = 0, *, auto: str | None = None) -> Any:
    """Make a random model of transformers."""
    torch.manual_seed(seed)
    config.num_labels = n_classes
    is_image = hasattr(config, "num_channels")
    auto = auto or ("AutoModelForImageClassification" if is_image else "AutoModelForSequenceClassification")
    model = getattr(transformers, auto).from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    return model.eval()


def write_hf(folder: Path, model: Any) -> State:
    """Write a model with its preprocessing, and give its state as the file has it."""
    model.save_pretrained(folder)
    if hasattr(model.config, "num_channels"):
        size = getattr(model.config, "image_size", 16)
        settings: dict[str, Any] = {"size": {"height": size, "width": size}, "image_mean": [0.4, 0.5, 0.6]}
        transformers.ViTImageProcessor(**settings, image_std=[0.2, 0.3, 0.4]).save_pretrained(folder)
    else:
        tokenizer().save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def tokenizer() -> Any:
    """A tokenizer of a few words."""
    whole = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    whole.pre_tokenizer = pre_tokenizers.Whitespace()
    whole.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, [("[CLS]", 2), ("[SEP]", 3)])
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=whole, **special)


def rename(folder: Path, change: Mapping[str, str]) -> None:
    """Replace parts of the names in a folder's weights."""
    state = load_file(folder / "model.safetensors")
    for old, new in change.items():
        state = {name.replace(old, new): tensor for name, tensor in state.items()}
    save_file(state, folder / "model.safetensors")


def written_images(folder: Path, n_classes: int) -> tuple[str, str]:
    """Write unlabelled and labelled images, and give their folders."""
    for part, count in (("adapt", 8), ("test", 6)):
        for i in range(count):
            place = folder / part / str(i % n_classes)
            place.mkdir(parents=True, exist_ok=True)
            draw(10 * count + i, i % n_classes).save(place / f"{i}.png")
    for label in range(n_classes):
        (folder / "test" / str(label)).mkdir(exist_ok=True)
    return str(folder / "adapt"), str(folder / "test")


def adaptation(model: MergeTask, tasks: Mapping[str, TaskSpec], steps: int) -> dict[str, float]:
    """Adapt for some steps and give the accuracy of the merged model."""
    data = MultiTaskData(dict(tasks), batch_size=4)
    make_trainer(steps).fit(model, datamodule=data)
    return model.evaluate()
