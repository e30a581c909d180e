"""Compares the configurations of Hugging Face folders: equal shapes do not make equal functions."""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from adamerge.checkpoints.modules import transformer_folder
from adamerge.errors import InputError

# Says nothing of the function that the weights compute, or only what the tensors themselves tell.
_HARMLESS = re.compile(
    r"_.*|transformers_version|(torch_)?dtype|architectures|auto_map|id2label|label2id|num_labels"
    r"|problem_type|finetuning_task|task_specific_params|vocab_size|tie_word_embeddings|\w+_token_id"
    r"|use_cache|attn_implementation|output_attentions|output_hidden_states|return_dict"
    r"|gradient_checkpointing|\w*(dropout|drop_path)\w*|initializer_\w+|pretraining_tp"
)
_ACTIVATION = re.compile(r"hidden_act|hidden_activation|activation(_function)?|act_fn")
_PREPROCESSING = re.compile(r"image_mean|image_std|size|crop_size|resample|rescale_factor|do_\w+")


def require_same_configuration(base: Path, experts: Mapping[str, Path]) -> None:
    """Compare ``config.json`` and the image preprocessing of base and experts.

    Labels, dtypes, versions and settings of training may differ. An expert may be one part of the base, as
    an image tower is of a CLIP. What lacks such files (safetensors files, other layouts) is not judged.

    Args:
        base: The base's folder.
        experts: The experts' folders by task name.

    Raises:
        InputError: A setting differs, which is named with both values, or a file is damaged.
    """
    differences = [
        line
        for task, expert in experts.items()
        for read, compare in ((_config, _compare_models), (_preprocessing, _compare))
        for line in compare(task, read(base), read(expert))
    ]
    if differences:
        raise InputError(
            "\n".join(differences),
            "Experts must share the base's architecture, activation and preprocessing.",
        )


def _compare_models(task: str, ours: dict[str, Any], theirs: dict[str, Any]) -> Iterator[str]:
    """Compare two models' settings, each with its defaults where they are not written alike."""
    if not ours or not theirs or dict(_flat(ours)) == dict(_flat(theirs)):
        return
    ours, theirs = _resolved(ours), _resolved(theirs)
    parts = (part for part in (ours, *ours.values()) if isinstance(part, dict))
    kind = theirs.get("model_type")
    ours = next((part for part in parts if part.get("model_type") == kind), ours)
    yield from _compare(task, dict(_flat(ours)), dict(_flat(theirs)))


def _compare(task: str, ours: dict[str, Any], theirs: dict[str, Any]) -> Iterator[str]:
    for key in sorted(ours.keys() & theirs.keys()):
        if ours[key] != theirs[key]:
            found = f"differs: base {ours[key]!r}, expert {task!r} {theirs[key]!r}"
            is_activation = _ACTIVATION.fullmatch(key.rpartition(".")[2])
            yield f"activation {found} ({key})." if is_activation else f"{key} {found}."


def _config(folder: Path) -> dict[str, Any]:
    return read_settings(transformer_folder(folder) / "config.json")


def _preprocessing(folder: Path) -> dict[str, Any]:
    found = read_settings(folder / "preprocessor_config.json")
    found = found or read_settings(folder / "processor_config.json").get("image_processor") or {}
    kept = {key: value for key, value in found.items() if _PREPROCESSING.fullmatch(key)}
    if isinstance(kept.get("size"), int):  # the older form
        kept["size"] = {"shortest_edge": kept["size"]}
    if isinstance(kept.get("crop_size"), int):
        kept["crop_size"] = {"height": kept["crop_size"], "width": kept["crop_size"]}
    return kept


def read_settings(file: Path) -> dict[str, Any]:
    """Read a JSON object, or nothing where there is no such file.

    Raises:
        InputError: The file is damaged.
    """
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise InputError(f"{file} is no JSON object.", "Download it again.")
    return found


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Walk the settings that matter, by dotted key."""
    for key, value in config.items():
        if isinstance(value, dict) and not _HARMLESS.fullmatch(key):
            yield from _flat(value, f"{prefix}{key}.")
        elif not _HARMLESS.fullmatch(key):
            yield prefix + key, value


def _resolved(config: dict[str, Any]) -> dict[str, Any]:
    """Fill in the defaults that transformers knows: versions differ in which of them they write."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if config.get("model_type") not in CONFIG_MAPPING:
        return config
    try:
        return CONFIG_MAPPING[config["model_type"]].from_dict(config).to_dict()
    except Exception:  # whatever transformers thinks of a setting, what is written can be compared
        return config
