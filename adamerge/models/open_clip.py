"""open_clip models: the image tower as backbone, the text tower for zero-shot heads."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import PIL

from adamerge.checkpoints.configs import DifferenceError
from adamerge.data.tasks import TaskSpec
from adamerge.errors import InputError
from adamerge.models.base import ModuleBackbone, geometry_of
from adamerge.models.head_cache import TextTower, without_text_tower, zero_shot
from adamerge.models.heads import Head
from adamerge.models.libraries import open_clip_image_tower, open_clip_model, open_clip_tokenizer

CONFIG = "open_clip_config.json"
_OF_TRAINING = {  # no weight that is merged depends on them, once there are weights
    *("patch_dropout", "timm_model_pretrained", "hf_model_pretrained", "timm_drop", "timm_drop_path"),
    *(
        "custom_text",
        "output_tokens",
        "init_logit_scale",
        "init_logit_bias",
        "cast_dtype",
        "nonscalar_logit_scale",
    ),
}


class OpenClipBackbone(ModuleBackbone):
    """The image tower of an open_clip folder; it holds no weights of its own.

    Args:
        path: A folder with ``open_clip_config.json``, local or as found by a hub id's download.

    Raises:
        InputError: The folder has no such configuration.
    """

    def __init__(self, path: str | Path) -> None:
        import open_clip
        from open_clip.transform import PreprocessCfg, image_transform_v2

        read_config(Path(path))
        tower, config = open_clip_image_tower(Path(path))
        transform: Any = image_transform_v2(PreprocessCfg(**config), is_train=False)
        versions = {"library": f"open_clip {open_clip.__version__}", "pillow": PIL.__version__}
        super().__init__(
            tower,
            prefix="visual.",
            mean=config["mean"],
            std=config["std"],
            preprocess=geometry_of(transform.transforms),
            transform_key=json.dumps(versions | config, sort_keys=True),
            pool=lambda output: output[0] if isinstance(output, tuple) else output,  # CoCa's has tokens, too
            activation=open_clip_activation(Path(path)),
        )


def is_open_clip(path: Path) -> bool:
    """Tell whether a folder is in open_clip's format."""
    return (path / CONFIG).is_file()


def open_clip_heads(path: Path, tasks: Mapping[str, TaskSpec], _: object = None) -> dict[str, Head]:
    """Build zero-shot heads with the text tower; logits are scaled by the base's exp(logit scale)."""
    import open_clip

    read_config(path)

    def load() -> TextTower:
        try:
            model: Any = open_clip_model(path, load_weights=True).eval()
            tokenizer: Any = open_clip_tokenizer(path)
        except (RuntimeError, OSError, FileNotFoundError) as error:
            raise without_text_tower(path, str(error).splitlines()[-1].strip()) from error
        return TextTower(
            lambda prompts: model.encode_text(tokenizer(prompts)), float(model.logit_scale.detach().exp())
        )

    return zero_shot(path, f"open_clip {open_clip.__version__}", load, tasks)


def open_clip_activation(path: Path) -> str:
    """Tell the activation that a folder's configuration names."""
    return "quick_gelu" if read_config(path).get("model_cfg", {}).get("quick_gelu") else "gelu"


def read_config(path: Path) -> dict[str, Any]:
    """Read a folder's ``open_clip_config.json``.

    Raises:
        InputError: There is none, or it is damaged.
    """
    try:
        return json.loads((path / CONFIG).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputError(
            f"{path} is no open_clip model folder: it has no {CONFIG}.",
            f"Give the base as a folder with {CONFIG} and open_clip_model.safetensors.",
        ) from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path / CONFIG} is no valid JSON: {error}.", "Download it again.") from error


def require_same_configuration(base: Path, experts: Mapping[str, Path]) -> None:
    """Compare the configurations of base and expert folders; those that are in another format have none.

    Absent keys mean open_clip's defaults.

    Raises:
        DifferenceError: Architecture, activation or preprocessing differ.
    """
    if not is_open_clip(base):
        return
    ours = _effective(read_config(base))
    differences: list[str] = []
    for task, expert in experts.items():
        theirs = _effective(read_config(expert)) if is_open_clip(expert) else ours
        differences += [
            f"{key} differs: base {ours.get(key)!r}, expert {task!r} {theirs.get(key)!r}."
            for key in sorted(ours.keys() | theirs.keys())
            if ours.get(key) != theirs.get(key)
        ]
    if differences:
        raise DifferenceError(differences)


def _effective(config: dict[str, Any]) -> dict[str, Any]:
    """Return what open_clip reads in a configuration, by dotted key; settings of training are left out."""
    from open_clip.model import CLIPTextCfg, CLIPVisionCfg
    from open_clip.transform import PreprocessCfg, merge_preprocess_dict

    model = dict(config.get("model_cfg") or {})
    vision = asdict(CLIPVisionCfg()) | dict(model.pop("vision_cfg", None) or {})
    text = asdict(CLIPTextCfg()) | dict(model.pop("text_cfg", None) or {})
    images = merge_preprocess_dict(PreprocessCfg(), config.get("preprocess_cfg") or {})
    images["size"] = vision["image_size"]  # as open_clip sets it, once the tower is made
    parts = {"model_cfg": model, "preprocess_cfg": images}
    parts |= {"model_cfg.vision_cfg": vision, "model_cfg.text_cfg": text}
    return {
        f"{part}.{key}": _pair(value) if key in ("size", "image_size") else _listed(value)
        for part, settings in parts.items()
        for key, value in settings.items()
        if key not in _OF_TRAINING and (bool(value) or value == 0) and value is not False
    }


def _pair(size: Any) -> Any:
    return [size, size] if isinstance(size, int) else _listed(size)


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
