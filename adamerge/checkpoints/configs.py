"""Compares the configurations of Hugging Face folders: equal shapes do not make equal functions."""

import json
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from adamerge.checkpoints.modules import transformer_folder
from adamerge.errors import AdamergeWarning, InputError

_HINT = (
    "Experts must share the base's architecture, activation and preprocessing. To merge them nevertheless, "
    "under the base's settings: force=True (--force true; in a configuration model.force)."
)
# Says nothing of the function that the weights compute, or only what the tensors themselves tell.
_HARMLESS = re.compile(
    r"_.*|transformers_version|transformers_weights|(torch_)?dtype|architectures|auto_map|id2label|label2id"
    r"|num_labels|problem_type|finetuning_task|task_specific_params|vocab_size|tie_word_embeddings"
    r"|\w+_token_id|use_cache|attn_implementation|output_attentions|output_hidden_states|return_dict"
    r"|gradient_checkpointing|\w*(dropout|drop_path|layerdrop)\w*|initializer_\w+|pretraining_tp"
    r"|(output_router_logits|router_\w*loss\w*)|quantization_config"
)
# The longest input for which a model is meant: no weight depends on it, where positions are rotated, and
# where positions are learned their tensors tell.
_LENGTHS = re.compile(
    r"max_position_embeddings|n_positions|n_ctx|max_seq(uence)?_len(gth)?|max_window_layers"
)
_ACTIVATION = re.compile(r"hidden_act|hidden_activation|activation(_function)?|act_fn")


class DifferenceError(InputError):
    """Settings of base and experts that differ, and that `force` accepts."""

    def __init__(self, differences: Iterable[str], hint: str = _HINT) -> None:
        super().__init__("\n".join(differences), hint)


def require_same_configuration(base: Path, experts: Mapping[str, Path]) -> None:
    """Compare the ``config.json`` of base and experts; absent keys mean the library's defaults.

    Labels, dtypes, versions and settings of training and of generation may differ. An expert may be one
    part of the base, as an image tower is of a CLIP. What lacks such files (safetensors files, other
    layouts) is not judged.

    Args:
        base: The base's folder.
        experts: The experts' folders by task name.

    Raises:
        DifferenceError: A setting differs, which is named with both values.
        InputError: A file is damaged.
    """
    differences: list[str] = []
    for task, expert in experts.items():
        for line, is_length in _compare_models(task, _config(base), _config(expert)):
            if is_length:
                said = f"{line} No weight depends on it; the base's value stands."
                warnings.warn(said, AdamergeWarning, stacklevel=3)
            else:
                differences.append(line)
    if differences:
        raise DifferenceError(differences)


def _compare_models(task: str, ours: dict[str, Any], theirs: dict[str, Any]) -> Iterator[tuple[str, bool]]:
    """List what two models differ in, and whether it is a length, on which no weight depends."""
    if not ours or not theirs or dict(_flat(ours)) == dict(_flat(theirs)):
        return
    ours, theirs = _resolved(ours), _resolved(theirs)
    parts = (part for part in (ours, *ours.values()) if isinstance(part, dict))
    kind = theirs.get("model_type")
    ours = next((part for part in parts if part.get("model_type") == kind), ours)
    flat, other = dict(_flat(ours)), dict(_flat(theirs))
    is_scaled = any(_scales_by_length(key, value) for key, value in [*flat.items(), *other.items()])
    for key in sorted(flat.keys() & other.keys() - _of_generation()):
        if flat[key] != other[key]:
            leaf = key.rpartition(".")[2]
            values = f"differs: base {flat[key]!r}, expert {task!r} {other[key]!r}"
            line = f"activation {values} ({key})." if _ACTIVATION.fullmatch(leaf) else f"{key} {values}."
            yield line, bool(_LENGTHS.fullmatch(leaf)) and not is_scaled


def _scales_by_length(key: str, value: Any) -> bool:
    """Return whether a setting says that rotary positions are computed from the longest input."""
    parent, _, leaf = key.rpartition(".")
    if leaf == "rope_type" or (leaf == "type" and parent.endswith("rope_scaling")):
        return value not in (None, "default", "linear")
    return False


def _of_generation() -> set[str]:
    """Return the settings of generation, which older versions kept beside the model's."""
    from transformers import GenerationConfig

    return set(GenerationConfig().to_dict())


def _config(folder: Path) -> dict[str, Any]:
    return read_settings(transformer_folder(folder) / "config.json")


def read_settings(file: Path) -> dict[str, Any]:
    """Read a JSON object, or nothing where there is no such file.

    Raises:
        InputError: The file is damaged.
    """
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
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
