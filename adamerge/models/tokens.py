"""Texts as tensors of tokens, and the encoders that read them."""

import hashlib
import inspect
import json
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional

from adamerge.errors import InputError
from adamerge.models.libraries import transformers_tokenizer

_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.txt", "vocab.json")
_MODULES = "modules.json"  # what sentence-transformers folders consist of
_WAYS = {
    "cls": "pooling_mode_cls_token",
    "mean": "pooling_mode_mean_tokens",
    "max": "pooling_mode_max_tokens",
}
_ALWAYS = ("input_ids", "attention_mask")
Pool = Callable[[Any, Tensor], Tensor]


class Texts:
    """From a text to its tokens, ``[field, token]`` int64, cut or padded to one length.

    Attributes:
        fields: The rows: input_ids, attention_mask, and what else the tokenizer gives.
        key: A JSON text that names tokenizer, length and truncation.

    Args:
        tokenizer: A tokenizer of transformers.
        length: Tokens of every text.
        accepted: What the model takes; other fields are left out.
    """

    def __init__(self, tokenizer: Any, length: int, accepted: Collection[str]) -> None:
        import transformers

        more = [n for n in tokenizer.model_input_names if n not in _ALWAYS and n in accepted]
        self.fields = (*_ALWAYS, *more)
        backend = getattr(tokenizer, "backend_tokenizer", None)
        content = backend.to_str() if backend else json.dumps(tokenizer.get_vocab(), sort_keys=True)
        facts = {"library": f"transformers {transformers.__version__}", "tokenizer": type(tokenizer).__name__}
        facts |= {"digest": hashlib.sha256(content.encode()).hexdigest(), "fields": self.fields}
        self.key = json.dumps(facts | {"max_length": length, "truncation": True}, sort_keys=True)
        self._tokenizer, self._length = tokenizer, length

    def __call__(self, text: str) -> Int64[Tensor, "field token"]:
        """Tokenise one text.

        Raises:
            ValueError: This is no text.
        """
        if not isinstance(text, str):
            raise ValueError("no text")
        found = self._tokenizer(
            text,
            truncation=True,
            max_length=self._length,
            padding="max_length",
            return_attention_mask=True,
        )
        return torch.tensor([found[field] for field in self.fields])


class TextModel(nn.Module):
    """An encoder of texts that takes its fields as one tensor.

    Args:
        model: A model of transformers.
        fields: What the rows of an input are.
        pool: From the model's output and the attention mask to features.
    """

    def __init__(self, model: nn.Module, fields: Sequence[str], pool: Pool) -> None:
        super().__init__()
        self.model, self.fields, self.pool = model, tuple(fields), pool

    def forward(self, tokens: Int64[Tensor, "text field token"]) -> Float[Tensor, "text dim"]:
        """Encode texts; columns at the end that no text of the batch reaches are left out."""
        used = tokens[:, self.fields.index("attention_mask")].amax(0).nonzero()
        tokens = tokens[:, :, : int(used.max()) + 1 if len(used) else 1]
        values = dict(zip(self.fields, tokens.unbind(1), strict=True))
        return self.pool(self.model(**values), values["attention_mask"])


def read_tokenizer(path: Path, model: Any, length: int) -> Texts:
    """Read a folder's tokenizer, and let a model that looks for padding (GPT-2, Llama) know its token.

    Args:
        path: The folder.
        model: The model; its configuration is changed where it looks for padding.
        length: Tokens at which texts are cut, unless the model allows fewer.

    Raises:
        InputError: There is none, or it is damaged or cannot pad.
    """
    if not any((path / name).is_file() for name in _FILES):
        raise InputError(
            f"{path} has no tokenizer: none of {', '.join(_FILES)}.",
            "Save the tokenizer beside the model: tokenizer.save_pretrained(FOLDER).",
        )
    tokenizer: Any = transformers_tokenizer(path)
    _set_padding(tokenizer, model, path)
    positions = getattr(model.config, "max_position_embeddings", None) or 0
    positions = positions if positions > 0 else length  # -1, as XLNet has it, is no limit
    accepted = inspect.signature(model.forward).parameters
    return Texts(tokenizer, min(length, tokenizer.model_max_length, positions), accepted)


def _set_padding(tokenizer: Any, model: Any, path: Path) -> None:
    """Pad on the right, with a token that a model which reads the last token before the padding knows.

    What such a model gives a text does not depend on the padding token, so that one can be chosen where
    neither tokenizer nor configuration has any.

    Raises:
        InputError: There is no token to pad with.
    """
    code = getattr(inspect.unwrap(type(model).forward), "__code__", None)
    looks_for_padding = code is not None and "pad_token_id" in code.co_names
    if tokenizer.pad_token_id is None and looks_for_padding:
        own = model.config.get_text_config().pad_token_id
        tokenizer.pad_token = tokenizer.eos_token if own is None else tokenizer.convert_ids_to_tokens(own)
    if tokenizer.pad_token_id is None:
        raise InputError(
            f"the tokenizer of {path} has no padding token.", "Set pad_token, and save it again."
        )
    tokenizer.padding_side = "right"
    if looks_for_padding:
        model.config.pad_token_id = tokenizer.pad_token_id
        model.config.get_text_config().pad_token_id = tokenizer.pad_token_id


def is_sentence_encoder(path: Path) -> bool:
    """Tell whether a folder is one of sentence-transformers."""
    return (path / _MODULES).is_file()


def read_pooling(path: Path) -> Pool:
    """Read how a sentence-transformers folder makes sentence vectors.

    Raises:
        InputError: It has parts beyond pooling and normalisation, or a file is damaged.
    """
    try:
        parts = json.loads((path / _MODULES).read_text(encoding="utf-8"))
        kinds = [part["type"].rpartition(".")[2] for part in parts]
        folder = path / next(part["path"] for part in parts if part["type"].endswith(".Pooling"))
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, StopIteration) as error:
        raise InputError(f"{path / _MODULES} or its pooling is missing or damaged: {error!r}.") from error
    ways = [name for name, key in _WAYS.items() if settings.get(key)] or [settings.get("pooling_mode")]
    if len(ways) != 1 or ways[0] not in _WAYS or kinds[2:] not in ([], ["Normalize"]):
        raise InputError(
            f"{path} makes sentence vectors by {', '.join(kinds)} and pooling {ways}.",
            f"Known: Transformer, Pooling by one of {', '.join(_WAYS)}, and Normalize.",
        )
    return partial(_pooled, way=ways[0], normalize="Normalize" in kinds)


def _pooled(output: Any, mask: Int64[Tensor, "text token"], *, way: str, normalize: bool) -> Tensor:
    tokens, own = output.last_hidden_state, mask[..., None].bool()
    if way == "cls":
        vectors = tokens[:, 0]
    elif way == "max":
        vectors = tokens.masked_fill(~own, -torch.inf).amax(1)
    else:
        vectors = (tokens * own).sum(1) / own.sum(1).clamp(min=1)
    return functional.normalize(vectors, dim=-1) if normalize else vectors
