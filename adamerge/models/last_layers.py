"""Last layers of classifiers: which tensors' rows are classes, and whether all models mean the same."""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch

from adamerge.checkpoints.classes import class_names
from adamerge.checkpoints.configs import read_settings
from adamerge.checkpoints.layout import weight_file
from adamerge.errors import InputError, shortlist
from adamerge.models.libraries import timm_model

_N_LABELS = 1009  # a number that no other size of a model is likely to have
_WITH_CLASSES = re.compile(r"\w+For\w*(Classification|Segmentation|Detection)\w*")
_OF_WHOLE_INPUTS = re.compile(r"\w+For(Sequence|Image)Classification\w*")
_IRRELEVANT = re.compile(
    r"_.*|id2label|label2id|num_labels|transformers_version|(torch_)?dtype|problem_type"
    r"|auto_map|attn_implementation|quantization_config"
)
_USUAL = re.compile(r"(.*\.)?(\w*classifier|score|head|classification_head)(\.\w+)?\.(weight|bias)")
_AS_IT_IS = "Rows that mean the same all the same: merge_classifier=True (--merge_classifier true)."


@dataclass(frozen=True)
class LastLayers:
    """The classifiers' last layers of a base and its experts.

    Attributes:
        names: Names of their tensors, of whatever model has them.
        difference: Why their rows cannot be merged; empty where all models name the same classes in the
            same order.
    """

    names: tuple[str, ...] = ()
    difference: str = ""

    @property
    def kept(self) -> tuple[str, ...]:
        """Names of the tensors that stay the base's."""
        return self.names if self.difference else ()

    @property
    def told(self) -> str:
        """The text that says what is not merged, and why."""
        return (
            f"the classifiers' last layers ({shortlist(self.names)}) are not merged, the base's own stay: "
            f"{self.difference}."
        )

    @property
    def hint(self) -> str:
        """What to do where the rows mean the same."""
        return _AS_IT_IS


def find_last_layers(
    base: Path | None, base_names: Collection[str], experts: Mapping[str, tuple[Path | None, Collection[str]]]
) -> LastLayers:
    """Find the last layers of classifiers, and compare what their rows mean.

    Args:
        base: The base's file or folder; None: a state in memory, of which no class is known.
        base_names: Names of its tensors.
        experts: By task, the expert's file or folder (or None), and its tensors' names, which are the base's
            where it has such tensors.

    Raises:
        InputError: A configuration is damaged, or contradicts itself.
    """
    sources = {"the base": (base, base_names)}
    sources |= {f"expert {task!r}": pair for task, pair in experts.items()}
    folders = {role: path and folder_of(path) for role, (path, _) in sources.items()}
    names = [
        name
        for role, (_, own) in sources.items()
        for folder in dict.fromkeys((folders[role], folders["the base"]))
        if folder is not None
        for name in labelled_tensors(folder, own)
    ]
    if not names:
        return LastLayers()
    classes = {role: folder and class_names(folder) for role, folder in folders.items()}
    return LastLayers(tuple(dict.fromkeys(names)), _difference(classes))


def classifies_inputs(folder: Path) -> bool:
    """Check that a folder's classifier, if it has one, is one of whole images or texts, not of parts."""
    families = read_settings(folder / "config.json").get("architectures") or ()
    parts = [str(name) for name in families if _WITH_CLASSES.fullmatch(str(name))]
    return all(_OF_WHOLE_INPUTS.fullmatch(name) for name in parts)


def labelled_tensors(folder: Path, names: Collection[str]) -> tuple[str, ...]:
    """Return those of a model's tensors whose rows are the classes that its configuration counts.

    The library is asked: what has as many rows as a configuration of the same model has labels.

    Args:
        folder: The model folder.
        names: Names of its tensors; a prefix may stand before the library's own.
    """
    rows = library_rows(folder)
    if rows is None:  # of a model that the library does not know
        return tuple(name for name in names if _USUAL.fullmatch(name))
    exact = [own for own in rows if own in names]
    shorter = [own.partition(".")[2] for own in rows if own.partition(".")[2] in names]
    longer = [name for name in names if any(name.endswith(f".{own}") for own in rows)]
    return tuple(exact or _of_one_prefix(longer, rows, names) or shorter)


def library_rows(folder: Path) -> tuple[str, ...] | None:
    """Return the library's own names of a model's tensors whose rows are classes.

    Returns:
        The names; None where the configuration says that there are some, and no library can build it.
    """
    settings = read_settings(folder / "config.json")
    if isinstance(settings.get("architecture"), str):
        return _timm_rows(folder)
    return _transformers_rows(json.dumps(_relevant(settings), sort_keys=True))


def _of_one_prefix(longer: Sequence[str], rows: Collection[str], names: Collection[str]) -> list[str]:
    """Return the names below the one prefix that most of a model's tensors share."""
    prefixes = {name.removesuffix(own) for name in longer for own in rows if name.endswith(f".{own}")}
    best = max(prefixes, key=lambda prefix: sum(name.startswith(prefix) for name in names), default="")
    return [name for name in longer if name.removeprefix(best) in rows]


def _relevant(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return what decides on a model's layers, without what names classes, dtypes, code or kernels."""
    kept = {key: value for key, value in settings.items() if not _IRRELEVANT.fullmatch(key)}
    return {key: _relevant(value) if isinstance(value, dict) else value for key, value in kept.items()}


@lru_cache(maxsize=32)
def _transformers_rows(configuration: str) -> tuple[str, ...] | None:
    """Name the tensors of a transformers model whose size follows the number of labels.

    Returns:
        The names; None where the configuration says that there are some, and the library cannot build it.
    """
    settings = json.loads(configuration)
    families = [name for name in settings.get("architectures") or () if _WITH_CLASSES.fullmatch(str(name))]
    if not families and (settings.get("architectures") or "model_type" not in settings):
        return ()
    import transformers
    from transformers.models.auto import modeling_auto
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = settings.get("model_type")
    for task in () if families else ("SEQUENCE", "IMAGE"):  # a configuration without a class of its own
        family = getattr(modeling_auto, f"MODEL_FOR_{task}_CLASSIFICATION_MAPPING_NAMES").get(kind)
        families += [family] if isinstance(family, str) else []
    if not families:
        return ()
    try:
        config: Any = CONFIG_MAPPING[kind].from_dict(settings)
        config.num_labels = _N_LABELS
        with torch.device("meta"):
            model = getattr(transformers, families[0])(config)
    except Exception:  # whatever the library stumbles over is told where the model is needed
        return None
    return _rows_in(model)


def _timm_rows(folder: Path) -> tuple[str, ...] | None:
    """Name the tensors of a timm model whose size follows the number of classes; None of an unknown one."""
    for device in ("meta", "cpu"):  # some models compute on values while they are made
        with suppress(InputError, NotImplementedError), torch.device(device):
            return _rows_in(timm_model(folder, num_classes=_N_LABELS))
    return None


def _rows_in(model: Any) -> tuple[str, ...]:
    sizes = (_N_LABELS, _N_LABELS + 1)  # detectors have a class more: nothing
    return tuple(n for n, t in model.state_dict().items() if t.dim() > 0 and t.shape[0] in sizes)


def folder_of(path: Path) -> Path | None:
    """Return the folder whose configuration a path has: itself, or the one around a whole model."""
    if path.is_dir():
        return path
    return path.parent if path.parent.is_dir() and weight_file(path.parent) == path else None


def _difference(classes: Mapping[str, tuple[str, ...] | None]) -> str:
    """Say why rows of several models do not mean the same; empty where they do."""
    unknown = [role for role, names in classes.items() if names is None]
    if unknown:
        return f"no classes are named by {shortlist(unknown, 3)} (id2label, label_names)"
    (first, ours), *others = ((role, names or ()) for role, names in classes.items())
    for role, theirs in others:
        for row, (a, b) in enumerate(zip_longest(ours, theirs)):
            if a != b:
                mine, other = (f"{name!r}" if name is not None else "absent" for name in (a, b))
                return f"row {row} is {mine} in {first}, {other} in {role}"
    return ""
