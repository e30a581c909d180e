"""Dual encoders of transformers (SigLIP, MetaCLIP 2, ALIGN, ...): the library's own features of images."""

import copy
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from adamerge.checkpoints import is_adapter, open_checkpoint
from adamerge.checkpoints.lora import WEIGHTS
from adamerge.data.tasks import TaskSpec
from adamerge.documents import read_object
from adamerge.errors import InputError
from adamerge.models.classifiers import (
    ClassifierBackbone,
    classifier_heads,
    hollow,
    require_names,
    tensor_names,
)
from adamerge.models.heads import Head
from adamerge.models.hf_encoder import CONFIG, HFEncoder, match_names, require_whole
from adamerge.models.libraries import transformers_config
from adamerge.models.processor import read_processor

Heads = Callable[[Path, Mapping[str, TaskSpec], Mapping[str, Path]], dict[str, Head]]
_TOWERS = ("VisionModel", "VisionModelWithProjection")


class ImageTower(nn.Module):
    """The part of a dual encoder that makes one vector of an image.

    Args:
        model: A dual encoder of transformers, or the image tower of one.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Float[Tensor, "image channel height width"]) -> Tensor:
        """Return the library's own features of images."""
        model: Any = self.model
        output = getattr(model, "get_image_features", model)(pixel_values=pixels)
        if isinstance(output, Tensor):
            return output
        projected = getattr(output, "image_embeds", None)
        return output.pooler_output if projected is None else projected


class HFDualEncoder(HFEncoder):
    """A dual encoder's image tower; it holds no weights of its own.

    Features are what transformers gives by ``get_image_features``: SigLIP's attention pooling, MetaCLIP's
    projection. Tasks need head files, which read features on the unit sphere.

    Args:
        path: A folder of a dual encoder, or of its image tower, as transformers writes it.
        names: The base's state, where the folder does not hold its weights.

    Raises:
        InputError: The weights lack a part, the folder has no preprocessing, or the model gives no one vector
            per image.
    """

    def __init__(self, path: str | Path, names: Collection[str] | None = None) -> None:
        path = Path(path)
        base = names if isinstance(names, Mapping) else open_checkpoint(path, role="base")
        self.config, self.kind, self.own_model = transformers_config(path), _family(path), None
        model, files, joined = match_names(self.kind, self.config, base)
        vision = getattr(self.config, "vision_config", self.config)
        transform = read_processor(path, getattr(vision, "num_channels", 3))
        tower = ImageTower(model)
        used = [name.removeprefix("model.") for name in _read_tensors(tower, transform.preprocess, path)]
        require_whole([name for name in used if name in joined], path)
        require_names(files, used, path)
        self.modules = {name: files[name] for name in used}
        own = {f"model.{name}": file for name, file in self.modules.items()}
        ClassifierBackbone.__init__(self, tower, own, "", **transform._asdict())


def is_hf_dual(path: Path) -> bool:
    """Return whether a folder holds a dual encoder of transformers, or the image tower of one."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES as CLASSIFIERS,
    )

    family = _family(path)
    if family is None or _is_dual(family):
        return family is not None
    kind = read_object(path / CONFIG).get("model_type")
    return family.__name__.endswith(_TOWERS) and kind not in CLASSIFIERS


def bring_classifiers(
    path: Path, experts: Mapping[str, Path], tasks: Mapping[str, TaskSpec] | None = None
) -> bool:
    """Return whether a dual encoder is the base of the library's classifiers of images.

    These do not read what zero-shot heads and head files read: SigLIP's read the mean of the patches.

    Args:
        path: The base's folder.
        experts: The experts' paths by task.
        tasks: The tasks' rows: one with a head file reads the dual encoder's features.

    Raises:
        InputError: Some tasks bring head files and others classifiers.
    """
    filed = [task for task in experts if tasks and task in tasks and tasks[task].head]
    own = [task for task, expert in experts.items() if task not in filed and _is_classifier(expert)]
    if own and filed:
        raise InputError(
            f"task {filed[0]!r} has a head file, which reads features of the dual encoder {path}, and task "
            f"{own[0]!r} the classifier of its expert, which reads other features.",
            "Give head files for all tasks, or for none.",
        )
    return bool(own)


def heads_of(zero_shot: Heads) -> Heads:
    """Return what makes heads of a dual encoder: of experts' classifiers, or else of its text tower."""

    def heads(path: Path, tasks: Mapping[str, TaskSpec], experts: Mapping[str, Path]) -> dict[str, Head]:
        if not bring_classifiers(path, experts, tasks):
            return zero_shot(path, tasks, experts)
        base = open_checkpoint(path, role="base")
        return classifier_heads(HFEncoder(path, base, classifiers=True), base, tasks, experts)

    return heads


def no_zero_shot_heads(path: Path, tasks: Mapping[str, TaskSpec], _: object) -> dict[str, Head]:
    """Refuse tasks without a head file: zero-shot heads are made of CLIP's text tower alone.

    Raises:
        InputError: Always, with what to do about it.
    """
    name = (read_object(path / CONFIG).get("architectures") or ["dual encoder"])[0]
    raise InputError(
        f"tasks {[*tasks]} have no head file, and zero-shot heads are not made with a {name}.",
        "Give a file with `weight [class, dim]` as `head` of each task.",
    )


def _is_classifier(expert: Path) -> bool:
    """Return whether an expert is a classifier, or an adapter that holds one."""
    with suppress(InputError):
        state = open_checkpoint(expert / WEIGHTS if is_adapter(expert) else expert)
        return any(name == "classifier.weight" or name.endswith(".classifier.weight") for name in state)
    return False


def _family(path: Path) -> Any:
    """Return transformers' class of a folder's model; None where its configuration names none."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    config = read_object(path / CONFIG)
    classes = MODEL_MAPPING_NAMES.get(str(config.get("model_type")), ())
    default = classes if isinstance(classes, str) else next(iter(classes), "")
    kinds = config.get("architectures") or [default]
    name = kinds[0] if isinstance(kinds, list) else ""
    is_base = name == default or str(name).endswith(_TOWERS)
    return getattr(transformers, name, None) if is_base and name else None


def _is_dual(family: Any) -> bool:
    return {"get_image_features", "get_text_features"} <= {*dir(family)}


def _read_tensors(tower: ImageTower, preprocess: Any, path: Path) -> list[str]:
    """Name the tensors of a dual encoder that decide an image's features, by a pass without values.

    Raises:
        InputError: The library cannot compute it, or gives no one vector per image.
    """
    import PIL.Image

    probe = copy.deepcopy(hollow(tower)).to("meta").requires_grad_(True).eval()
    pixels = preprocess(PIL.Image.new("RGB", (50, 40)))
    called: set[str] = set()
    for name, module in probe.named_modules():
        module.register_forward_pre_hook(lambda _module, _args, name=name: called.add(name))
    try:
        with torch.enable_grad():
            features = probe(torch.empty(2, *pixels.shape, device="meta"))
    except Exception as error:  # whatever the library stumbles over, the folder is what is wrong
        reason = f"{type(error).__name__} {error}".partition("\n")[0]
        raise InputError(f"{path}: transformers cannot compute features of images: {reason}") from error
    if not isinstance(features, Tensor) or features.dim() != 2:
        shape = list(features.shape[1:]) if isinstance(features, Tensor) else None
        raise InputError(
            f"{path}: {type(tower.model).__name__} gives {shape} for an image, no one vector.",
            "Write a backbone of your own (adamerge.ModuleBackbone).",
        )
    with torch.enable_grad():
        features.sum().backward()
    used = {name for name, parameter in probe.named_parameters() if parameter.grad is not None}
    used |= {name for name, _ in probe.named_buffers() if name.rpartition(".")[0] in called}
    return [name for name in tensor_names(tower) if name in used]
