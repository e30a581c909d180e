"""Opens a model by what its files say it is: the backbone, and every task's frozen head."""

import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image

from adamerge.checkpoints import locate, open_checkpoint, require_same_configuration
from adamerge.checkpoints.configs import DifferenceError
from adamerge.checkpoints.foreign_code import require_no_code
from adamerge.data.tasks import TaskSpec, resolve
from adamerge.errors import AdamergeWarning, InputError, shortlist
from adamerge.models import open_clip
from adamerge.models.base import Backbone, ModuleBackbone
from adamerge.models.heads import Head
from adamerge.models.hf_clip import HfClipBackbone, hf_clip_activation, hf_clip_heads, is_hf_clip
from adamerge.models.hf_dual import (
    HFDualEncoder,
    bring_classifiers,
    heads_of,
    is_hf_dual,
    no_zero_shot_heads,
)
from adamerge.models.hf_encoder import HFEncoder, expects_classifiers, hf_encoder_heads, is_hf_encoder
from adamerge.models.open_clip import OpenClipBackbone, is_open_clip, open_clip_activation, open_clip_heads
from adamerge.models.processor import require_same_processors
from adamerge.models.text_towers import own_text_towers, text_tower_folder
from adamerge.models.timm import TimmBackbone, is_timm, require_same_timm, timm_heads
from adamerge.models.tokenizers import require_same_tokenizers
from adamerge.models.unread import require_all_read
from adamerge.state import State

Tasks = Mapping[str, TaskSpec]
Paths = Mapping[str, Path]


def require_same_transformers(base: Path, experts: Mapping[str, Path]) -> None:
    """Compare ``config.json`` and image processor of base and experts, as transformers reads them.

    Raises:
        DifferenceError: A setting differs, which is named with both values.
        InputError: A file is damaged.
    """
    lines: list[str] = []
    for compare in (require_same_configuration, require_same_processors):
        try:
            compare(base, experts)
        except DifferenceError as error:
            lines += str(error).splitlines()[:-1]
    if lines:
        raise DifferenceError(lines)


class Format(NamedTuple):
    """A way to store models.

    Attributes:
        name: What messages call it.
        recognise: Tells by a folder's files whether this is it.
        backbone: From the folder, and the tensor names of its weights, to the backbone.
        heads: From the folder, the tasks that bring no head file, and the experts' folders (which may
            hold their own classifiers), to heads.
        activation: Tells the activation that a folder's configuration names, where it names one.
        compare: Refuses experts' folders whose configuration differs from the base's.
        normalize: Whether the heads of head files read features on the unit sphere, as CLIP's do.
        classifiers: Gives the backbone of classifiers, where ``backbone`` may be something else.
        expects_classifiers: Tells by base, experts and tasks whether that is the backbone to take.
    """

    name: str
    recognise: Callable[[Path], bool]
    backbone: Callable[[Path, Collection[str]], ModuleBackbone]
    heads: Callable[[Path, Tasks, Paths], dict[str, Head]]
    activation: Callable[[Path], str | None] = lambda path: None
    compare: Callable[[Path, Paths], None] = require_same_transformers
    normalize: bool = True
    classifiers: Callable[[Path, Collection[str]], ModuleBackbone] | None = None
    expects_classifiers: Callable[[Path, Paths, Tasks | None], bool] = lambda path, experts, tasks: False


def _require_same_encoder(base: Path, experts: Paths) -> None:
    require_same_tokenizers(base, experts)  # first, for no force accepts other tokens
    require_same_transformers(base, experts)


def _of_classifiers(path: Path, names: Collection[str]) -> HFEncoder:
    return HFEncoder(path, names, classifiers=True)


FORMATS = (
    Format(
        "open_clip",
        is_open_clip,
        lambda path, _: OpenClipBackbone(path),
        open_clip_heads,
        open_clip_activation,
        open_clip.require_same_configuration,
    ),
    Format(
        "Hugging Face CLIP",
        is_hf_clip,
        HfClipBackbone,
        heads_of(hf_clip_heads),
        hf_clip_activation,
        classifiers=_of_classifiers,
        expects_classifiers=bring_classifiers,
    ),
    Format(
        "timm",
        is_timm,
        TimmBackbone,
        timm_heads,
        compare=require_same_timm,
        normalize=False,
    ),
    Format(
        "Hugging Face dual encoder",
        is_hf_dual,
        HFDualEncoder,
        heads_of(no_zero_shot_heads),
        classifiers=_of_classifiers,
        expects_classifiers=bring_classifiers,
    ),
    Format(
        "Hugging Face classifier",
        is_hf_encoder,
        HFEncoder,
        hf_encoder_heads,
        compare=_require_same_encoder,
        normalize=False,
        classifiers=_of_classifiers,
        expects_classifiers=expects_classifiers,
    ),
)


def open_backbone(
    source: str | Path, names: Collection[str] | None = None, *, classifiers: bool = False
) -> ModuleBackbone:
    """Open the backbone of a model folder, whose files say what it is.

    Args:
        source: The folder, a hub id, ``open_clip:ARCH/TAG``, ``open_clip:ARCH=FILE`` or ``embedded:NAME``.
        names: Names of the model's tensors; default: those of its weights.
        classifiers: Whether heads are experts' classifiers, where the folder can also make something else of
            its encoder, as sentence-transformers folders and dual encoders do: see `reads_classifiers`.

    Raises:
        InputError: No known format, code of the folder's own, or weights that lack what the configuration
            asks for.
        EnvironmentProblem: The hub cannot be reached.
    """
    path = locate(str(source), "base")
    require_no_code(path)
    found = format_of(path)
    names = open_checkpoint(path, role="base") if names is None else names
    make = (found.classifiers if classifiers else None) or found.backbone
    backbone = make(path, names)
    missing = [name for name in backbone.names if name not in names]
    if missing:
        raise InputError(
            f"the weights in {path} lack {len(missing)} tensors that its {found.name} configuration asks "
            f"for: {shortlist(missing)}.",
            "Were configuration and weights saved together?",
        )
    read = (*backbone.names, *backbone.unmerged)
    require_all_read(read, names, path, "base", getattr(backbone, "ignored", ()))
    return backbone


def open_heads(
    base: str | Path, tasks: Mapping[str, TaskSpec], experts: Mapping[str, str | Path] | None = None
) -> dict[str, Head]:
    """Give every task's frozen head: its head file, or what the base's format has (text tower, classifiers).

    The zero-shot head of a task whose expert has another text tower than the base is made with that, and an
    `AdamergeWarning` says so: it is the task's head of every model, the merged ones included.

    Args:
        base: The base, as for `open_backbone`.
        tasks: Class names and templates, or a head file, by task name.
        experts: The experts by task name, for formats whose experts bring classifiers of their own.

    Raises:
        InputError: There is nothing to make a task's head of.
    """
    tasks, path = resolve(tasks), locate(str(base), "base")
    row = _recognised(path)
    normalize = row is None or row.normalize
    heads = {
        task: Head.from_file(spec.head, normalize=normalize) for task, spec in tasks.items() if spec.head
    }
    rest = {task: spec for task, spec in tasks.items() if task not in heads}
    if rest:
        paths = {t: locate(str(expert), f"expert {t!r}") for t, expert in (experts or {}).items()}
        row = format_of(path)
        own = _heads_of_own_towers(path, row, rest, paths) if row.normalize else {}
        others = {task: spec for task, spec in rest.items() if task not in own}
        heads |= own | (row.heads(path, others, paths) if others else {})
    for task, head in heads.items():
        _require_classes(task, head)
        _require_finite(task, head)
    return {task: replace(heads[task], role=f"the head of task {task!r}") for task in tasks}


def _heads_of_own_towers(path: Path, row: Format, tasks: Tasks, experts: Paths) -> dict[str, Head]:
    """Make the zero-shot heads of tasks whose experts have text towers of their own, and say so."""
    given = {task: experts[task] for task in tasks if task in experts}
    state = open_checkpoint(path, role="base")
    vision = row.backbone(path, [*state]).names if given else ()
    heads: dict[str, Head] = {}
    for task, (own, differing) in own_text_towers(state, vision, given).items():
        with text_tower_folder(path, given[task], own) as folder:
            head = row.heads(folder, {task: tasks[task]}, {})[task]
        heads[task] = replace(head, own_tower=True)
        warnings.warn(
            f"expert {task!r} has a text tower of its own ({shortlist(differing, 3)}): the head of its task "
            "is made with it, for the expert and for every merged model.",
            AdamergeWarning,
            stacklevel=3,
        )
    return heads


def _require_classes(task: str, head: Head) -> None:
    """Refuse the head of a regression or reward model: the probability of its one class is always 1."""
    if len(head.weight) < 2:
        raise InputError(
            f"the head of task {task!r} has {len(head.weight)} output: regression and reward models have no "
            "classes.",
            "Learning and accuracy need two or more; `adamerge merge` merges the weights of any model.",
        )


def _require_finite(task: str, head: Head) -> None:
    """Refuse a head whose logits would be no numbers: accuracy and loss would be of nothing."""
    bad = [name for name, tensor in head.tensors.items() if not tensor.isfinite().all()]
    if bad:
        raise InputError(
            f"the head of task {task!r} has values that are not finite: {shortlist(bad)}.",
            "Give another head file, or the expert as it was before its training diverged.",
        )


def require_fitting_heads(backbone: Backbone, state: State, heads: Mapping[str, Head]) -> None:
    """Compare what heads read with the backbone's features, by one input.

    Args:
        backbone: The backbone.
        state: Weights of any model that it reads.
        heads: The heads by task.

    Raises:
        InputError: A head reads features of another size.
    """
    probe = probe_of(backbone)
    if probe is None:
        return
    with torch.no_grad():
        features = backbone.features({name: state[name].float() for name in backbone.names}, probe)
        for head in heads.values():
            head.logits(features)


def probe_of(backbone: Backbone) -> torch.Tensor | None:
    """Return one prepared input of a backbone that prepares images or texts itself, else None."""
    if not getattr(backbone, "transform_key", ""):
        return None
    is_text = getattr(backbone, "modality", "image") == "text"
    return backbone.preprocess("a" if is_text else Image.new("RGB", (48, 48)))[None]


def own_classifiers(base: Path, experts: Mapping[str, Path]) -> tuple[dict[str, Head], dict[str, str]]:
    """Return the heads of experts that bring classifiers of their own, of whole images or texts.

    Args:
        base: The base, or a merged folder: it says of what format all are.
        experts: The experts by task name.

    Returns:
        The heads by task; and for the tasks that have none, why.
    """
    heads: dict[str, Head] = {}
    reasons: dict[str, str] = {}
    for task, path in experts.items():
        try:
            heads |= format_of(base).heads(base, {task: TaskSpec()}, {task: path})
        except InputError as error:
            reasons[task] = str(error).partition("\n")[0]
    return heads, reasons


def reads_classifiers(
    base: str | Path, experts: Mapping[str, str | Path], tasks: Mapping[str, TaskSpec] | None = None
) -> bool:
    """Return whether `open_backbone` of a base is to be asked for features of classifiers.

    Args:
        base: The base, as for `open_backbone`.
        experts: The experts by task name.
        tasks: The tasks' rows, where they are known: a head file in one may decide.

    Raises:
        InputError: The heads of the tasks read different features.
    """
    path = locate(str(base), "base")
    row = _recognised(path)
    paths = {task: locate(str(expert), f"expert {task!r}") for task, expert in experts.items()}
    return row is not None and row.expects_classifiers(path, paths, tasks)


def zero_shot_heads(path: str | Path, tasks: Mapping[str, TaskSpec]) -> dict[str, Head]:
    """Give every task's head where experts bring none: see `open_heads`."""
    return open_heads(path, tasks)


def require_same_function(base: Path, experts: Mapping[str, Path], *, force: bool = False) -> None:
    """Compare what weights do not tell: activation, architecture, preprocessing, across formats.

    Experts that are plain files, or folders without configuration, are not judged.

    Args:
        base: The base.
        experts: The experts by task name.
        force: Warn of differences instead of refusing them.

    Raises:
        DifferenceError: A setting differs, which is named with both values.
        InputError: A file is damaged.
    """
    row = _recognised(base)
    for compare in (_require_same_activation, row.compare if row else require_same_transformers):
        try:
            compare(base, experts)
        except DifferenceError as error:
            if not force:
                raise
            for line in str(error).splitlines()[:-1]:
                said = f"{line} By force, the base's setting stands."
                warnings.warn(said, AdamergeWarning, stacklevel=2)


def _require_same_activation(base: Path, experts: Mapping[str, Path]) -> None:
    ours = activation_of(base)
    for task, expert in experts.items():
        theirs = activation_of(expert)
        if ours and theirs and ours != theirs:
            raise DifferenceError([f"activation differs: base {ours}, expert {task!r} {theirs}."])


def activation_of(path: Path) -> str | None:
    """Tell the activation that a model folder declares; None where nothing is declared."""
    row = _recognised(path)
    return row and row.activation(path)


def format_of(path: Path) -> Format:
    """Recognise a model folder.

    Raises:
        InputError: It is in no known format.
    """
    row = _recognised(path)
    if row is None:
        require_no_code(path)
        holds = shortlist(sorted(p.name for p in path.iterdir())) if path.is_dir() else ""
        raise InputError(
            f"{path} is no model folder of a known format ({', '.join(row.name for row in FORMATS)})"
            + (f"; it holds: {holds}." if holds else "."),
            "Give the folder with the model's configuration, or open_clip:ARCHITECTURE=FILE.",
        )
    return row


def _recognised(path: Path) -> Format | None:
    return next((row for row in FORMATS if row.recognise(path)), None)
