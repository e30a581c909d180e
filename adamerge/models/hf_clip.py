"""Hugging Face CLIP: the image tower as backbone, the text tower for zero-shot heads."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from adamerge.checkpoints import open_checkpoint
from adamerge.checkpoints.renaming import prefix_of
from adamerge.data.tasks import TaskSpec
from adamerge.documents import read_object
from adamerge.errors import shortlist
from adamerge.models.base import ModuleBackbone, without_values
from adamerge.models.head_cache import TextTower, without_text_tower, zero_shot
from adamerge.models.heads import Head
from adamerge.models.libraries import clip_tokenizer, transformers_config
from adamerge.models.processor import read_processor

_CLASSES = ("CLIPModel", "CLIPVisionModel", "CLIPVisionModelWithProjection")
_PROJECTION = "visual_projection.weight"
_TOKENIZERS = ("tokenizer.json", "vocab.json")


class HfClipBackbone(ModuleBackbone):
    """The image tower of a `CLIPModel`, `CLIPVisionModel` or `CLIPVisionModelWithProjection` folder.

    Features are the projected class token, or the pooled one where the checkpoint has no projection. No
    weights are held.

    Args:
        path: The folder, with ``config.json`` and the image processor's configuration.
        names: The checkpoint's tensor names, of either layout (with ``vision_model.``, or flat as
            transformers 5 writes a `CLIPVisionModel`); default: those of the folder's weights.

    Raises:
        InputError: A configuration is missing or damaged.
    """

    def __init__(self, path: str | Path, names: Collection[str] | None = None) -> None:
        import transformers

        path = Path(path)
        names = open_checkpoint(path, role="base") if names is None else names
        config, projects = _vision_config(path), _PROJECTION in names
        kind = transformers.CLIPVisionModelWithProjection if projects else transformers.CLIPVisionModel
        module = without_values(lambda: kind(config))
        super().__init__(
            module,
            prefix=prefix_of([name for name, _ in module.named_parameters()], names),
            pool=lambda output: output.image_embeds if projects else output.pooler_output,
            activation=config.hidden_act,
            **read_processor(path, config.num_channels)._asdict(),
        )


def is_hf_clip(path: Path) -> bool:
    """Tell whether a folder holds a CLIP, or an image tower of one, in transformers' format."""
    config = read_object(path / "config.json")
    kinds = config.get("architectures") or _CLASSES[:1]
    return config.get("model_type") in ("clip", "clip_vision_model") and kinds[0] in _CLASSES


def hf_clip_activation(path: Path) -> str:
    """Tell the activation of the image tower that a folder's configuration names."""
    return _vision_config(path).hidden_act


def hf_clip_heads(path: Path, tasks: Mapping[str, TaskSpec], _: object = None) -> dict[str, Head]:
    """Build zero-shot heads with the text tower; logits are scaled by the base's exp(logit scale)."""
    import transformers

    return zero_shot(path, f"transformers {transformers.__version__}", lambda: _text_tower(path), tasks)


def _text_tower(path: Path) -> TextTower:
    import transformers

    state = open_checkpoint(path, role="base")
    config: Any = transformers_config(path)
    if "logit_scale" not in state or config.model_type != "clip":
        raise without_text_tower(path, "it is an image tower.")
    if not any((path / name).is_file() for name in _TOKENIZERS):
        raise without_text_tower(path, f"it has no tokenizer (neither {' nor '.join(_TOKENIZERS)}).")
    text = config.text_config
    text.projection_dim = config.projection_dim
    model: Any = without_values(lambda: transformers.CLIPTextModelWithProjection(text)).eval()
    missing = [name for name in model.state_dict() if name not in state]
    if missing:
        raise without_text_tower(path, f"its weights lack {shortlist(missing)}.")
    model.load_state_dict({name: state[name].float() for name in model.state_dict()}, assign=True)
    tokenizer: Any = clip_tokenizer(path)

    def encode(prompts: list[str]) -> Tensor:
        options = {"truncation": True, "max_length": text.max_position_embeddings, "padding": True}
        tokens = tokenizer(prompts, return_tensors="pt", **options)
        if tokens["input_ids"].max() >= text.vocab_size:
            why = f"its tokenizer has {len(tokenizer)} tokens, its embedding {text.vocab_size} rows."
            raise without_text_tower(path, why)
        return model(**tokens).text_embeds

    return TextTower(encode, float(state["logit_scale"].float().exp()))


def _vision_config(path: Path) -> Any:
    """Give the image tower's configuration, with the projection that a complete CLIP has."""
    config = transformers_config(path)
    if config.model_type == "clip":
        config.vision_config.projection_dim = config.projection_dim
        return config.vision_config
    return config
