"""open_clip's bare weights as a folder: a file alone does not say its activation, nor its preprocessing."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adamerge.atomic import atomic_folder
from adamerge.cache import cache_folder, warn_of_damage
from adamerge.errors import InputError, nearest
from adamerge.hub import snapshot

PREFIX = "open_clip:"
CONFIG, WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"
_FORMS = "Write open_clip:ARCHITECTURE/TAG, open_clip:ARCHITECTURE=FILE or open_clip:ARCHITECTURE/TAG=FILE."
_PREPROCESSING = ("mean", "std", "interpolation", "resize_mode")


def open_clip_folder(source: str) -> Path:
    """Give open_clip weights as a folder of the cache that holds their configuration and a link to them.

    Args:
        source: ``open_clip:ARCHITECTURE/TAG`` (open_clip's pretrained tag), ``open_clip:ARCHITECTURE=FILE``
            (safetensors), or ``open_clip:ARCHITECTURE/TAG=FILE`` for a file whose images are prepared as
            the tag's are.

    Raises:
        InputError: Architecture, tag or file is unknown; the tag's weights were trained with another
            activation than the architecture's; or the preprocessing of a file is ambiguous.
        EnvironmentProblem: A tag was given, and the hub cannot be reached.
    """
    named, _, file = source.removeprefix(PREFIX).partition("=")
    architecture, _, tag = named.partition("/")
    if not tag and not file:
        raise InputError(f"{source!r} names no weights.", _FORMS)
    configuration, tag_configuration = _configuration(architecture, tag)
    weights = Path(file).resolve() if file else _download(source, tag_configuration["hf_hub"])
    if not weights.is_file():
        raise InputError(f"{source!r}: {weights} is no file.", _FORMS)
    from adamerge.checkpoints.reading import open_checkpoint  # which imports this module

    open_checkpoint(weights, role=source)  # refuses what is no safetensors under the name that the user knows
    return _linked(json.dumps(configuration, indent=2, sort_keys=True), weights)


def _configuration(architecture: str, tag: str) -> tuple[dict[str, Any], Mapping[str, Any]]:
    """Give the document of an open_clip folder, and what open_clip knows of the tag."""
    import open_clip

    model = open_clip.get_model_config(architecture)
    if model is None:
        raise InputError(
            f"open_clip has no architecture {architecture!r}.", nearest(architecture, open_clip.list_models())
        )
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    known = {name: dict(open_clip.get_pretrained_cfg(architecture, name)) for name in tags}
    if tag and tag not in known:
        raise InputError(f"open_clip has no weights {tag!r} of {architecture}.", nearest(tag, tags))
    if tag:
        _require_activation(architecture, tag, is_quick=bool(known[tag].get("quick_gelu")))
    ways = {json.dumps({key: row.get(key) for key in _PREPROCESSING}): row for row in known.values()}
    if len(ways) > 1 and not tag:
        raise InputError(
            f"weights of {architecture} prepare images in {len(ways)} ways.",
            f"Name the tag that the file was fine-tuned from: open_clip:{architecture}/TAG=FILE.",
        )
    row = known[tag] if tag else next(iter(ways.values()), {})
    preprocessing = {"size": model["vision_cfg"]["image_size"], "mode": "RGB"}
    preprocessing |= {key: row[key] for key in _PREPROCESSING if key in row}
    model = {**model, "quick_gelu": bool(model.get("quick_gelu"))}
    return {"model_cfg": model, "preprocess_cfg": preprocessing}, known.get(tag, {})


def _require_activation(architecture: str, tag: str, *, is_quick: bool) -> None:
    """Refuse an architecture whose twin of the tag's activation open_clip has under another name."""
    import open_clip

    stem = architecture.removesuffix("-quickgelu")
    fitting = f"{stem}-quickgelu" if is_quick else stem
    if fitting != architecture and fitting in open_clip.list_models():
        names = ("gelu", "quick_gelu") if is_quick else ("quick_gelu", "gelu")
        raise InputError(
            f"activation differs: architecture {architecture} {names[0]}, weights {tag!r} {names[1]}.",
            f"Write open_clip:{fitting}/{tag}.",
        )


def _download(source: str, repository: str) -> Path:
    folder = snapshot(repository.strip("/"), source, [WEIGHTS])
    if not (folder / WEIGHTS).exists():
        raise InputError(
            f"{source!r}: {repository.strip('/')} has no {WEIGHTS}.",
            "Download what it has, make it safetensors (`adamerge convert`), and give the file.",
        )
    return folder / WEIGHTS


def _linked(configuration: str, weights: Path) -> Path:
    key = hashlib.sha256(f"{configuration}\n{weights}".encode()).hexdigest()[:32]
    target = cache_folder() / "open_clip" / key
    if not _is_whole(target, configuration, weights):
        warn_of_damage(target / CONFIG)
        with atomic_folder(target, overwrite=True, is_cache=True) as folder:
            (folder / CONFIG).write_text(configuration + "\n", encoding="utf-8")
            (folder / WEIGHTS).symlink_to(weights)
    return target


def _is_whole(folder: Path, configuration: str, weights: Path) -> bool:
    try:
        is_same = (folder / CONFIG).read_text(encoding="utf-8") == f"{configuration}\n"
        return is_same and (folder / WEIGHTS).resolve() == weights.resolve() and weights.exists()
    except (OSError, ValueError):
        return False
