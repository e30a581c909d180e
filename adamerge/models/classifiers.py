"""Networks whose last linear layer is each expert's own classifier; all that is before it is the backbone."""

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from adamerge.checkpoints import is_adapter, open_adapter, open_checkpoint
from adamerge.checkpoints.classes import class_names
from adamerge.checkpoints.lora import WEIGHTS
from adamerge.data.tasks import TaskSpec
from adamerge.documents import read_object
from adamerge.errors import InputError, shortlist
from adamerge.models.base import ModuleBackbone, Opener
from adamerge.models.heads import Head
from adamerge.models.last_layers import classifies_inputs
from adamerge.state import State, TensorInfo, info

_NOT_ONE_CLASS = ("multi_label_classification", "regression")  # transformers sets it while it trains
N_CLASSES = 1009  # of a classifier that no other layer can be taken for: nobody has so many features


def _kind_of(path: Path) -> str:
    """Return a clause that says which class of transformers a folder was saved from, where it does."""
    kinds = read_object(path / "config.json").get("architectures") if path.is_dir() else None
    return f": it is a {kinds[0]}" if isinstance(kinds, list) and kinds else ""


def _require_one_class(path: Path, role: str) -> None:
    """Refuse a classifier that was trained to give several labels at once, or numbers."""
    problem = read_object(path / "config.json").get("problem_type") if path.is_dir() else None
    if problem in _NOT_ONE_CLASS:
        raise InputError(
            f"{role} ({path}) was trained for {problem} (problem_type in config.json): of its rows, several "
            "or none may be right.",
            "Learning, accuracy and predictions need classes of which one is right; `adamerge merge` merges "
            "any weights.",
        )


class ClassifierBackbone(ModuleBackbone):
    """A classification network without its last linear layer.

    Args:
        module: From a batch of inputs to what the last layer reads. It is left without values.
        files: From the module's tensors to the names that they have in the base's file.
        classifier: Name of the last layer in classification models of this kind; "" where experts have none.
        modality: "image" or "text".
        options: Preprocessing and more, as `ModuleBackbone` takes it.
    """

    def __init__(
        self,
        module: nn.Module,
        files: Mapping[str, str],
        classifier: str,
        *,
        modality: str = "image",
        **options: Any,
    ) -> None:
        super().__init__(hollow(module), **options)
        self._hold(self.module, files)
        self.classifier, self.modality = classifier, modality
        self.classifier_names = tuple(f"{classifier}.{leaf}" for leaf in ("weight", "bias") if classifier)
        self.unmerged = self.classifier_names

    @property
    def names(self) -> tuple[str, ...]:
        """Names, in the base's file, of what `features` reads."""
        return tuple(dict.fromkeys(self.files.values()))

    def expert(self, path: Path, role: str, base: State, opener: Opener) -> State:
        """Open an expert; a PEFT folder may hold a classifier of its own shape."""
        return opener(path, role, self._as_trained(path, base))

    def _as_trained(self, path: Path, base: State) -> State:
        """Give a state that a PEFT folder fits: the base, with a classifier of the shape that is saved."""
        if not (is_adapter(path) and (path / WEIGHTS).is_file()):
            return base
        saved = open_checkpoint(path / WEIGHTS)
        own = {n: key for n in self.unmerged if n not in base for key in saved if key.endswith(f".{n}")}
        own |= {n: key for n in self.classifier_names for key in saved if key.endswith(f".{n}")}
        return {**base, **{name: torch.zeros(saved.info(key).shape) for name, key in own.items()}}

    def head(self, path: Path, role: str, base: State) -> Head:
        """Read an expert's own classifier.

        Raises:
            InputError: It has none, or one whose rows are no such classes that one is right.
        """
        _require_one_class(path, role)

        def plain(path: Path, role: str, base: State) -> State:
            if is_adapter(path):
                return open_adapter(path, base, role=role)
            return open_checkpoint(path, role=role)

        state = self.expert(path, role, base, plain)
        found = self.classifier_in(state)
        weight, bias = (found.get(name, "") for name in self.classifier_names or ("", ""))
        if not weight or len(info(state, weight).shape) != 2:
            layer = self.classifier or "beside its encoder"
            raise InputError(
                f"{role} ({path}) has no classifier {layer}{_kind_of(path)}.",
                "Give a file with `weight [class, dim]` as `head` of the task; learning needs classes. "
                "`adamerge merge` merges any weights, language models too.",
            )
        names = {"weight": weight} | ({"bias": bias} if bias else {})
        tensors = state[weight].float(), state[bias].float() if bias else None
        facts: dict[str, Any] = {
            "role": f"{role} ({path})",
            "names": names,
            "classes": class_names(path) or (),
        }
        return Head(*tensors, normalize=False, **facts)

    def classifier_in(self, state: State) -> dict[str, str]:
        """Give a state's own names of the classifier's tensors, before which a prefix may stand."""
        return {n: own for n in self.classifier_names for own in state if own == n or own.endswith(f".{n}")}


def has_own_classifiers(backbone: object) -> TypeGuard[ClassifierBackbone]:
    """Return whether a backbone's experts bring classifiers of the library, each its own last layer."""
    return isinstance(backbone, ClassifierBackbone) and bool(backbone.classifier)


def classifier_heads(
    backbone: ClassifierBackbone, base: State, tasks: Mapping[str, TaskSpec], experts: Mapping[str, Path]
) -> dict[str, Head]:
    """Give the tasks' heads: their experts' own classifiers.

    Raises:
        InputError: A task has no expert, or its expert no classifier.
    """
    without = [task for task in tasks if task not in experts]
    if without:
        raise InputError(
            f"tasks {without} have neither an expert nor a head file.", "Set `head` of these tasks."
        )
    for task in tasks:
        if experts[task].is_dir() and not classifies_inputs(experts[task]):
            raise InputError(
                f"expert {task!r} ({experts[task]}) classifies parts of inputs, such as tokens or pixels.",
                "Heads classify whole images or texts. Such models are merged by `adamerge merge`.",
            )
    return {task: backbone.head(experts[task], f"expert {task!r}", base) for task in tasks}


def cut_classifier(model: nn.Module, source: Path) -> str:
    """Take the layer with `N_CLASSES` outputs off a model, which gives features from then on.

    Returns:
        Its name.

    Raises:
        InputError: There is no such linear layer, or more than one.
    """
    found = [n for n, layer in model.named_modules() if getattr(layer, "out_features", 0) == N_CLASSES]
    if len(found) != 1 or not isinstance(model.get_submodule(found[0]), nn.Linear):
        raise InputError(
            f"{source}: {type(model).__name__} has {len(found)} linear classifiers ({shortlist(found)}).",
            "Models with exactly one last linear layer can be used.",
        )
    model.set_submodule(found[0], nn.Identity())
    return found[0]


class Renamed(Mapping[str, Tensor]):
    """A state under other names; what has no new name keeps its own.

    Args:
        state: The state.
        names: From new names to the state's own.
    """

    def __init__(self, state: State, names: Mapping[str, str]) -> None:
        old = set(names.values())
        self._state, self._names = state, {**names, **{n: n for n in state if n not in old}}
        for part in ("root", "file_digest"):  # what messages and reports ask of a state in files
            if hasattr(state, part):
                setattr(self, part, getattr(state, part))

    def __getitem__(self, name: str) -> Tensor:
        return self._state[self._names[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def info(self, name: str) -> TensorInfo:
        """Give the shape and dtype of a tensor without reading its values."""
        return info(self._state, self._names[name])


def require_names(files: Mapping[str, str], needed: Collection[str], source: Path) -> None:
    """Check that the base's weights have all that a module needs.

    Raises:
        InputError: Some are missing.
    """
    missing = [name for name in needed if name not in files]
    if missing:
        raise InputError(
            f"the weights in {source} lack {len(missing)} tensors of the model: {shortlist(missing)}.",
            "All but the last layer is merged: give the base with which the experts' training began.",
        )


def tensor_names(module: nn.Module) -> list[str]:
    """Name a module's parameters and those floating buffers that its files hold."""
    return [name for name, tensor in module.state_dict().items() if tensor.is_floating_point()]


def hollow(module: nn.Module) -> nn.Module:
    """Take the values of all that files hold out of a module; constants of its code keep theirs."""
    stored = set(tensor_names(module))
    tensors: Any
    for prefix, layer in module.named_modules():
        for tensors in (layer._parameters, layer._buffers):
            for leaf, tensor in tensors.items():
                if tensor is not None and f"{prefix}.{leaf}".lstrip(".") in stored:
                    hollow = tensor.detach().to("meta")
                    tensors[leaf] = nn.Parameter(hollow) if isinstance(tensor, nn.Parameter) else hollow
    return module
