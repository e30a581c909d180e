"""Hugging Face classifiers of images and texts, and sentence encoders, without their last layer."""

from collections.abc import Collection, Mapping
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adamerge.checkpoints import Checkpoint, is_adapter, open_checkpoint
from adamerge.data.tasks import TaskSpec
from adamerge.errors import InputError
from adamerge.models.base import Opener, read_object
from adamerge.models.classifiers import (
    N_CLASSES,
    ClassifierBackbone,
    Renamed,
    classifier_heads,
    cut_classifier,
    require_names,
    tensor_names,
)
from adamerge.models.heads import Head
from adamerge.models.libraries import transformers_class, transformers_config, transformers_model
from adamerge.models.processor import read_processor
from adamerge.models.tokens import TextModel, is_sentence_encoder, read_pooling, read_tokenizer
from adamerge.state import State, info

CONFIG = "config.json"


class HFEncoder(ClassifierBackbone):
    """A transformers classifier without its last linear layer; it holds no weights of its own.

    Features are what that layer reads: BERT's pooled output after tanh, the output of RoBERTa's
    ``classifier.dense`` and of DistilBERT's ``pre_classifier``. These layers are therefore merged like all
    others, and the base must have them. A sentence-transformers folder gives the pooled (and, where it
    says so, normalised) sentence vectors, and its tasks need head files.

    Args:
        path: A folder that transformers reads: an `AutoModelForSequenceClassification`, an
            `AutoModelForImageClassification`, or the bare encoder of one. Tensor names of the file may
            be older than the library's.
        names: The base's state, where the folder does not hold its weights.
        max_length: Tokens at which texts are cut, unless the model allows fewer.

    Raises:
        InputError: The model is of no such kind, its weights lack a part, or the folder has no
            preprocessing.
    """

    def __init__(self, path: str | Path, names: Collection[str] | None = None, max_length: int = 128) -> None:
        path = Path(path)
        base = names if isinstance(names, Mapping) else open_checkpoint(path, role="base")
        self.config, self.kind = _kind_of(path)
        model, found = _match(self.kind, self.config, base)
        pooling = read_pooling(path) if is_sentence_encoder(path) else None
        if pooling:
            model.pooler = None  # sentence vectors are made of the tokens' own
        classifier = "" if pooling else cut_classifier(model, path)
        require_names(found, tensor_names(model), path)
        self.modules = {name: found[name] for name in tensor_names(model)}
        if self.kind.__name__ == "AutoModelForImageClassification":
            transform = read_processor(path)._asdict()
            super().__init__(model, self.modules, classifier, pool=attrgetter("logits"), **transform)
            return
        texts = read_tokenizer(path, self.config, max_length)
        module = TextModel(model, texts.fields, pooling or _logits)
        files = {f"model.{name}": file for name, file in self.modules.items()}
        super().__init__(
            module, files, classifier, modality="text", preprocess=texts, transform_key=texts.key
        )

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
        _, found = _match(self.kind, self.config, state)
        theirs = {file: found[name] for name, file in self.modules.items() if name in found}
        theirs |= self.classifier_in(state)
        return state.renamed(theirs) if isinstance(state, Checkpoint) else Renamed(state, theirs)

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
    kind = read_object(path / CONFIG).get("model_type")
    return kind is not None and kind in {*_names("Image"), *_names("Sequence")}


def hf_encoder_heads(
    path: Path, tasks: Mapping[str, TaskSpec], experts: Mapping[str, Path]
) -> dict[str, Head]:
    """Give the tasks' heads: their experts' own classifiers."""
    return classifier_heads(HFEncoder(path), open_checkpoint(path, role="base"), tasks, experts)


def _kind_of(path: Path) -> tuple[Any, Any]:
    """Read a folder's configuration, and choose the transformers class that makes models of it."""
    import transformers

    config: Any = transformers_config(path)
    config.num_labels = N_CLASSES
    if is_sentence_encoder(path):
        return config, transformers.AutoModel
    if config.model_type in _names("Sequence"):
        return config, transformers.AutoModelForSequenceClassification
    return config, transformers.AutoModelForImageClassification


def _logits(output: Any, _mask: Tensor) -> Tensor:
    return output.logits


def _names(kind: str) -> Mapping[str, object]:
    from transformers.models.auto import modeling_auto

    return getattr(modeling_auto, f"MODEL_FOR_{kind.upper()}_CLASSIFICATION_MAPPING_NAMES")


def _match(kind: Any, config: Any, state: State) -> tuple[Any, dict[str, str]]:
    """Let transformers load numbers in place of tensors: where each arrives tells which tensor is which.

    Files of other versions have other names, prefixes come and go, and only the library knows them all.

    Returns:
        The model, without the values of the state, and from its tensors to the state's names.
    """
    names = list(state)
    numbers = {n: torch.tensor(float(i)).expand(info(state, n).shape) for i, n in enumerate(names)}
    model, report = transformers_model(transformers_class(kind, config), config, numbers)
    lost = {*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])}
    arrived = {n: t for n, t in model.state_dict().items() if n not in lost and t.is_floating_point()}
    whole = {n: t for n, t in arrived.items() if not any(t.stride()) or t.numel() == 1}  # still one number
    return model, {name: names[int(tensor.flatten()[0])] for name, tensor in whole.items()}
