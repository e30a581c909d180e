"""Experts whose names carry one prefix more or less are read under the base's names, lazily."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

from adamerge.checkpoints import Checkpoint, SpanReader, open_checkpoint
from adamerge.checkpoints.renaming import prefix_of, under_names_of
from adamerge.cli import main
from adamerge.errors import AdamergeWarning, InputError
from adamerge.names import PREFIXES
from adamerge.vectors import TaskVectors

NAMES = ("embeddings.class_embedding", "layers.0.fc.weight", "layers.0.fc.bias")


def state(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(3, 2, generator=generator) for name in NAMES}


def written(path: Path, tensors: Mapping[str, Tensor]) -> Checkpoint:
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, path)
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


def tensors(*names: str, seed: int = 0) -> dict[str, Tensor]:
    """Make tensors that have nothing in common but their names."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(2 + len(name) % 3, 3, generator=generator) for name in names}


class TestOtherDialects:
    """No list of prefixes: names and shapes of both sides tell."""

    @pytest.mark.parametrize(
        "change",
        [
            lambda name: f"_orig_mod.{name}",
            lambda name: f"module._orig_mod.{name}",
            lambda name: f"base_model.model.{name}",
            lambda name: f"a_prefix_of_nobody.{name}",
            lambda name: name.replace("layers.0.", "layers.0._orig_mod."),
            lambda name: f"module.{name.replace('layers.0.', 'layers.0._checkpoint_wrapped.')}",
        ],
    )
    def test_prefixes_and_wrappers_are_found_on_either_side(self, tmp_path: Path, change: Any) -> None:
        plain = tensors("stem.weight", "layers.0.fc.weight", "layers.0.fc.bias", "norm.weight")
        other = {change(name): tensor for name, tensor in plain.items()}
        assert set(under_names_of(plain, written(tmp_path / "a", other))) == set(plain)
        expert = under_names_of(other, written(tmp_path / "b", plain))
        assert set(expert) == set(other)
        assert expert.dialect

    def test_a_prefix_in_place_of_another(self, tmp_path: Path) -> None:
        plain = tensors("layers.0.fc.weight", "layers.1.fc.weight", "norm.weight")
        expert = written(tmp_path / "x", prefixed(plain, "vit."))
        found = under_names_of(prefixed(plain, "deit."), expert)
        assert set(found) == set(prefixed(plain, "deit."))
        assert found.dialect == "without the prefix 'vit.', with the prefix 'deit.'"

    def test_names_that_fit_in_two_places_are_refused(self, tmp_path: Path) -> None:
        plain = tensors("layers.0.fc.weight", "norm.weight")
        base = prefixed(plain, "left.") | prefixed(plain, "right.")
        with pytest.raises(InputError, match=r"may be 'left.layers.0.fc.weight', 'right.layers.0.fc.weight'"):
            under_names_of(base, written(tmp_path / "x", plain), "expert 'x'")

    def test_a_prefix_that_only_a_head_has_means_nothing(self, tmp_path: Path) -> None:
        body = tensors("body.a.weight", "body.b.weight", "body.c.weight")
        base = body | {"lm_head.dense.weight": torch.ones(7, 7)}
        expert = written(tmp_path / "x", body | {"classifier.dense.weight": torch.ones(7, 7)})
        assert set(under_names_of(base, expert)) == set(expert)

    @pytest.mark.parametrize("headed", ["base", "expert"])
    def test_a_head_of_one_side_is_left_out_with_a_warning(self, tmp_path: Path, headed: str) -> None:
        plain = tensors("layers.0.fc.weight", "layers.1.fc.weight", "norm.weight", "stem.weight")
        whole = prefixed(plain, "bert.") | {"classifier.weight": torch.ones(2, 3)}
        base, other = (whole, plain) if headed == "base" else (plain, whole)
        written(tmp_path / "x", {name: tensor + 0.1 for name, tensor in other.items()})
        said = "has no classifier.weight" if headed == "base" else "has classifier.weight, which"
        with pytest.warns(AdamergeWarning, match=said):
            vectors = TaskVectors.open(base, {"x": tmp_path / "x"})
        assert len(vectors.names) == 4
        pattern = {"allow_missing": ["classifier.*"], "exclude": ["classifier.*"]}
        TaskVectors.open(base, {"x": tmp_path / "x"}, **pattern)  # named, so not told

    def test_one_tower_with_a_head_of_its_own_is_an_expert_of_both_towers(self, tmp_path: Path) -> None:
        """As research code wraps the image tower of a CLIP together with a classification head."""
        blocks = tensors(*(f"blocks.{i}.weight" for i in range(4)))
        base = prefixed(blocks, "visual.") | {f"transformer.{n}": t + 1 for n, t in blocks.items()}
        tower = {f"image_encoder.model.{n}": base[n] + 0.1 for n in base if n.startswith("visual.")}
        written(tmp_path / "x", tower | {"classification_head.weight": torch.ones(2, 3)})
        with pytest.warns(AdamergeWarning, match=r"has classification_head.weight, which the base lacks"):
            vectors = TaskVectors.open(base, {"x": tmp_path / "x"})
        assert set(vectors.names) == {n for n in base if n.startswith("visual.")}

    def test_wrappers_of_several_parts_come_out(self, tmp_path: Path) -> None:
        base = tensors("vit.a.weight", "vit.b.weight", "vit.c.weight", "classifier.weight")
        names = {n: n.replace("classifier.", "classifier.modules_to_save.default.") for n in base}
        expert = written(tmp_path / "x", {f"base_model.model.{names[n]}": t for n, t in base.items()})
        assert set(under_names_of(base, expert)) == set(base)

    def test_a_part_of_the_body_may_not_be_missing(self, tmp_path: Path) -> None:
        plain = tensors("layers.0.fc.weight", "layers.1.fc.weight", "layers.2.fc.weight", "norm.weight")
        short = {f"bert.{n}": t for n, t in plain.items() if n != "layers.2.fc.weight"}
        written(tmp_path / "x", short)
        with pytest.raises(InputError, match=r"lacks 1 of 4 tensors: layers.2.fc.weight"):
            TaskVectors.open(plain, {"x": tmp_path / "x"})


class TestTiedTensors:
    BASE: ClassVar[dict[str, Tensor]] = tensors("embed.weight", "layer.weight", seed=3)

    @pytest.mark.parametrize("kept", ["embed.weight", "lm_head.weight", "shared.weight"])
    def test_an_expert_that_stores_one_of_three_names_has_all(self, tmp_path: Path, kept: str) -> None:
        names = ("embed.weight", "lm_head.weight", "shared.weight")
        base = {**self.BASE, **dict.fromkeys(names, self.BASE["embed.weight"])}
        changed = {"layer.weight": base["layer.weight"] + 1, kept: base["embed.weight"] + 2}
        written(tmp_path / "x", changed)
        vectors = TaskVectors.open(base, {"x": tmp_path / "x"}, force=True)
        merged = vectors.merge(vectors.one_hot("x"))
        assert all(torch.allclose(merged[name], changed[kept]) for name in names)
        assert len(vectors.aliases) == 2

    def test_experts_of_which_one_was_untied(self, tmp_path: Path) -> None:
        base = {**self.BASE, "lm_head.weight": self.BASE["embed.weight"]}
        written(tmp_path / "tied", {name: tensor + 1 for name, tensor in self.BASE.items()})
        untied = {name: tensor + i for i, (name, tensor) in enumerate(base.items(), 1)}
        written(tmp_path / "untied", {name: tensor.clone() for name, tensor in untied.items()})
        vectors = TaskVectors.open(base, {"t": tmp_path / "tied", "u": tmp_path / "untied"}, force=True)
        assert not vectors.aliases
        merged = vectors.merge(vectors.one_hot("t"))
        assert torch.allclose(merged["lm_head.weight"], base["embed.weight"] + 1)
        merged = vectors.merge(vectors.one_hot("u"))
        assert torch.allclose(merged["lm_head.weight"], untied["lm_head.weight"])


def test_a_bare_encoder_without_tokenizer_is_a_base_of_classifiers(tmp_path: Path) -> None:
    """A merge of files needs no tokenizer."""
    small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.BertConfig(vocab_size=32, **small)
    transformers.BertModel(config).save_pretrained(tmp_path / "base")
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path / "x")
    words = ["merge", "task_arithmetic", "--scale", "1", "--force", "true", "--base", str(tmp_path / "base")]
    with pytest.warns(AdamergeWarning, match="last layers .* are not merged"):
        assert main([*words, "--experts", f"x={tmp_path / 'x'}", "--out", str(tmp_path / "out")]) == 0
    merged, expert = (open_checkpoint(tmp_path / name) for name in ("out", "x"))
    assert all(torch.allclose(merged[name], expert[f"bert.{name}"], atol=1e-6) for name in merged)
