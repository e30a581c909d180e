"""What a PEFT LoRA folder stores: its settings, and one edit for each tensor that it changes."""

import json
import math
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from adamerge.checkpoints.layout import ADAPTER_CONFIG, ADAPTER_WEIGHTS, PICKLED, conversion
from adamerge.checkpoints.reading import Checkpoint
from adamerge.errors import InputError, shortlist

CONFIG, WEIGHTS = ADAPTER_CONFIG, ADAPTER_WEIGHTS
MERGE_HINT = (
    "Merge it with PEFT, PeftModel.from_pretrained(...).merge_and_unload(), and give what that saves."
)
_APPLIED = {
    "peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora",
    "fan_in_fan_out", "lora_bias", "bias", "modules_to_save", "init_lora_weights",
}  # fmt: skip
_HARMLESS = {  # they say where and how the adapter was trained; the file holds the outcome
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "lora_dropout",
    "megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size",
    "runtime_config",
}  # fmt: skip
_INITS = {"true", "false", "none", "gaussian", "eva", "orthogonal", "mica"}  # all others rewrite the base
_PART = re.compile(r"(.+)\.(lora_(?:[AB]\.weight|B\.bias|embedding_[AB]|magnitude_vector))")


@dataclass(frozen=True)
class Edit:
    """What an adapter does to one tensor; texts are names in the adapter's file.

    Attributes:
        saved: A whole tensor in place of the base's.
        factors: What is added, times `scale`: the product of B and A, or one bias.
        shape: Shape of that product as the model stores it, unless a linear layer stores [in, out].
        scale: The factor of the product.
        rank: The r of B A.
        magnitude: The magnitude vector of DoRA.
        linear: Whether this is a linear layer, whose base tensor tells its orientation.
        transposed: Whether the model stores A' B' instead of B A.
    """

    saved: str | None = None
    factors: tuple[str, ...] = ()
    shape: tuple[int, ...] = ()
    scale: float = 1.0
    rank: int | None = None
    magnitude: str | None = None
    linear: bool = False
    transposed: bool = False


def read_edits(root: Path) -> tuple[Checkpoint, dict[str, Edit]]:
    """Open the tensors of a PEFT LoRA folder and tell what each does to which tensor of its model.

    Raises:
        InputError: A file is missing or damaged, or the folder changes weights in a way that is not
            reproduced here.
    """
    if not (root / WEIGHTS).is_file():
        names = sorted(path.name for path in root.iterdir()) if root.is_dir() else []
        pickled = next((root / name for name in names if PICKLED.get(name) == WEIGHTS), None)
        raise InputError(
            f"{root} has no {WEIGHTS}; it holds: {shortlist(names) or 'nothing'}.",
            conversion(pickled) if pickled else "Download or save the adapter again.",
        )
    settings, tensors = _settings(root / CONFIG), Checkpoint(root, (root / WEIGHTS,))
    edits: dict[str, Edit] = {}
    modules: dict[str, dict[str, str]] = defaultdict(dict)
    for key in tensors:
        name = key.removeprefix("base_model.model.")
        part = _PART.fullmatch(name)
        if part:
            modules[part[1]][part[2]] = key
        else:
            edits[name.replace(".base_layer.", ".")] = Edit(saved=key)
    for module, parts in modules.items():
        for leaf, edit in _updates(module, parts, tensors, settings).items():
            name = f"{module}.{leaf}"
            edits[name] = replace(edit, saved=edits[name].saved if name in edits else None)
    return tensors, edits


def _settings(file: Path) -> dict[str, Any]:
    """Read the settings, and refuse what changes weights by other means (an unknown setting may)."""
    try:
        found: dict[str, Any] = dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError, TypeError) as error:
        raise InputError(f"{file} is missing or damaged: {error}.", "Download or save it again.") from error
    if found.get("peft_type") != "LORA":
        raise InputError(f"{file} sets peft_type={found.get('peft_type')!r}, not 'LORA'.", MERGE_HINT)
    strange = {key: value for key, value in found.items() if value and key not in _APPLIED | _HARMLESS}
    if str(found.get("init_lora_weights", True)).lower() not in _INITS:
        strange["init_lora_weights"] = found["init_lora_weights"]
    if strange:
        listed = shortlist(f"{key}={value!r}" for key, value in strange.items())
        raise InputError(f"{file} sets {listed}, which is not reproduced here.", MERGE_HINT)
    return found


def _rank_and_scale(module: str, settings: Mapping[str, Any]) -> tuple[int, float]:
    """Read a module's r, and alpha / r (LoRA) or alpha / sqrt(r) (rsLoRA), with PEFT's patterns."""

    def number(setting: str, patterns: str) -> Any:
        found = (settings.get(patterns) or {}).items()
        matching = (value for pattern, value in found if re.match(rf"(.*\.)?({pattern})$", module))
        return next(matching, settings.get(setting, 8))

    try:
        rank, alpha = number("r", "rank_pattern"), number("lora_alpha", "alpha_pattern")
        return int(rank), alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)
    except (TypeError, ValueError, AttributeError, ArithmeticError, re.error) as error:
        raise InputError(f"{CONFIG} is damaged: rank or alpha of {module}: {error}.") from error


def _updates(
    module: str, parts: Mapping[str, str], tensors: Checkpoint, settings: Mapping[str, Any]
) -> dict[str, Edit]:
    """Give what is added to a module's weight and, with lora_bias, to its bias."""
    _require_whole(module, parts, settings)
    embedding = "lora_embedding_A" in parts
    factors = tuple(parts[f"lora_embedding_{x}" if embedding else f"lora_{x}.weight"] for x in "BA")
    b, a = (tensors.info(key).shape for key in factors)
    rank, scale = _rank_and_scale(module, settings)
    if a[:1] != (rank,) or b[1:] != (rank, *(1 for _ in a[2:])):
        raise InputError(
            f"{module}: A {list(a)} and B {list(b)} are not of the rank that {CONFIG} gives it, {rank}."
        )
    linear, magnitude = not embedding and len(a) == 2, parts.get("lora_magnitude_vector")
    if magnitude and not (linear and tensors.info(magnitude).shape == b[:1]):
        raise InputError(f"{module}: of DoRA only that of linear layers is reproduced here.", MERGE_HINT)
    shape = (*a[1:], b[0]) if embedding else (b[0], *a[1:])
    transposed = embedding or (linear and bool(settings.get("fan_in_fan_out")))
    updates = {"weight": Edit(None, factors, shape, scale, rank, magnitude, linear, transposed)}
    if bias := parts.get("lora_B.bias"):
        updates["bias"] = Edit(factors=(bias,), shape=tensors.info(bias).shape, scale=scale)
    return updates


def _require_whole(module: str, parts: Mapping[str, str], settings: Mapping[str, Any]) -> None:
    if ".base_layer." in module:
        raise InputError(
            f"{module} is LoRA on an nn.MultiheadAttention, whose out_proj PEFT up to 0.21 changes twice "
            "(huggingface/peft#3774): what was trained depends on the version.",
            MERGE_HINT,
        )
    embedding = any("embedding" in part for part in parts)
    expected = {"lora_embedding_A", "lora_embedding_B"} if embedding else {"lora_A.weight", "lora_B.weight"}
    expected |= {"lora_B.bias"} if settings.get("lora_bias") else set()
    expected |= {"lora_magnitude_vector"} if settings.get("use_dora") else set()
    if set(parts) != expected:
        raise InputError(
            f"{module} has {', '.join(sorted(parts))} where {CONFIG} asks for {', '.join(sorted(expected))}.",
            "Save or download the adapter again.",
        )
