"""Decides what a model folder holds: the weights that its own library would read, or an adapter."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from adamerge.documents import read_object
from adamerge.errors import InputError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
OPEN_CLIP_CONFIG, ADAPTER_CONFIG = "open_clip_config.json", "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
# What each pickled file is called once it is converted, so that readers look for it.
PICKLED = {
    "pytorch_model.bin": SINGLE,
    "open_clip_pytorch_model.bin": "open_clip_model.safetensors",
    "adapter_model.bin": ADAPTER_WEIGHTS,
}
PICKLED_INDEX = "pytorch_model.bin.index.json"
_SHARD = re.compile(r"pytorch_(model-\d+-of-\d+)\.bin")
_VARIANT = re.compile(r"model\.([\w-]+)\.safetensors|model\.safetensors\.index\.([\w-]+)\.json")
_DEPTH = 4  # of configurations inside configurations
# In the order of transformers' from_pretrained, open_clip's `local-dir:` and timm's `local-dir:`.
_TRANSFORMERS = (SINGLE, INDEX, "pytorch_model.bin", PICKLED_INDEX)
_OPEN_CLIP = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    SINGLE,
    "pytorch_model.bin",
)
_TIMM = (SINGLE, "pytorch_model.bin", *_OPEN_CLIP[:3])


def weight_file(root: Path) -> Path | None:
    """Return the file that a folder's own library reads first: weights, an index, or a pickle.

    Which library that is, its configuration tells: ``open_clip_config.json``, or timm's ``architecture``;
    all other folders are read as transformers reads them, and then as open_clip does.

    Args:
        root: The folder.

    Returns:
        The file; None where the folder holds none that a library looks for.

    Raises:
        InputError: The folder holds full weights and an adapter, of which transformers would use both.
    """
    file = next((root / name for name in _order(root) if (root / name).is_file()), None)
    if file is not None and (root / ADAPTER_CONFIG).is_file():
        raise InputError(
            f"{root} holds full weights ({file.name}) and a PEFT adapter ({ADAPTER_CONFIG}).",
            "Move one of them to another folder, and give the one that is meant.",
        )
    return file


def is_adapter(path: str | Path) -> bool:
    """Return whether a local folder holds a PEFT adapter and no complete model."""
    root = Path(path)
    return (root / ADAPTER_CONFIG).is_file() and not any((root / name).is_file() for name in _order(root))


def holds_model(root: Path) -> bool:
    """Return whether a local folder holds weights that a library looks for, or a PEFT adapter."""
    return is_adapter(root) or any((root / name).is_file() for name in _order(root))


def converted_name(file: Path) -> str:
    """Return the name under which readers look for a pickled file once it is safetensors."""
    shard = _SHARD.fullmatch(file.name)
    return f"{shard[1]}.safetensors" if shard else PICKLED.get(file.name, f"{file.stem}.safetensors")


def conversion(file: Path) -> str:
    """Return what to do about a pickled file: the command that converts it, and what to give then.

    Args:
        file: The file; where readers look for the converted file beside it, nothing else has to be given.
    """
    new, command = file.with_name(converted_name(file)), f"adamerge convert {shlex.quote(str(file))}"
    if file.name in PICKLED or file.name == PICKLED_INDEX or _SHARD.fullmatch(file.name):
        return f"Read it without running it: {command}"
    if new == file:
        new = file.with_suffix(f".converted{file.suffix}")
        command += f" --out {shlex.quote(str(new))}"
    return f"Read it without running it: {command} (then give {new})"


def variants(root: Path) -> list[str]:
    """List the weights of a folder that transformers reads only when their variant is asked for."""
    return sorted(path.name for path in root.iterdir() if _VARIANT.fullmatch(path.name))


def refuse_quantised_settings(root: Path) -> None:
    """Refuse a folder whose configuration says that its weights are codes of a quantisation.

    Raises:
        InputError: There is a ``quantization_config``, which is named with its method.
    """
    for key, settings in _parts(read_object(root / "config.json")):
        quantisation = settings.get("quantization_config") or settings.get("compression_config")
        if quantisation:
            method = quantisation.get("quant_method") if isinstance(quantisation, dict) else None
            raise InputError(
                f"{root / 'config.json'} has {key}quantization_config"
                f" ({method or 'of an unnamed method'}): its weights are quantised.",
                "Codes and scales cannot be merged: dequantise the model and save it again, or give the "
                "model that was quantised. Where the weights are plain already, remove that key.",
            )


def _parts(settings: dict[str, Any], place: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """List a configuration and those inside it, as models of several parts have them, by dotted place."""
    yield place, settings
    for key, value in settings.items():
        if isinstance(value, dict) and place.count(".") < _DEPTH:
            yield from _parts(value, f"{place}{key}.")


def _order(root: Path) -> Iterator[str]:
    """List file names in the order in which the folder's library looks for them."""
    settings = read_object(root / "config.json")
    if (root / OPEN_CLIP_CONFIG).is_file():
        yield from _OPEN_CLIP
    elif isinstance(settings.get("architecture"), str):
        yield from _TIMM
    stated = settings.get("transformers_weights")
    if isinstance(stated, str) and Path(stated).name == stated and stated.endswith((".safetensors", ".json")):
        yield stated
    yield from _TRANSFORMERS
    yield from _OPEN_CLIP
