"""timm models: folders in timm's hub format, and the preprocessing that their configuration asks for."""

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch

from adamerge.checkpoints import open_checkpoint
from adamerge.checkpoints.configs import DifferenceError
from adamerge.data.tasks import TaskSpec
from adamerge.documents import read_object
from adamerge.errors import InputError
from adamerge.models.base import ImageTransform, geometry_of, image_mode
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
_GEOMETRY = {"input_size", "interpolation", "crop_pct", "crop_mode", "mean", "std"}


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

    Absent keys mean timm's defaults: preprocessing is compared as timm resolves it, and where arguments of
    the architecture differ, the models that timm makes of them are.

    Raises:
        DifferenceError: Architecture, arguments or preprocessing differ; classes may.
    """
    ours, differences = _facts(base), list[str]()
    for task, expert in experts.items():
        theirs = _facts(expert) if is_timm(expert) else ours
        keys = [key for key in sorted(ours.keys() | theirs.keys()) if ours.get(key) != theirs.get(key)]
        if "architecture" not in keys and not set(keys) & _GEOMETRY and keys and _are_equal(base, expert):
            continue
        differences += [
            f"{key} differs: base {ours.get(key)!r}, expert {task!r} {theirs.get(key)!r}." for key in keys
        ]
    if differences:
        raise DifferenceError(differences)


def _are_equal(*folders: Path) -> bool:
    """Compare models as timm makes them: their layers, and the settings that layers show."""
    with torch.device("meta"):
        first, second = (str(timm_model(folder, num_classes=N_CLASSES)) for folder in folders)
    return first == second


def _facts(path: Path) -> dict[str, Any]:
    """Return what the function that the weights compute depends on, with timm's defaults."""
    from timm.data.config import resolve_data_config
    from timm.models import PretrainedCfg

    config = read_object(path / CONFIG)
    cfg, arguments = config.get("pretrained_cfg", config), config.get("model_args") or {}
    for key, value in {"pretrained_cfg": cfg, "model_args": arguments}.items():
        if not isinstance(value, dict):
            raise InputError(f"{path / CONFIG}: {key} is no JSON object.", "Download or save it again.")
    known = {field.name for field in fields(PretrainedCfg)}
    settings = resolve_data_config(
        pretrained_cfg=asdict(PretrainedCfg(**{k: v for k, v in cfg.items() if k in known}))
    )
    images = {key: list(v) if isinstance(v, tuple) else v for key, v in settings.items() if key in _GEOMETRY}
    facts = {"architecture": config.get("architecture")} | images
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
