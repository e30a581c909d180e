"""Experts whose names carry one prefix more or less are read under the base's names, lazily."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from adamerge.checkpoints import Checkpoint, SpanReader, open_checkpoint
from adamerge.checkpoints.renaming import prefix_of, under_names_of
from adamerge.errors import InputError
from adamerge.names import PREFIXES
from adamerge.vectors import TaskVectors

NAMES = ("embeddings.class_embedding", "layers.0.fc.weight", "layers.0.fc.bias")


def state(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(3, 2, generator=generator) for name in NAMES}


def written(path: Path, tensors: Mapping[str, Tensor]) -> Checkpoint:
    save_file(dict(tensors), path)
    return open_checkpoint(path)


def prefixed(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize("prefix", PREFIXES)
class TestOnePrefix:
    def test_it_comes_off(self, tmp_path: Path, prefix: str) -> None:
        expert = written(tmp_path / "x.safetensors", prefixed(state(), prefix))
        assert set(under_names_of(state(), expert)) == set(NAMES)

    def test_it_comes_on_also_where_the_base_holds_more(self, tmp_path: Path, prefix: str) -> None:
        base = prefixed(state(), prefix) | {"text_model.weight": torch.ones(2)}
        expert = under_names_of(base, written(tmp_path / "x.safetensors", state()))
        assert set(expert) == {prefix + name for name in NAMES}

    def test_a_modules_prefix_is_found(self, prefix: str) -> None:
        assert prefix_of(NAMES, prefixed(state(), prefix)) == prefix
        assert prefix_of(NAMES, state()) == ""


def test_what_is_known_of_the_file_stays_known(tmp_path: Path) -> None:
    plain = written(tmp_path / "x.safetensors", prefixed(state(), "module."))
    expert = under_names_of(state(), plain)
    name = NAMES[1]
    assert torch.equal(expert[name], state()[name])
    assert expert.info(name) == plain.info(f"module.{name}")
    assert expert.entry(name) == plain.entry(f"module.{name}")
    assert torch.equal(SpanReader(expert, name)[slice(0, 6)], state()[name].flatten())
    assert (expert.root, expert.file_digest()) == (plain.root, plain.file_digest())
    assert len(plain) == len(expert) == 3
    assert f"module.{name}" in plain
    assert f"module.{name}" not in expert


def test_a_file_that_changed_is_refused_under_other_names_too(tmp_path: Path) -> None:
    expert = under_names_of(state(), written(tmp_path / "x.safetensors", prefixed(state(), "module.")))
    save_file(prefixed(state(1), "module."), tmp_path / "x.safetensors")
    with pytest.raises(InputError, match="has changed since it was opened"):
        expert[NAMES[0]]


def test_names_that_fit_stay_whatever_else_they_could_be(tmp_path: Path) -> None:
    base = state() | prefixed(state(1), "model.")
    expert = under_names_of(base, written(tmp_path / "x.safetensors", prefixed(state(), "model.")))
    assert set(expert) == {f"model.{name}" for name in NAMES}


def test_names_that_would_fall_together_stay(tmp_path: Path) -> None:
    both = state() | prefixed(state(), "module.")
    assert set(under_names_of(state(), written(tmp_path / "x.safetensors", both))) == set(both)


@pytest.mark.parametrize("prefix", ["", "vision_model."])
def test_counters_that_the_base_does_not_store_are_left_out(tmp_path: Path, prefix: str) -> None:
    """Older versions of transformers saved 0, 1, 2, ... beside the weights."""
    counter = {"embeddings.position_ids": torch.arange(3)}
    expert = written(tmp_path / "x.safetensors", prefixed(state() | counter, prefix))
    assert set(under_names_of(state(), expert)) == set(NAMES)
    assert set(under_names_of(state() | counter, expert)) == {*NAMES, *counter}


@pytest.mark.parametrize("codec", ["fp32", "stream"])
def test_vectors_of_experts_in_several_dialects_are_equal(tmp_path: Path, codec: str) -> None:
    experts = {}
    for prefix in ("", "module."):
        file = tmp_path / f"{prefix}x.safetensors"
        tensors = {name: tensor + (name != NAMES[0]) for name, tensor in state().items()}
        written(file, prefixed(tensors | ({} if prefix else {NAMES[0]: torch.ones(3, 2)}), prefix))
        experts[prefix or "plain"] = file
    vectors = TaskVectors.open(
        state() | {"more": torch.ones(2)}, experts, codec, allow_missing=["more"], force=True
    )
    plain, other = (vectors.merge(vectors.one_hot(task)) for task in experts)
    assert vectors.names == tuple(sorted(NAMES))
    assert all(torch.equal(plain[name], other[name]) for name in NAMES[1:])
    assert torch.equal(other[NAMES[0]], state()[NAMES[0]])


def test_a_misfit_is_told_in_the_bases_names(tmp_path: Path) -> None:
    tensors = prefixed(state(), "module.")
    tensors["module.layers.0.fc.weight"] = torch.ones(4, 2)
    written(tmp_path / "x.safetensors", tensors)
    with pytest.raises(InputError, match=r"differ from the base in shape: layers.0.fc.weight \[4, 2\]"):
        TaskVectors.open(state(), {"x": tmp_path / "x.safetensors"})
