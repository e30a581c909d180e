"""Hugging Face classifiers of images and texts, and sentence encoders, without their last layer."""

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adamerge.checkpoints import (
    Checkpoint,
    is_adapter,
    open_adapter,
    open_checkpoint,
    transformer_folder,
)
from adamerge.checkpoints.layout import ADAPTER_CONFIG
from adamerge.checkpoints.lora import WEIGHTS as ADAPTER_WEIGHTS
from adamerge.data.tasks import TaskSpec
from adamerge.documents import read_object
from adamerge.errors import InputError, shortlist
from adamerge.models.base import Opener
from adamerge.models.classifiers import (
    N_CLASSES,
    ClassifierBackbone,
    Renamed,
    classifier_heads,
    cut_classifier,
    require_names,
    tensor_names,
)
from adamerge.models.heads import LAYERS, Head
from adamerge.models.libraries import transformers_class, transformers_config
from adamerge.models.own_layers import OwnLayers, OwnModel, split_own_layers
from adamerge.models.processor import read_processor
from adamerge.models.tokens import TextModel, is_sentence_encoder, read_pooling, read_tokenizer
from adamerge.models.transformers_names import match_tensors
from adamerge.models.unread import require_all_read
from adamerge.state import State

CONFIG = "config.json"


class HFEncoder(ClassifierBackbone):
    """A transformers classifier without its last linear layer; it holds no weights of its own.

    Features are what that layer reads: BERT's pooled output after tanh, the output of RoBERTa's
    ``classifier.dense`` and of DistilBERT's ``pre_classifier``. Where the base has these layers they are
    merged like all others. Where it has none (a masked language model, an encoder without pooler), features
    are what the first of them reads, and they are part of each expert's own head.

    A sentence-transformers folder gives the pooled (and, where it says so, normalised) sentence vectors, and
    its tasks need head files; or it is the encoder of classifiers, like any other.

    Args:
        path: A folder that transformers reads: an `AutoModelForSequenceClassification`, an
            `AutoModelForImageClassification`, or the bare encoder of one. Tensor names of the file may
            be older than the library's.
        names: The base's state, where the folder does not hold its weights.
        max_length: Tokens at which texts are cut; default: the model's own length.
        classifiers: Whether experts are classifiers where the folder is one of sentence-transformers.

    Raises:
        InputError: The model is of no such kind, its weights lack a part, or the folder has no
            preprocessing.
    """

    def __init__(
        self,
        path: str | Path,
        names: Collection[str] | None = None,
        max_length: int | None = None,
        *,
        classifiers: bool = False,
    ) -> None:
        path = Path(path)
        sentences = is_sentence_encoder(path) and not classifiers
        base = names if isinstance(names, Mapping) else open_checkpoint(path, role="base")
        self.config, self.kind = _kind_of(path, sentences)
        model, found, joined = match_names(self.kind, self.config, base)
        pooling = read_pooling(path) if sentences else None
        if pooling:
            model.pooler = None  # sentence vectors are made of the tokens' own
        classifier = "" if pooling else cut_classifier(model, path)
        require_whole([name for name in tensor_names(model) if name in joined], path)
        is_image = self.kind.__name__ == "AutoModelForImageClassification"
        upto, own_model = self._split(model, found, is_image=is_image) if classifier else (model, None)
        require_names(found, tensor_names(model), path)
        self.modules = {name: found[name] for name in tensor_names(model)}
        prefix = "" if own_model is None else "model."
        files = {f"{prefix}{name}": file for name, file in self.modules.items()}
        if is_image:
            transform = read_processor(path, getattr(self.config, "num_channels", 3))._asdict()
            super().__init__(
                upto, files, classifier, pool=_logits if own_model is None else _features, **transform
            )
        else:
            texts = read_tokenizer(transformer_folder(path), model, max_length)
            module = TextModel(upto, texts.fields, pooling or (_logits if own_model is None else _features))
            files = {f"model.{name}": file for name, file in files.items()}
            super().__init__(
                module, files, classifier, modality="text", preprocess=texts, transform_key=texts.key
            )
        self._own(own_model)
        self.ignored = tuple(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())

    def expert(self, path: Path, role: str, base: State, opener: Opener) -> State:
        """Open an expert whose names may be of another version of transformers, or have another prefix."""
        try:
            state = super().expert(path, role, base, opener)
        except InputError as error:
            state = self._adapter(path, role, base, opener)
            if state is None:
                raise error
        if all(name in state for name in self.names):
            return state
        found = match_names(self.kind, self.config, state)[1]
        theirs = {file: found[name] for name, file in self.modules.items() if name in found}
        theirs |= self.classifier_in(state)
        require_all_read([*found.values(), *theirs.values()], state, path, role, self.ignored)
        return state.renamed(theirs) if isinstance(state, Checkpoint) else Renamed(state, theirs)

    def opened(
        self, experts: Mapping[str, Path], base: State, opener: Opener
    ) -> tuple[dict[str, State], list[str], tuple[str, ...]]:
        """Open experts, and name the tensors that only the base has, and those that only the experts have."""
        states = {t: self.expert(path, f"expert {t!r}", base, opener) for t, path in experts.items()}
        read = set(self.names)
        return states, [name for name in base if name not in read], self.unmerged

    def head(self, path: Path, role: str, base: State) -> Head:
        """Read an expert's own classifier, with the layers before it that the base lacks.

        Raises:
            InputError: It has no classifier, or lacks one of these layers.
        """
        head = super().head(path, role, base)
        if self.own_model is None:
            return head
        if is_adapter(path):
            named = {name: base[file] for name, file in self.modules.items()}
            state: State = open_adapter(path, self._as_trained(path, named), role=role)
            names = {name: name for name in self.own_model.names if name in state}
        else:
            state = open_checkpoint(path, role=role)
            names = match_names(self.kind, self.config, state)[1]
        lacking = [name for name in self.own_model.names if name not in names]
        if lacking:
            raise InputError(
                f"{role} ({path}) lacks {len(lacking)} tensors of its classifier: {shortlist(lacking)}.",
                "The base has none of these, so every expert must bring its own: save the whole classifier "
                "(PEFT: list these modules in modules_to_save).",
            )
        own = {name: names[name] for name in self.own_model.names}
        tensors = {name: state[file].float() for name, file in own.items()}
        files = {**head.names, **{f"{LAYERS}{name}": file for name, file in own.items()}}
        return replace(head, layers=OwnLayers(self.own_model, tensors), names=files)

    def _split(
        self, model: Any, found: Mapping[str, str], *, is_image: bool
    ) -> tuple[nn.Module, OwnModel | None]:
        """Part the model where the base's tensors end, if some are missing that each expert can bring."""
        missing = [name for name in tensor_names(model) if name not in found]
        parts = split_own_layers(model, missing, _probe(self.config, is_image)) if missing else None
        return parts or (model, None)

    def _own(self, own_model: OwnModel | None) -> None:
        """Leave the experts' own layers out of every merge, under each name that they may have."""
        self.own_model = own_model
        if own_model is not None:
            prefix = f"{own_model.model.base_model_prefix}."
            names = [name.removeprefix(cut) for name in own_model.names for cut in ("", prefix)]
            self.unmerged = (*self.unmerged, *dict.fromkeys(names))

    def _adapter(self, path: Path, role: str, base: State, opener: Opener) -> State | None:
        """Open a PEFT folder that names tensors as the library does now, where files have older names."""
        if not is_adapter(path):
            return None
        ours = {file: name for name, file in self.modules.items()}
        named = {ours.get(name, name): tensor for name, tensor in self._as_trained(path, base).items()}
        try:
            return Renamed(opener(path, role, named), ours)
        except InputError:
            return None


def is_hf_encoder(path: Path) -> bool:
    """Tell whether a folder is one of transformers' with an encoder of images or texts."""
    kind = read_object(transformer_folder(path) / CONFIG).get("model_type")
    return kind is not None and kind in {*_names("Image"), *_names("Sequence")}


def hf_encoder_heads(
    path: Path, tasks: Mapping[str, TaskSpec], experts: Mapping[str, Path]
) -> dict[str, Head]:
    """Give the tasks' heads: their experts' own classifiers."""
    backbone = HFEncoder(path, classifiers=expects_classifiers(path, experts, tasks))
    return classifier_heads(backbone, open_checkpoint(path, role="base"), tasks, experts)


def expects_classifiers(
    path: Path, experts: Mapping[str, Path], tasks: Mapping[str, TaskSpec] | None = None
) -> bool:
    """Return whether a sentence-transformers folder is the encoder of classifiers rather than of sentences.

    Args:
        path: The base's folder.
        experts: The experts' paths by task.
        tasks: The tasks' rows: one with a head file reads sentence vectors.

    Raises:
        InputError: Some tasks bring head files and others classifiers, which read different features.
    """
    if not is_sentence_encoder(path) or not is_hf_encoder(path):
        return False
    filed = [task for task in experts if tasks and task in tasks and tasks[task].head]
    rest = {task: expert for task, expert in experts.items() if task not in filed}
    if not rest:
        return False
    backbone = HFEncoder(path, classifiers=True)
    own = [task for task, expert in rest.items() if _holds_classifier(backbone, expert)]
    if own and filed:
        raise InputError(
            f"task {filed[0]!r} has a head file, which reads sentence vectors of {path}, and task {own[0]!r} "
            "the classifier of its expert, which reads other features.",
            "Give head files for all tasks, or for none.",
        )
    return bool(own)


def headless_base(path: Path, experts: Mapping[str, Path]) -> HFEncoder | None:
    """Return the backbone of a base that lacks layers of its experts' classifiers; None of any other base.

    A merge of files asks for no tokenizer and no image processor: where they are missing, no backbone can be
    made, and names and shapes alone tell what base and experts share.

    Args:
        path: The base's folder.
        experts: The experts' paths by task.
    """
    if not path.is_dir() or not is_hf_encoder(path) or _is_classifier(path):
        return None
    if not any(map(_is_classifier, experts.values())):
        return None
    try:
        backbone = HFEncoder(path, classifiers=True)
    except InputError:
        return None
    return None if backbone.own_model is None else backbone


def _is_classifier(path: Path) -> bool:
    """Return whether a folder's configuration is one of a classifier of whole inputs, or of LoRA on one."""
    if is_adapter(path):
        return read_object(path / ADAPTER_CONFIG).get("task_type") == "SEQ_CLS"
    families = read_object(transformer_folder(path) / CONFIG).get("architectures") or ()
    return any(
        str(name).endswith(("ForSequenceClassification", "ForImageClassification")) for name in families
    )


def _holds_classifier(backbone: HFEncoder, expert: Path) -> bool:
    file = expert / ADAPTER_WEIGHTS if is_adapter(expert) else expert
    return file.exists() and bool(backbone.classifier_in(open_checkpoint(file)))


def _kind_of(path: Path, sentences: bool) -> tuple[Any, Any]:
    """Read a folder's configuration, and choose the transformers class that makes models of it."""
    import transformers

    config: Any = transformers_config(transformer_folder(path))
    config.num_labels = N_CLASSES
    if sentences:
        return config, transformers.AutoModel
    if _classifies(config, "Image") or config.model_type not in _names("Sequence"):
        return config, transformers.AutoModelForImageClassification
    return config, transformers.AutoModelForSequenceClassification


def _classifies(config: Any, kind: str) -> bool:
    """Return whether a configuration names a classifier of images, or of texts ("Sequence")."""
    classes = _names(kind).get(config.model_type, ())
    classes = (classes,) if isinstance(classes, str) else classes
    return bool({*classes} & {*(config.architectures or ())})


def _logits(output: Any, _mask: Tensor | None = None) -> Tensor:
    """Return a classifier's logits, which PP-LCNet calls otherwise."""
    logits = output.logits if "logits" in output else output[0]
    if logits.dim() != 2:
        raise InputError(f"{type(output).__name__} has no logits, but {', '.join(output)}.")
    return logits


def _features(output: Tensor, _mask: Tensor | None = None) -> Tensor:
    return output


def _probe(config: Any, is_image: bool) -> dict[str, Tensor]:
    """Make two small inputs of a model."""
    if is_image:
        size = getattr(config, "image_size", None) or 224
        height, width = size if isinstance(size, list | tuple) else (size, size)
        return {"pixel_values": torch.zeros(2, getattr(config, "num_channels", 3), height, width)}
    tokens = torch.ones(2, 3, dtype=torch.int64)
    if isinstance(getattr(config, "eos_token_id", None), int):
        tokens[:, -1] = config.eos_token_id  # where some decoders look for it
    return {"input_ids": tokens}


def _names(kind: str) -> Mapping[str, str | tuple[str, ...]]:
    from transformers.models.auto import modeling_auto

    return getattr(modeling_auto, f"MODEL_FOR_{kind.upper()}_CLASSIFICATION_MAPPING_NAMES")


def match_names(kind: Any, config: Any, state: State) -> tuple[Any, dict[str, str], set[str]]:
    """Let transformers load numbers in place of tensors: where each arrives tells which tensor is which.

    Files of other versions have other names, prefixes come and go, and only the library knows them all.
    Integers (tables of positions, counters) are loaded as they are, for they decide what a model computes.

    Returns:
        The model, without the floats of the state; from its tensors to the state's names; and which of its
        tensors the library joins or splits tensors for.
    """
    return match_tensors(transformers_class(kind, config), config, state)


def require_whole(joined: Collection[str], source: Path) -> None:
    """Check that each of a model's tensors is one of its file's.

    Raises:
        InputError: Some are joined or split.
    """
    if joined:
        raise InputError(
            f"{source}: transformers joins or splits the file's tensors for {len(joined)} of the model's: "
            f"{shortlist(sorted(joined), 2)}.",
            "Such a model (a mixture of experts, or fused layers) can be merged by `adamerge merge` alone.",
        )
