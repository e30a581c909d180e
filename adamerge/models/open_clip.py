"""open_clip models: the image tower as backbone, the text tower for zero-shot heads."""

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adamerge.data.tasks import TaskSpec, resolve
from adamerge.errors import InputError
from adamerge.models.base import ModuleBackbone
from adamerge.models.heads import Head

CONFIG = "open_clip_config.json"


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
        from torchvision.transforms.v2.functional import pil_to_tensor

        read_config(Path(path))
        with torch.device("meta"), _quiet():
            model: Any = open_clip.create_model(f"local-dir:{path}", load_weights=False, device="meta")
        config = dict(model.visual.preprocess_cfg)
        transform: Any = image_transform_v2(PreprocessCfg(**config), is_train=False)
        geometry = transform.transforms[:-2]  # without ToTensor and Normalize: `features` does these

        def preprocess(image: Any) -> Tensor:
            for step in geometry:
                image = step(image)
            return pil_to_tensor(image)

        super().__init__(
            model.visual,
            prefix="visual.",
            mean=config["mean"],
            std=config["std"],
            preprocess=preprocess,
        )


def zero_shot_heads(path: str | Path, tasks: Mapping[str, TaskSpec]) -> dict[str, Head]:
    """Build every task's frozen head: from its head file, or from the base's own text tower.

    Args:
        path: The base's open_clip folder.
        tasks: Class names and templates, or a head file, by task name.

    Returns:
        One head per task; logits are scaled by the base's exp(logit scale).
    """
    tasks = resolve(tasks)
    from_file = {t: Head.from_file(spec.head) for t, spec in tasks.items() if spec.head}
    if len(from_file) == len(tasks):
        return from_file
    import open_clip

    read_config(Path(path))
    with _quiet():
        model: Any = open_clip.create_model(f"local-dir:{path}").eval()
        tokenizer: Any = open_clip.get_tokenizer(f"local-dir:{path}")

    @torch.no_grad()
    def encode(prompts: list[str]) -> Tensor:
        return model.encode_text(tokenizer(prompts))

    scale = float(model.logit_scale.detach().exp())
    return {
        task: from_file.get(task) or Head.zero_shot(encode, spec.classes, spec.templates, scale)
        for task, spec in tasks.items()
    }


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
    except ValueError as error:
        raise InputError(f"{path / CONFIG} is no valid JSON: {error}.", "Download it again.") from error


def require_same_configuration(base: Path, experts: Mapping[str, Path]) -> None:
    """Compare the configurations of base and expert folders; experts that are plain files have none.

    Raises:
        InputError: Architecture, activation or preprocessing differ.
    """
    expected = read_config(base)
    for task, expert in experts.items():
        if not (expert / CONFIG).exists():
            continue
        found = read_config(expert)
        for part in ("model_cfg", "preprocess_cfg"):
            for key in sorted(expected.get(part, {}).keys() | found.get(part, {}).keys()):
                ours, theirs = expected.get(part, {}).get(key), found.get(part, {}).get(key)
                if ours != theirs:
                    raise InputError(
                        f"{part}.{key} differs: base {ours!r}, expert {task!r} {theirs!r}.",
                        "Experts must share the base's architecture, activation and preprocessing.",
                    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep open_clip's remarks about weights that we load ourselves off the screen."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
