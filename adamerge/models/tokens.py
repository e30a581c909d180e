"""Texts as tensors of tokens, and the encoders that read them."""

import hashlib
import inspect
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional

from adamerge.checkpoints import read_modules
from adamerge.checkpoints.modules import MODULES
from adamerge.documents import read_object
from adamerge.errors import InputError
from adamerge.models.libraries import transformers_tokenizer

_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.txt", "vocab.json")
_WAYS = {
    "cls": "pooling_mode_cls_token",
    "mean": "pooling_mode_mean_tokens",
    "max": "pooling_mode_max_tokens",
}
_ALWAYS = ("input_ids", "attention_mask")
_LONGEST = 8192  # tokens of a text, unless the user asks for more
_UNKNOWN = 512  # where nothing tells a length, nor positions
Pool = Callable[[Any, Tensor], Tensor]


class Length(NamedTuple):
    """Tokens that a model reads of a text.

    Attributes:
        own: Where the model's files say that texts are cut.
        most: How many it has positions for; None: any number.
    """

    own: int
    most: int | None


class Texts:
    """From a text, or a pair of texts, to its tokens ``[field, token]`` int64, cut or padded to one length.

    Attributes:
        fields: The rows: input_ids, attention_mask, and what else the tokenizer gives.
        length: Tokens at which texts are cut.
        key: A JSON text that names tokenizer, length and truncation.

    Args:
        tokenizer: A tokenizer of transformers.
        length: The model's lengths.
        accepted: Fields that the model takes; others are left out.
        max_length: Tokens at which texts are cut, in the place of the model's own length.
        lower: Whether texts are lowered first, as sentence-transformers does where its settings say so.

    Raises:
        InputError: The model has fewer positions than ``max_length``, or no token of a text is left.
    """

    def __init__(
        self,
        tokenizer: Any,
        length: Length,
        accepted: Collection[str],
        max_length: int | None = None,
        *,
        lower: bool = False,
    ) -> None:
        import transformers

        self._tokenizer, self._lengths, self._lower = tokenizer, length, lower
        self.length = length.own if max_length is None else self._checked(max_length)
        more = [n for n in tokenizer.model_input_names if n not in _ALWAYS and n in accepted]
        self.fields = (*_ALWAYS, *more)
        facts = {"library": f"transformers {transformers.__version__}", "tokenizer": type(tokenizer).__name__}
        facts |= {"digest": _digest(tokenizer), "fields": self.fields}
        if tokenizer.padding_side != "right" or tokenizer.truncation_side != "right" or lower:
            facts |= {"sides": [tokenizer.padding_side, tokenizer.truncation_side], "lower": lower}
        self.key = json.dumps(facts | {"max_length": self.length, "truncation": True}, sort_keys=True)

    def __call__(self, value: Any) -> Int64[Tensor, "field token"]:
        """Tokenise one text, or a pair.

        Raises:
            ValueError: This is no text.
        """
        options = {"truncation": True, "max_length": self.length, "padding": "max_length"}
        tokens = self._tokenizer(*self._parts(value), **options, return_attention_mask=True)
        return torch.tensor([tokens[field] for field in self.fields])

    def limited(self, max_length: int | None) -> "Texts":
        """Return the same tokenizer with another length; None: the model's own."""
        return Texts(self._tokenizer, self._lengths, self.fields, max_length, lower=self._lower)

    def n_cut(self, value: str | Sequence[str], tokens: Int64[Tensor, "field token"]) -> int:
        """Return how many tokens a text has in all where it was cut, else 0."""
        if int(tokens[1].sum()) < self.length:
            return 0
        whole = self._tokenizer(*self._parts(value), truncation=False, verbose=False)["input_ids"]
        return len(whole) if len(whole) > self.length else 0

    def shorten(self, tokens: Int64[Tensor, "field token"]) -> Int64[Tensor, "field own"]:
        """Return the tokens of a text without its padding."""
        return tokens[:, tokens[1].bool()].clone() if tokens[1].any() else tokens[:, :1].clone()

    def stack(self, texts: Sequence[Int64[Tensor, "field _own"]]) -> Int64[Tensor, "text field token"]:
        """Pad shortened texts to one length: the least power of two that holds them all, or `length`."""
        longest = max((text.shape[1] for text in texts), default=1)
        size = min(self.length, max(16, 1 << (longest - 1).bit_length()))
        whole = self._padding()[None, :, None].repeat(len(texts), 1, size)
        is_left = self._tokenizer.padding_side == "left"
        for row, text in zip(whole, texts, strict=True):
            start = size - text.shape[1] if is_left else 0
            row[:, start : start + text.shape[1]] = text
        return whole

    def _padding(self) -> Int64[Tensor, " field"]:
        ids = {"input_ids": self._tokenizer.pad_token_id, "token_type_ids": self._tokenizer.pad_token_type_id}
        return torch.tensor([ids.get(field, 0) for field in self.fields])

    def _parts(self, value: Any) -> list[str]:
        parts = [value] if isinstance(value, str) else value
        is_text = isinstance(parts, tuple | list) and 1 <= len(parts) <= 2
        if not is_text or not all(isinstance(part, str) for part in parts):
            raise ValueError("no text")
        for part in parts:
            part.encode()  # lone surrogates, which no tokenizer takes
        return [part.lower() if self._lower else part for part in parts]

    def _checked(self, max_length: int) -> int:
        special = (self._tokenizer.num_special_tokens_to_add(pair=pair) for pair in (False, True))
        least, most = max(special) + 1, self._lengths.most
        if max_length < least or (most is not None and max_length > most):
            known = f"{least} or more" if most is None else f"{least} to {most}"
            raise InputError(
                f"max_length={max_length}: this model reads {known} tokens of a text.",
                f"Leave it out for the model's own length, {self._lengths.own}.",
            )
        return max_length


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
        self._tokens = _count_of_tokens(model)

    def forward(self, tokens: Int64[Tensor, "text field token"]) -> Float[Tensor, "text dim"]:
        """Encode texts; columns at either end that no text of the batch reaches are left out.

        Raises:
            InputError: The tokenizer has tokens that the model does not know.
        """
        used = tokens[:, self.fields.index("attention_mask")].amax(0).nonzero()
        first, last = (int(used.min()), int(used.max())) if len(used) else (0, 0)
        tokens = tokens[:, :, first : last + 1]
        values = dict(zip(self.fields, tokens.unbind(1), strict=True))
        largest = int(values["input_ids"].max())
        if self._tokens is not None and largest >= self._tokens:
            raise InputError(
                f"the tokenizer gives token {largest}, the model knows the tokens 0 to {self._tokens - 1}.",
                "Use the tokenizer with which the model was trained, or resize the models' embeddings to it.",
            )
        return self.pool(self.model(**values), values["attention_mask"])


def _count_of_tokens(model: nn.Module) -> int | None:
    """Return how many tokens a model of transformers has embeddings of; None where it does not tell."""
    inner = next((part for part in model.modules() if hasattr(part, "get_input_embeddings")), None)
    try:
        return getattr(inner.get_input_embeddings(), "num_embeddings", None)  # pyright: ignore
    except (AttributeError, NotImplementedError):
        return None


def has_tokenizer(path: Path) -> bool:
    """Return whether a folder holds the files of a tokenizer."""
    return any((path / name).is_file() for name in _FILES)


def read_tokenizer(path: Path, model: Any, max_length: int | None = None) -> Texts:
    """Read a folder's tokenizer, and let a model that looks for padding (GPT-2, Llama) know its token.

    Args:
        path: The folder.
        model: The model; its configuration is changed where it looks for padding.
        max_length: See `Texts`.

    Raises:
        InputError: There is no tokenizer, it is damaged or cannot pad, or ``max_length`` does not fit.
    """
    if not has_tokenizer(path):
        raise InputError(
            f"{path} has no tokenizer: none of {', '.join(_FILES)}.",
            "Save the tokenizer beside the model: tokenizer.save_pretrained(FOLDER).",
        )
    tokenizer: Any = transformers_tokenizer(path)
    _set_padding(tokenizer, model, path)
    settings = _sentence_settings(path)
    lengths, lower = _lengths(tokenizer, settings, model), settings.get("do_lower_case") is True
    return Texts(tokenizer, lengths, inspect.signature(model.forward).parameters, max_length, lower=lower)


def write_padding(folder: Path, model: Any) -> None:
    """Let a folder's tokenizer and a model that looks for padding name one token, as `read_tokenizer` does.

    Args:
        folder: The folder of the tokenizer, which is written anew where it has no padding token.
        model: The model; its configuration is changed where it looks for padding.

    Raises:
        InputError: There is no tokenizer, or no token to pad with.
    """
    tokenizer: Any = transformers_tokenizer(folder)
    lacks_token = tokenizer.pad_token_id is None
    _set_padding(tokenizer, model, folder)
    if lacks_token:
        tokenizer.save_pretrained(folder)


def _set_padding(tokenizer: Any, model: Any, path: Path) -> None:
    """Pad with a token that a model which reads the last token before the padding knows, on the right.

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
    if looks_for_padding:
        tokenizer.padding_side = "right"
        model.config.pad_token_id = tokenizer.pad_token_id
        model.config.get_text_config().pad_token_id = tokenizer.pad_token_id


def _lengths(tokenizer: Any, settings: Mapping[str, Any], model: Any) -> Length:
    """Take the smallest length that tokenizer, sentence-transformers and positions tell.

    A tokenizer that knows none says 10^30. Positions of RoBERTa's kind begin behind that of the padding.
    """
    positions = getattr(model.config, "max_position_embeddings", None)
    most = positions if isinstance(positions, int) and positions > 0 else None
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Embedding) and "position" in name and layer.padding_idx is not None:
            most = min(most or layer.num_embeddings, layer.num_embeddings - layer.padding_idx - 1)
    lengths = (tokenizer.model_max_length, settings.get("max_seq_length"), most)
    known = [n for n in lengths if isinstance(n, int) and not isinstance(n, bool) and 0 < n <= _LONGEST]
    if not known:
        return Length(_UNKNOWN if most is None else _LONGEST, most)
    return Length(min(known), most)


def _sentence_settings(path: Path) -> dict[str, Any]:
    """Read what sentence-transformers keeps beside its encoder: sentence_bert_config.json and its kin."""
    files = sorted(path.glob("sentence_*_config.json"))
    return read_object(files[0]) if files else {}


def _digest(tokenizer: Any) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = backend.to_str() if backend else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def is_sentence_encoder(path: Path) -> bool:
    """Return whether a folder is one of sentence-transformers."""
    return (path / MODULES).is_file()


def read_pooling(path: Path) -> Pool:
    """Read how a sentence-transformers folder makes sentence vectors.

    Raises:
        InputError: It has parts beyond pooling and normalisation, or a file is damaged.
    """
    try:
        parts = read_modules(path)
        kinds = [part["type"].rpartition(".")[2] for part in parts]
        folder = path / next(part["path"] for part in parts if part["type"].endswith(".Pooling"))
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        ways = [name for name, key in _WAYS.items() if settings.get(key)] or [settings.get("pooling_mode")]
    except (OSError, ValueError, RecursionError, TypeError, KeyError, AttributeError, StopIteration) as error:
        raise InputError(f"{path / MODULES} or its pooling is missing or damaged: {error!r}.") from error
    if len(ways) != 1 or ways[0] not in _WAYS or kinds[2:] not in ([], ["Normalize"]):
        raise InputError(
            f"{path} makes sentence vectors by {', '.join(kinds)} and pooling {ways}.",
            f"Known: Transformer, Pooling by one of {', '.join(_WAYS)}, and Normalize.",
        )
    return partial(_pooled, way=ways[0], normalize="Normalize" in kinds)


def _pooled(output: Any, mask: Int64[Tensor, "text token"], *, way: str, normalize: bool) -> Tensor:
    tokens, own = output.last_hidden_state, mask[..., None].bool()
    if way == "cls":
        vectors = tokens[
            torch.arange(len(tokens), device=mask.device), mask.argmax(1)
        ]  # whatever the padding
    elif way == "max":
        vectors = tokens.masked_fill(~own, -torch.inf).amax(1)
    else:
        vectors = (tokens * own).sum(1) / own.sum(1).clamp(min=1)
    return functional.normalize(vectors, dim=-1) if normalize else vectors
