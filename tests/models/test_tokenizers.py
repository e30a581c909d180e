"""Tokenizers of base and experts: the first difference is named."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_networks import WORDS, make_hf, texts, tokenizer, write_hf
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from adamerge.errors import InputError
from adamerge.fitting import open_vectors
from adamerge.models.tokenizers import require_same_tokenizers
from adamerge.models.tokens import TextModel


def other(change: str) -> Any:
    """A tokenizer that differs from `tokenizer` in one thing."""
    words = {word: i for i, word in enumerate(WORDS)}
    if change == "order":
        words |= {"good": words["bad"], "bad": words["good"]}
    if change == "size":
        words["new"] = len(words)
    whole = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    whole.pre_tokenizer = (
        pre_tokenizers.WhitespaceSplit() if change == "split" else pre_tokenizers.Whitespace()
    )
    whole.post_processor = tokenizer().backend_tokenizer.post_processor
    if change == "case":
        whole.normalizer = normalizers.Lowercase()
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    if change == "special":
        special["sep_token"] = "[CLS]"
    return transformers.PreTrainedTokenizerFast(tokenizer_object=whole, **special)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    write_hf(tmp_path / "base", make_hf(texts("Bert")))
    return tmp_path / "base"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("size", "the base has 12 tokens, expert 'x' 13"),
        ("order", "token 'good' is 8 in the base and 9 in expert 'x'"),
        ("special", r"sep_token is '\[SEP\]' in the base and '\[CLS\]' in expert 'x'"),
        ("case", "that of the base keeps upper case, that of expert 'x' lowers it"),
    ],
)
def test_a_difference_is_named(base: Path, tmp_path: Path, change: str, message: str) -> None:
    write_hf(tmp_path / "x", make_hf(texts("Bert"), seed=1))
    other(change).save_pretrained(tmp_path / "x")
    with pytest.raises(InputError, match=f"tokenizers differ: {message}"):
        open_vectors(str(base), {"x": str(tmp_path / "x")}, force=True)


def test_another_way_of_reading_is_named_with_a_text(base: Path, tmp_path: Path) -> None:
    probe = "a good, (red) blue"
    assert tokenizer()(probe)["input_ids"] != other("split")(probe)["input_ids"]
    other("split").save_pretrained(tmp_path / "x")
    with pytest.raises(
        InputError, match="tokenizers differ: that of the base reads .Café .* that of expert 'x' as"
    ):
        require_same_tokenizers(base, {"x": tmp_path / "x"})


def test_the_same_tokenizer_in_other_files_and_none_at_all_are_accepted(base: Path, tmp_path: Path) -> None:
    own = other("nothing")
    own.model_max_length = 7
    own.padding_side = "left"
    own.save_pretrained(tmp_path / "x")
    (tmp_path / "y").mkdir()
    require_same_tokenizers(base, {"x": tmp_path / "x", "y": tmp_path / "y", "z": tmp_path / "z.safetensors"})


def test_a_token_that_the_model_does_not_know_is_refused() -> None:
    model = TextModel(
        make_hf(texts("Bert")), ("input_ids", "attention_mask"), lambda output, _: output.logits
    )
    tokens = torch.tensor([[[1, 5, len(WORDS) - 1], [1, 1, 1]]])
    assert model(tokens).shape == (1, 3)
    tokens[0, 0, 1] = len(WORDS)
    with pytest.raises(InputError, match=rf"gives token {len(WORDS)}, the model knows the tokens 0 to"):
        model(tokens)
