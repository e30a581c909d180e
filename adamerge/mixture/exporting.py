"""A merged classifier as a plain checkpoint of its library: one task's head, or the rows of all, put in."""

import json
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adamerge.atomic import atomic_folder, refuse_existing
from adamerge.checkpoints import copy_companions, open_checkpoint, transformer_folder, write_weights
from adamerge.checkpoints.companions import module_folders
from adamerge.checkpoints.configs import read_settings
from adamerge.checkpoints.modules import MODULES
from adamerge.errors import InputError, NumericError, nearest, shortlist
from adamerge.mixture.folder import DOCUMENT, load
from adamerge.mixture.model import Mixture
from adamerge.models import Head
from adamerge.models.classifiers import ClassifierBackbone, has_own_classifiers
from adamerge.models.hf_encoder import HFEncoder
from adamerge.models.last_layers import library_rows
from adamerge.models.libraries import quiet, transformers_class, transformers_config, transformers_model
from adamerge.models.tokens import write_padding

ALL = "all"
_CONFIG, _WEIGHTS = "config.json", "model.safetensors"
_OF_SENTENCES = (MODULES, "config_sentence_transformers.json", "sentence_bert_config.json")
_STATISTICS, _COUNTER = "running_mean", "num_batches_tracked"
_ELSEWHERE = 'Use it by adamerge.load("FOLDER").predict(inputs, task=NAME), or by `adamerge predict`.'


def export_classifier(
    folder: str | Path, out: str | Path, task: str | None = None, *, overwrite: bool = False
) -> Path:
    """Write a merged classifier as a plain checkpoint, with heads as its last layer.

    Args:
        folder: A run of `adamerge fit`, its folder ``merged``, or what `adamerge merge` wrote of classifiers.
        out: The folder to make; transformers or timm loads it as it is.
        task: Whose head is put in; "all": the rows of all tasks one below the other, named by their classes,
            or ``TASK: CLASS`` where several tasks have the class, and ``TASK: ROW`` where no name is known.
            Default: the only task.
        overwrite: Replace ``out`` if it exists.

    Raises:
        InputError: There is no such task, or no plain checkpoint computes what the model does.
        EnvironmentProblem: The disk is full or not writable.
    """
    source, target = _model_folder(Path(folder)), Path(out)
    refuse_existing(target, overwrite=overwrite)
    if target.resolve() in (source.resolve(), *source.resolve().parents):
        raise InputError(f"the output {target} would replace the model {source}.", "Choose another path.")
    _require_static(source)
    mixture = load(source)
    backbone = mixture.backbone
    if not has_own_classifiers(backbone):
        raise InputError(
            f"the heads of {source} read features that no classifier of the library computes: those of a "
            "CLIP or of a sentence encoder.",
            _ELSEWHERE,
        )
    head, names = _chosen(mixture, task)
    write = _write_transformers if isinstance(backbone, HFEncoder) else _write_timm
    with atomic_folder(target, overwrite=overwrite) as made:
        copy_companions(transformer_folder(source), made)
        for name in (*_OF_SENTENCES, *module_folders(source)):  # a classifier is no sentence encoder
            if (made / name).is_dir():
                shutil.rmtree(made / name)
            (made / name).unlink(missing_ok=True)
        write(made, source, backbone, head, names)
        title = " and ".join(mixture.heads) if task == ALL else task or next(iter(mixture.heads))
        text = (
            f"# {title}\n\nA classifier merged by adamerge, as a plain checkpoint. Its classes, row by row:\n"
        )
        (made / "README.md").write_text(f"{text}{', '.join(names)}.\n", encoding="utf-8")
    return target


def _model_folder(folder: Path) -> Path:
    """Return the model of a run, or the folder itself."""
    is_run = not (folder / DOCUMENT).exists() and (folder / "merged" / DOCUMENT).exists()
    return folder / "merged" if is_run else folder


def _require_static(source: Path) -> None:
    kind = read_settings(source / DOCUMENT).get("kind", "checkpoint")
    if kind != "checkpoint":
        raise InputError(
            f"{source} gives every input weights of its own, or runs blocks in another order: no plain "
            "checkpoint does.",
            _ELSEWHERE,
        )


def _chosen(mixture: Mixture, task: str | None) -> tuple[Head, list[str]]:
    """Return the head that is put in, and the names of its rows."""
    tasks = list(mixture.heads)
    if task is None and len(tasks) > 1:
        raise InputError(
            f"the model has {len(tasks)} tasks: {shortlist(tasks)}.", "Pass --task NAME, or all."
        )
    if task not in (None, ALL, *tasks):
        raise InputError(f"there is no task {task!r}.", nearest(str(task), [*tasks, ALL]))
    chosen = tasks if task == ALL and ALL not in tasks else [task or tasks[0]]
    heads = [mixture.heads[name] for name in chosen]
    for name, head in zip(chosen, heads, strict=True):
        if head.residual is not None or head.normalize:
            why = "corrects features (Surgery)" if head.residual is not None else "reads normalised features"
            raise InputError(f"the head of {name!r} {why}: no plain checkpoint does.", _ELSEWHERE)
    return _joined(heads), _names_of_rows(chosen, mixture)


def _joined(heads: list[Head]) -> Head:
    """Put the rows of several heads one below the other."""
    if len(heads) == 1:
        return heads[0]
    if any(head.layers is not None for head in heads):
        raise InputError(
            "each task has layers of its own before its last one, and a plain checkpoint holds one of each.",
            "Pass --task NAME, once for each task.",
        )
    biases = [torch.zeros(len(h.weight)) if h.bias is None else h.bias for h in heads]
    return Head(torch.cat([head.weight for head in heads]), torch.cat(biases), normalize=False)


def _names_of_rows(tasks: list[str], mixture: Mixture) -> list[str]:
    known = {task: mixture.classes.get(task) or [] for task in tasks}
    if len(tasks) == 1:
        return known[tasks[0]] or [f"LABEL_{row}" for row in range(len(mixture.heads[tasks[0]].weight))]
    rows = [
        (task, name)
        for task in tasks
        for name in known[task] or [f"{task}: {row}" for row in range(len(mixture.heads[task].weight))]
    ]
    plain = [name for _, name in rows]
    return [f"{task}: {name}" if plain.count(name) > 1 else name for task, name in rows]


def _write_transformers(made: Path, source: Path, backbone: Any, head: Head, names: list[str]) -> None:
    """Let transformers save its own model, whose values are the merged ones and the head's."""
    state, config = open_checkpoint(source, role="model"), transformers_config(transformer_folder(source))
    config.id2label = dict(enumerate(names))
    config.label2id = {name: row for row, name in reversed([*enumerate(names)])}
    config.problem_type = None  # softmax over the rows, as adamerge computes it
    tensors = {name: state[file] for name, file in backbone.modules.items()}
    for name, file in backbone.modules.items():
        counter = file.removesuffix(_STATISTICS) + _COUNTER
        if file.endswith(_STATISTICS) and counter in state:
            tensors[name.removesuffix(_STATISTICS) + _COUNTER] = state[counter]
    tensors |= {} if head.layers is None else head.layers.tensors
    family = transformers_class(backbone.kind, config)
    with torch.device("meta"):
        tensors |= _last_layer(backbone, head, family(config).state_dict().keys())
    _require_finite(tensors)
    dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
    model, report = transformers_model(family, config, tensors)
    strange = sorted({*report["missing_keys"], *report["unexpected_keys"]})
    if strange:
        raise InputError(f"transformers does not read {shortlist(strange)} of the model.", _ELSEWHERE)
    for name, tensor in model.state_dict(keep_vars=True).items():
        tensor.data = tensor.data.to(dtypes.get(name, tensor.dtype))
    if backbone.modality == "text":
        write_padding(made, model)
    with quiet():
        model.save_pretrained(made)
    settings = json.loads((made / _CONFIG).read_text(encoding="utf-8")) | {"num_labels": len(names)}
    (made / _CONFIG).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _write_timm(made: Path, source: Path, backbone: Any, head: Head, names: list[str]) -> None:
    """Write timm's tensors under their own names, and what the rows mean into its configuration."""
    state = open_checkpoint(source, role="model")
    tensors = {name: state[name] for name in state if name not in backbone.classifier_names}
    settings = json.loads((made / _CONFIG).read_text(encoding="utf-8"))
    settings |= {"num_classes": len(names), "label_names": names}
    settings.pop("label_descriptions", None)
    _count_classes(settings, len(names))
    (made / _CONFIG).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    tensors |= _last_layer(backbone, head, library_rows(made) or ())
    _require_finite(tensors)
    write_weights(tensors, made / _WEIGHTS)


def _require_finite(tensors: Mapping[str, Tensor]) -> None:
    """Refuse weights of which nobody could predict anything."""
    strange = [n for n, x in tensors.items() if x.is_floating_point() and not x.isfinite().all()]
    if strange:
        raise NumericError(
            f"the model's {shortlist(strange)} are not finite.",
            "Its weights are damaged, or too large for their dtype.",
        )


def _last_layer(backbone: ClassifierBackbone, head: Head, rows: Collection[str]) -> dict[str, Tensor]:
    """Return the head under the library's names of its last layer."""
    weight, bias = backbone.classifier_names
    if bias in rows:
        return {weight: head.weight, bias: torch.zeros(len(head.weight)) if head.bias is None else head.bias}
    if head.bias is not None and head.bias.any():
        raise InputError("the head has a bias, and the library's last layer has none.", _ELSEWHERE)
    return {weight: head.weight}


def _count_classes(settings: Mapping[str, Any], count: int) -> None:
    """Replace the number of classes in the parts of a timm configuration that repeat it."""
    for part in ("pretrained_cfg", "model_args"):
        if isinstance(settings.get(part), dict):
            for key in ("label_names", "label_descriptions", "labels"):
                settings[part].pop(key, None)
            if "num_classes" in settings[part]:
                settings[part]["num_classes"] = count
