"""Compares the tokenizers of base and experts: weights are trained for one."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from adamerge.checkpoints import transformer_folder
from adamerge.errors import InputError
from adamerge.models.libraries import transformers_tokenizer
from adamerge.models.tokens import has_tokenizer

_SPECIAL = ("pad", "unk", "cls", "sep", "mask", "bos", "eos")
_PROBES = ("Café No. 5 isn't (re-)opened @ 10:30!", "  two  blanks\tand a tab ", "naïve 你好 ²")
_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "merges.txt")


def require_same_tokenizers(base: Path, experts: Mapping[str, Path]) -> None:
    """Compare vocabulary, special tokens, case and the reading of some texts.

    Experts without a tokenizer of their own, such as plain files and most adapters, are not judged.

    Raises:
        InputError: A tokenizer differs, which is named with its first difference, or cannot be read.
    """
    base = transformer_folder(base)
    others = {task: transformer_folder(path) for task, path in experts.items()}
    others = {task: path for task, path in others.items() if has_tokenizer(path) and not _same(base, path)}
    if not others or not has_tokenizer(base):
        return
    base_tokenizer = transformers_tokenizer(base)
    for task, path in others.items():
        difference = next(_differences(base_tokenizer, transformers_tokenizer(path)), None)
        if difference:
            raise InputError(
                f"tokenizers differ: {difference.format(expert=f'expert {task!r}')}.",
                "Weights read the tokens that they were trained with: give models of one tokenizer.",
            )


def _same(base: Path, expert: Path) -> bool:
    """Return whether all files are alike, byte for byte, which needs no library to see."""
    return all(_content(base / name) == _content(expert / name) for name in _FILES)


def _content(file: Path) -> bytes | None:
    return file.read_bytes() if file.is_file() else None


def _differences(base: Any, expert: Any) -> Iterator[str]:
    """Describe what differs; {expert} stands for the expert's name."""
    ours, other = base.get_vocab(), expert.get_vocab()
    if len(ours) != len(other):
        yield f"the base has {len(ours)} tokens, {{expert}} {len(other)}"
    for token in sorted(ours, key=ours.__getitem__):
        if ours[token] != other.get(token):
            shown = repr(token).replace("{", "{{").replace("}", "}}")
            place = other.get(token, "not in the vocabulary")
            yield f"token {shown} is {ours[token]} in the base and {place} in {{expert}}"
            break
    for name in _SPECIAL:
        tokens = [getattr(tokenizer, f"{name}_token") for tokenizer in (base, expert)]
        if None not in tokens and tokens[0] != tokens[1]:
            yield f"{name}_token is {tokens[0]!r} in the base and {tokens[1]!r} in {{expert}}"
    lowers = [_lowers(tokenizer) for tokenizer in (base, expert)]
    if lowers[0] != lowers[1]:
        words = [("keeps", "lowers")[lower] for lower in lowers]
        yield f"that of the base {words[0]} upper case, that of {{expert}} {words[1]} it"
    for probe in _PROBES:
        ids = [tokenizer(probe)["input_ids"] for tokenizer in (base, expert)]
        if ids[0] != ids[1]:
            yield f"that of the base reads {probe!r} as {ids[0]}, that of {{expert}} as {ids[1]}"


def _lowers(tokenizer: Any) -> bool:
    normalizer = getattr(getattr(tokenizer, "backend_tokenizer", None), "normalizer", None)
    if normalizer is None:
        return bool(getattr(tokenizer, "do_lower_case", False))
    return normalizer.normalize_str("A") == "a"
