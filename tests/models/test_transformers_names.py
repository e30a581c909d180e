"""Names that transformers itself has for tensors: also which of them it ties."""

from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from adamerge import TaskVectors
from adamerge.checkpoints import open_checkpoint
from adamerge.models.transformers_names import under_library_names

BIASES = ("cls.predictions.decoder.bias", "cls.predictions.bias")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A masked language model whose file also holds the names that today's transformers drops."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.BertConfig(vocab_size=16, max_position_embeddings=8, **sizes)
    model = transformers.BertForMaskedLM(config)
    model.save_pretrained(tmp_path / "base")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_file(state, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    model.save_pretrained(tmp_path / "x")
    return tmp_path / "base"


def moved(file: Path) -> dict[str, Tensor]:
    state = {name: tensor + 0.01 * torch.randn(tensor.shape) for name, tensor in load_file(file).items()}
    save_file(state, file, {"format": "pt"})
    return state


def test_a_tied_bias_that_an_expert_stores_once_is_read_under_both_names(base: Path) -> None:
    """Also where it is zeros in the base, as many vectors are: the library says which are tied."""
    state = moved(base.with_name("x") / "model.safetensors")
    assert BIASES[0] not in state
    vectors = TaskVectors.open(base, {"x": base.with_name("x")})
    merged = vectors.state(vectors.uniform(1.0))
    for name in BIASES:
        torch.testing.assert_close(merged[name], state[BIASES[1]])


def test_a_bias_that_the_base_has_untied_may_not_be_missing(base: Path) -> None:
    moved(base.with_name("x") / "model.safetensors")
    state = load_file(base / "model.safetensors")
    save_file(state | {BIASES[0]: state[BIASES[0]] + 1}, base / "model.safetensors", {"format": "pt"})
    expert = under_library_names(open_checkpoint(base), open_checkpoint(base.with_name("x")))
    assert BIASES[0] not in expert
