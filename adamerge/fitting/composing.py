"""From the values of a configuration to a MergeTask: files opened, a shared model made, parts joined."""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch.optim import Optimizer

from adamerge.checkpoints import adapter_digest, is_adapter, locate, open_checkpoint
from adamerge.checkpoints.foreign_code import require_no_code
from adamerge.checkpoints.settings import settings_of
from adamerge.coefficients import Coefficients, Routing
from adamerge.data.tasks import TaskSpec
from adamerge.documents import require_source
from adamerge.errors import InputError, nearest
from adamerge.models import ModuleBackbone, Surgery, open_backbone, open_heads
from adamerge.models.opening import reads_classifiers, require_fitting_heads, require_same_function
from adamerge.objectives import Objective
from adamerge.ranges import Count, Range, checked
from adamerge.state import State
from adamerge.static import METHODS, merge
from adamerge.static import edit as apply_edit
from adamerge.task import MergeTask, published_adam
from adamerge.vectors import STREAM, Codec, TaskVectors, make_codec, rebase
from adamerge.vectors.store import open_expert


@checked
def merge_task(
    base: str,
    experts: dict[str, str],
    tasks: dict[str, TaskSpec],
    *,
    codec: str = "fp32",
    codec_options: dict[str, Any] | None = None,
    edit: str | None = None,
    edit_options: dict[str, Any] | None = None,
    shared: str | None = None,
    shared_options: dict[str, Any] | None = None,
    relative_to: Literal["shared", "base"] = "shared",
    coefficients: Coefficients | None = None,
    objective: Objective | None = None,
    optimizer: Callable[[Iterable[Any]], Optimizer] = published_adam,
    decay: Literal["none", "linear"] = "none",
    adapters: Surgery | None = None,
    images_per_pass: Count = 16,
    recalibrate: Annotated[int, Range("[0, 1e6]")] = 0,
    force: bool = False,
) -> MergeTask:
    """Open a base and its experts and compose a MergeTask.

    Args:
        base: The base's folder (open_clip, Hugging Face), hub id, ``open_clip:ARCHITECTURE/TAG``,
            ``open_clip:ARCHITECTURE=FILE``, or ``embedded:base``.
        experts: Task name to the expert's folder (also PEFT's), safetensors file, or ``embedded:TASK``.
        tasks: The tasks' rows (taken from data.tasks).
        codec: Stored form of the task vectors: fp32, bf16, fp16, ternary, low_rank, magnitude, bernoulli; or
            stream: every step reads the files again, and memory does not grow with the number of experts.
        codec_options: Options of the codec, such as fraction.
        edit: A task-vector edit to apply first, such as ties_trim.
        edit_options: Options of the edit.
        shared: What the vectors are relative to, and what every input shares: a static method, such as
            task_arithmetic, the path of a merged model, or base. Default: the base.
        shared_options: Options of that method.
        relative_to: What routed experts are added to: the shared model (Twin-Merging), or the base
            (WEMoE, SMILE), while tensors that are not routed are the shared model's.
        coefficients: What is learned; default: one coefficient per task and tensor, from 0.3. With a
            router (adamerge.Router) the model is another one for every input.
        objective: What is minimised; default: entropy.
        optimizer: The optimizer; default: Adam at 1e-3.
        decay: "linear": the learning rate falls to 0 at the last step (trainer.max_steps); "none": it stays.
        adapters: Per-task corrections of the merged model's features (adamerge.Surgery), learned too.
        images_per_pass: Small batches of several tasks share a forward pass up to this size.
        recalibrate: Images per task by which BatchNorm statistics of the merged model are measured again;
            0: they are merged like weights.
        force: Accept experts that look as if they came from another base.

    Raises:
        InputError: A source or an option is unknown, or is of no use beside the others.
    """
    if shared is None and (shared_options or relative_to != "shared"):
        raise InputError(
            "shared_options and relative_to are of no use without `shared`.",
            "Name a shared model, such as task_arithmetic, or leave them out.",
        )
    form = make_codec(codec, codec_options)
    originals, backbone = open_vectors(base, experts, codec=STREAM, force=force, tasks=tasks)
    vectors = originals if edit is None else apply_edit(originals, edit, **(edit_options or {}))
    if shared is not None:
        merged = shared_model(vectors, shared, shared_options)
        routed = [n for n in vectors.names if _is_routed(coefficients, n)]
        if relative_to == "base":
            merged = {**merged, **{name: vectors.blocks[name].base_tensor() for name in routed}}
        vectors = rebase(vectors, merged, form or codec, names=routed)
        more = weight_digests(base, shared_file(shared)) if shared_file(shared) else {}
        vectors = replace(vectors, digests={**vectors.digests, **more})
        originals.origins.check()
    else:
        vectors = vectors.stored(form or codec)
    heads = open_heads(base, tasks, experts)
    require_fitting_heads(backbone, open_checkpoint(locate(base, "base")), heads)
    return MergeTask(
        vectors,
        backbone,
        heads,
        coefficients,
        objective,
        optimizer=optimizer,
        decay=decay,
        adapters=adapters,
        images_per_pass=images_per_pass,
        recalibrate=recalibrate,
        experts=replace(originals, digests=vectors.digests),
    )


def _is_routed(coefficients: Coefficients | None, name: str) -> bool:
    return not isinstance(coefficients, Routing) or coefficients.group_of(name) is not None


def shared_model(vectors: TaskVectors, source: str, options: Mapping[str, Any] | None = None) -> State:
    """Give a merged model: by a static method, or from a checkpoint.

    Raises:
        InputError: There is neither such a method nor such a checkpoint, or it takes no options.
    """
    if source in METHODS:
        return merge(vectors, source, dtype=torch.float32, **(options or {}))
    if options:
        raise InputError(f"shared={source!r} takes no shared_options, found {dict(options)}.")
    if source == "base":
        return vectors.base_state()
    require_source("shared", source)
    if not Path(source).exists():
        raise InputError(
            f"shared={source!r} is neither a static method nor a file.", nearest(source, METHODS)
        )
    return open_checkpoint(locate(source, "shared model"), role="shared model")


def shared_file(source: str | None) -> dict[str, str]:
    """Give the checkpoint that the shared model is read from, under its name among digests, if it is one."""
    return {} if source in (None, "base", *METHODS) else {"shared model": str(source)}


def open_vectors(
    base: str,
    experts: Mapping[str, str],
    *,
    codec: str | Codec = "fp32",
    force: bool = False,
    tasks: Mapping[str, TaskSpec] | None = None,
) -> tuple[TaskVectors, ModuleBackbone]:
    """Open task vectors beside the backbone that reads them.

    Only what the backbone reads is merged; experts may lack the rest, such as the text tower.
    """
    base_path = locate(base, "base")
    paths = {task: locate(path, f"expert {task!r}") for task, path in experts.items()}
    for task, path in paths.items():
        require_no_code(path, f"expert {task!r}")
    backbone = open_backbone(base_path, classifiers=reads_classifiers(base_path, paths, tasks))
    require_same_function(base_path, paths, force=force)
    state, read = open_checkpoint(base_path, role="base"), set(backbone.names)
    opened = {t: backbone.expert(path, f"expert {t!r}", state, open_expert) for t, path in paths.items()}
    vectors = TaskVectors.open(
        state,
        opened,
        codec,
        allow_missing=[name for name in state if name not in read],
        exclude=backbone.unmerged,
        names=read,
        force=force,
    )
    return vectors, backbone


def model_settings(base: str, experts: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Describe what lies beside the weights of base and experts and decides results: see `settings_of`."""
    return {role: settings_of(locate(path, role)) for role, path in {"base": base, **experts}.items()}


def class_names(tasks: Mapping[str, TaskSpec]) -> dict[str, dict[str, str]]:
    """Hash every task's class names and templates, wherever they come from."""
    named = {task: {"classes": spec.classes, "templates": spec.templates} for task, spec in tasks.items()}
    return {
        task: {
            kind: hashlib.sha256(json.dumps(list(names)).encode()).hexdigest() for kind, names in row.items()
        }
        for task, row in named.items()
    }


def weight_digests(base: str, experts: Mapping[str, str], *, fresh: bool = False) -> dict[str, str]:
    """Hash the files of a base and its experts (SHA-256), as `TaskVectors.open` does."""
    return {role: _digest_of(path, role, fresh) for role, path in {"base": base, **experts}.items()}


def _digest_of(source: str, role: str, fresh: bool) -> str:
    path = locate(source, role)
    return (
        adapter_digest(path)
        if is_adapter(path)
        else open_checkpoint(path, role=role).file_digest(fresh=fresh)
    )
