"""timm models: folders in timm's hub format, and the preprocessing that their configuration asks for."""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from adamerge.checkpoints import open_checkpoint
from adamerge.data.tasks import TaskSpec
from adamerge.errors import InputError
from adamerge.models.base import ImageTransform, geometry_of, image_mode, read_object
from adamerge.models.classifiers import (
    N_CLASSES,
    ClassifierBackbone,
    classifier_heads,
    cut_classifier,
    tensor_names,
)
from adamerge.models.heads import Head
from adamerge.models.libraries import timm_model

CONFIG = "config.json"
_WRAPPED = "timm_model."  # before the names of a timm model that transformers has saved


class TimmBackbone(ClassifierBackbone):
    """A timm model without its classifier; it holds no weights of its own.

    Args:
        path: A folder with ``config.json`` (``architecture``, ``pretrained_cfg``, ``model_args``), as
            ``timm.models.save_for_hf`` writes it, or transformers, whose names have a prefix.
        names: Names of the folder's tensors; default: those of its weights.

    Raises:
        InputError: timm does not know the architecture, or it has no single linear classifier.
    """

    def __init__(self, path: str | Path, names: Collection[str] | None = None) -> None:
        model: Any = timm_model(Path(path), num_classes=N_CLASSES)
        classifier = cut_classifier(model, Path(path))
        names = open_checkpoint(path, role="base") if names is None else names
        prefix = _WRAPPED if any(name.startswith(_WRAPPED) for name in names) else ""
        files = {name: prefix + name for name in tensor_names(model)}
        super().__init__(model, files, prefix + classifier, **_transform(model, Path(path))._asdict())


def is_timm(path: Path) -> bool:
    """Tell whether a folder is in timm's hub format."""
    return isinstance(read_object(path / CONFIG).get("architecture"), str)


def timm_heads(path: Path, tasks: Mapping[str, TaskSpec], experts: Mapping[str, Path]) -> dict[str, Head]:
    """Give the tasks' heads: their experts' own classifiers."""
    base = open_checkpoint(path, role="base")
    return classifier_heads(TimmBackbone(path, base), base, tasks, experts)


def require_same_timm(base: Path, experts: Mapping[str, Path]) -> None:
    """Compare the configurations of base and expert folders; experts that are plain files have none.

    Raises:
        InputError: Architecture, arguments or preprocessing differ; classes may.
    """
    ours = _facts(base)
    for task, expert in experts.items():
        theirs = _facts(expert) if is_timm(expert) else {}
        for key in sorted(ours.keys() & theirs.keys()):
            if ours[key] != theirs[key]:
                raise InputError(
                    f"{key} differs: base {ours[key]!r}, expert {task!r} {theirs[key]!r}.",
                    "Experts must share the base's architecture and preprocessing.",
                )


def _facts(path: Path) -> dict[str, Any]:
    """Give what the function that the weights compute depends on."""
    config = read_object(path / CONFIG)
    cfg, arguments = config.get("pretrained_cfg", config), config.get("model_args", {})
    geometry = ("input_size", "interpolation", "crop_pct", "crop_mode", "mean", "std")
    facts = {"architecture": config.get("architecture")} | {key: cfg[key] for key in geometry if key in cfg}
    return facts | {key: value for key, value in arguments.items() if key != "num_classes"}


def _transform(model: Any, path: Path) -> ImageTransform:
    """Return the geometry and the arithmetic of a model's preprocessing; an image is a PIL image throughout.

    Raises:
        InputError: The configuration's mean or std have other channels than the model's images.
    """
    import PIL
    import timm
    from timm.data.config import resolve_data_config
    from timm.data.transforms_factory import create_transform

    settings = resolve_data_config(pretrained_cfg=model.pretrained_cfg)
    whole: Any = create_transform(**settings, is_training=False)
    channels = _channels(model)
    mode = image_mode(channels, path)
    sizes = {len(settings[key]) for key in ("mean", "std")}
    if sizes != {channels}:
        raise InputError(
            f"{path / CONFIG}: the model reads images of {channels} channels, mean and std have "
            f"{' and '.join(map(str, sorted(sizes)))} values.",
            "Set mean and std of pretrained_cfg to the values of training, one for each channel.",
        )
    versions = {"library": f"timm {timm.__version__}", "pillow": PIL.__version__}
    key = json.dumps(versions | settings, sort_keys=True)
    return ImageTransform(geometry_of(whole.transforms, mode), settings["mean"], settings["std"], key)


def _channels(model: Any) -> int:
    """Return how many channels the first convolution of a model reads; 3 where its name is not known."""
    first = model.pretrained_cfg.get("first_conv")
    for name in [first] if isinstance(first, str) else first or ():
        layer: Any = dict(model.named_modules()).get(name)
        if hasattr(layer, "in_channels"):
            return layer.in_channels
    return 3
