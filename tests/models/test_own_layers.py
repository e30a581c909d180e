"""Bases without pooler or dense layer: what only experts have is part of their heads."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from conftest import draw
from safetensors.torch import load_file, save_file
from test_hf_encoder import SENTENCES, TestAdapters, logits, specs
from tiny_networks import SIZES, WORDS, adaptation, make_hf, texts, write_hf
from torch import Tensor
from torch.testing import assert_close

from adamerge import MergeTask, Router, Surgery, TaskSpec, load, save_mixture
from adamerge.checkpoints import save
from adamerge.errors import InputError
from adamerge.fitting import merge_task, open_vectors
from adamerge.mixture import write_companions
from adamerge.models import open_heads

MARKS = {"bos_token_id": 2, "cls_token_id": 2, "eos_token_id": 3, "sep_token_id": 3}
KINDS: dict[str, Callable[[], Any]] = {
    **{
        kind: lambda kind=kind: texts(kind)
        for kind in ("Bert", "Roberta", "DistilBert", "DebertaV2", "Electra", "MPNet", "XLMRoberta")
    },
    "Albert": lambda: texts("Albert", embedding_size=8),
    "ModernBert": lambda: texts("ModernBert", classifier_pooling="mean", **MARKS),
    "Bart": lambda: transformers.BartConfig(
        vocab_size=len(WORDS), d_model=16, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=24,
        decoder_ffn_dim=24, encoder_attention_heads=2, decoder_attention_heads=2,
        max_position_embeddings=24, pad_token_id=0, decoder_start_token_id=3, **MARKS,
    ),
}  # fmt: skip
HELD = {  # by kind, what masked language models and bare encoders lack
    "Bert": ("bert.pooler.dense", ""),
    "Albert": ("albert.pooler", ""),
    "DistilBert": ("pre_classifier", "pre_classifier"),
    "DebertaV2": ("pooler.dense", "pooler.dense"),
    "ModernBert": ("", "head."),
    "Bart": ("classification_head.dense", "classification_head.dense"),
}


def expert_logits(base: Path, expert: Path, n_classes: int, values: list[Any]) -> tuple[Any, Tensor]:
    """Classify with an expert that was opened as one of a base."""
    vectors, backbone = open_vectors(str(base), {"x": str(expert)}, force=True)
    head = open_heads(base, specs(x=n_classes), {"x": expert})["x"]
    batch = torch.stack([backbone.preprocess(value) for value in values])
    return head, head.logits(backbone.features(vectors.merge(vectors.one_hot("x")), batch))


@pytest.mark.parametrize("auto", ["AutoModelForMaskedLM", "AutoModel"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_expert_alone_gives_the_librarys_logits(kind: str, auto: str, tmp_path: Path) -> None:
    write_hf(tmp_path / "base", make_hf(KINDS[kind](), auto=auto))
    expert = make_hf(KINDS[kind](), n_classes=5, seed=1)
    write_hf(tmp_path / "expert", expert)
    head, found = expert_logits(tmp_path / "base", tmp_path / "expert", 5, SENTENCES)
    assert_close(found, logits(expert, tmp_path / "expert", SENTENCES), atol=1e-5, rtol=1e-5)
    own = HELD.get(kind, ("classifier.dense", "classifier.dense"))[auto == "AutoModel"]
    assert bool(own) == (head.layers is not None)
    assert all(name.startswith(f"layers/{own}") for name in head.tensors if name not in ("weight", "bias"))


def test_images_have_such_layers_too(tmp_path: Path) -> None:
    """BEiT without pooler has no norm behind its pooling."""
    config = transformers.BeitConfig(image_size=16, patch_size=8, **SIZES)
    base = transformers.BeitModel(config, add_pooling_layer=False)
    write_hf(tmp_path / "base", base)
    expert = make_hf(config, n_classes=4, seed=1)
    write_hf(tmp_path / "expert", expert)
    values = [draw(i, i).resize((20 + i, 30)) for i in range(3)]
    head, found = expert_logits(tmp_path / "base", tmp_path / "expert", 4, values)
    assert head.layers is not None
    assert_close(found, logits(expert, tmp_path / "expert", values), atol=1e-4, rtol=1e-4)


class TestAdaptersOnSuchBases:
    @pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # PEFT asks transformers
    @pytest.mark.parametrize("auto", ["AutoModelForMaskedLM", "AutoModel"])
    def test_a_saved_classifier_brings_them(self, auto: str, tmp_path: Path) -> None:
        base = make_hf(texts("Roberta"), auto=auto)
        write_hf(tmp_path / "base", base)
        model = make_hf(texts("Roberta"), n_classes=4, seed=1)
        model.roberta.load_state_dict(getattr(base, "roberta", base).state_dict(), strict=False)
        merged = TestAdapters().adapter(tmp_path / "lora", model, ["query", "value"], "classifier")
        head, found = expert_logits(tmp_path / "base", tmp_path / "lora", 4, SENTENCES)
        assert_close(found, logits(merged, tmp_path / "base", SENTENCES), atol=1e-5, rtol=1e-5)
        assert head.names["layers/classifier.dense.weight"] == "classifier.dense.weight"

    @pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
    def test_layers_that_were_not_saved_are_named(self, tmp_path: Path) -> None:
        """PEFT saves DeBERTa's `classifier`, and not its pooler."""
        write_hf(tmp_path / "base", make_hf(texts("DebertaV2"), auto="AutoModelForMaskedLM"))
        model = make_hf(texts("DebertaV2"), n_classes=4)
        config = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query_proj"])
        peft.get_peft_model(model, config).save_pretrained(tmp_path / "lora")
        with pytest.raises(InputError, match="lacks 2 tensors of its classifier: pooler.*\n.*PEFT"):
            open_heads(tmp_path / "base", specs(x=4), {"x": tmp_path / "lora"})


@pytest.fixture
def tasks(tmp_path: Path) -> dict[str, TaskSpec]:
    """A masked language model, two experts of it, and their texts."""
    write_hf(tmp_path / "base", make_hf(texts("Roberta"), auto="AutoModelForMaskedLM"))
    rows = {"mood": 2, "colour": 3}
    for seed, (task, count) in enumerate(rows.items(), 1):
        write_hf(tmp_path / task, make_hf(texts("Roberta"), n_classes=count, seed=seed))
        lines = [f'{{"text": "{text}", "label": {i % count}}}' for i, text in enumerate(SENTENCES * 3)]
        (tmp_path / f"{task}.jsonl").write_text("\n".join(lines))
    from datasets import Dataset

    for task in rows:
        Dataset.from_json(str(tmp_path / f"{task}.jsonl"), cache_dir=str(tmp_path / "cache")).to_parquet(
            tmp_path / f"{task}.parquet"
        )
    return {task: TaskSpec(*[str(tmp_path / f"{task}.parquet")] * 2) for task in rows}


def merged_task(tmp_path: Path, tasks: dict[str, TaskSpec], **options: Any) -> MergeTask:
    experts = {task: str(tmp_path / task) for task in tasks}
    return merge_task(str(tmp_path / "base"), experts, tasks, force=True, **options)


class TestRuns:
    def test_steps_an_accuracy_and_the_folder(self, tasks: dict[str, TaskSpec], tmp_path: Path) -> None:
        model = merged_task(tmp_path, tasks, adapters=Surgery(2))
        before = model.coefficients.table()[1].clone()
        assert set(adaptation(model, tasks, 3)) == set(tasks)
        assert not torch.equal(model.coefficients.table()[1], before)
        assert not any("lm_head" in name or "classifier" in name for name in model.read_names)

    @pytest.mark.parametrize("routed", [False, True])
    def test_a_folder_is_loaded_with_its_heads(
        self, routed: bool, tasks: dict[str, TaskSpec], tmp_path: Path
    ) -> None:
        options = {"coefficients": Router()} if routed else {}
        model = merged_task(tmp_path, tasks, **options)
        batch = torch.stack([model.backbone.preprocess(text) for text in SENTENCES])
        if routed:
            assert model.mixture is not None
            mixture = model.mixture.eval()
            save_mixture(mixture, tmp_path / "out", like=tmp_path / "base")
            expected = {task: mixture.logits(batch, task) for task in tasks}
        else:
            state = model.vectors.state(model.vectors.uniform(0.3))
            heads = model.heads
            save(state, tmp_path / "out", like=tmp_path / "base")
            write_companions(tmp_path / "out", heads, {})
            features = model.backbone.features(state, batch)
            expected = {task: heads[task].logits(features) for task in tasks}
        loaded = load(tmp_path / "out")
        for task in tasks:
            assert_close(loaded.logits(batch, task), expected[task], atol=1e-6, rtol=1e-6)
            own = loaded.heads[task]
            assert own.names["layers/classifier.dense.bias"] == "classifier.dense.bias"
            assert own.names["weight"] == "classifier.out_proj.weight"

    def test_a_folder_whose_layers_do_not_fit_is_refused(
        self, tasks: dict[str, TaskSpec], tmp_path: Path
    ) -> None:
        model = merged_task(tmp_path, tasks)
        out = tmp_path / "out"
        save(model.vectors.state(model.vectors.uniform(0.3)), out, like=tmp_path / "base")
        write_companions(out, model.heads, {})
        heads = load_file(out / "heads.safetensors")
        save_file({n: x for n, x in heads.items() if "dense.bias" not in n}, out / "heads.safetensors")
        with pytest.raises(InputError, match="has layers of its own .*which do not fit the model"):
            load(out)


def test_gradients_reach_features_through_the_layers(tmp_path: Path) -> None:
    write_hf(tmp_path / "base", make_hf(texts("Electra"), auto="AutoModel"))
    write_hf(tmp_path / "x", make_hf(texts("Electra"), n_classes=3, seed=1))
    head = open_heads(tmp_path / "base", specs(x=3), {"x": tmp_path / "x"})["x"]
    assert head.layers is not None
    features = torch.randn(5, 16, requires_grad=True)
    (gradient,) = torch.autograd.grad(head.logits(features)[2].sum(), features)
    assert gradient[2].abs().sum() > 0
    assert not gradient[[0, 1, 3, 4]].any()
    rows = torch.func.vmap(lambda row: head.logits(row[None])[0])(features.detach())
    assert_close(rows, head.logits(features.detach()), atol=1e-6, rtol=1e-6)


class TestSentenceEncoderOfClassifiers:
    """Classifiers, and LoRA, that were trained from a sentence-transformers folder."""

    def write(self, folder: Path, inner: str) -> Any:
        model = make_hf(texts("Bert"), auto="AutoModel")
        write_hf(folder / inner, model)
        modules = [
            {"path": inner, "type": "sentence_transformers.models.Transformer"},
            {"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
        ]
        (folder / "modules.json").write_text(json.dumps(modules))
        (folder / "1_Pooling").mkdir()
        (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
        return model

    def classifier(self, encoder: Any, n_classes: int) -> Any:
        model = make_hf(texts("Bert"), n_classes=n_classes, seed=1)
        model.bert.load_state_dict(encoder.state_dict())
        return model

    @pytest.mark.parametrize("inner", ["", "0_Transformer"])
    def test_a_classifier_alone_gives_the_librarys_logits(self, inner: str, tmp_path: Path) -> None:
        model = self.classifier(self.write(tmp_path / "base", inner), 5)
        with torch.no_grad():
            model.bert.encoder.layer[0].output.dense.weight.add_(0.1)
        write_hf(tmp_path / "x", model)
        found = expert_logits(tmp_path / "base", tmp_path / "x", 5, SENTENCES)[1]
        assert_close(found, logits(model, tmp_path / "x", SENTENCES), atol=1e-5, rtol=1e-5)

    @pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
    @pytest.mark.parametrize("inner", ["", "0_Transformer"])
    def test_so_does_lora(self, inner: str, tmp_path: Path) -> None:
        model = self.classifier(self.write(tmp_path / "base", inner), 4)
        merged = TestAdapters().adapter(tmp_path / "lora", model, ["query", "value"], "classifier")
        found = expert_logits(tmp_path / "base", tmp_path / "lora", 4, SENTENCES)[1]
        expected = logits(merged, tmp_path / "base" / inner, SENTENCES)
        assert_close(found, expected, atol=1e-5, rtol=1e-5)

    def test_a_merged_folder_has_the_layout_and_is_loaded_with_the_same_features(
        self, tmp_path: Path
    ) -> None:
        model = self.classifier(self.write(tmp_path / "base", "0_Transformer"), 3)
        with torch.no_grad():
            model.bert.embeddings.word_embeddings.weight.add_(0.1)
        write_hf(tmp_path / "x", model)
        vectors, backbone = open_vectors(str(tmp_path / "base"), {"x": str(tmp_path / "x")}, force=True)
        heads = open_heads(tmp_path / "base", specs(x=3), {"x": tmp_path / "x"})
        state = vectors.state(vectors.one_hot("x"))
        save(state, tmp_path / "out", like=tmp_path / "base")
        write_companions(tmp_path / "out", heads, {})
        assert (tmp_path / "out" / "0_Transformer" / "model.safetensors").is_file()
        assert not (tmp_path / "out" / "model.safetensors").exists()
        batch = torch.stack([backbone.preprocess(text) for text in SENTENCES])
        expected = logits(model, tmp_path / "x", SENTENCES)
        assert_close(load(tmp_path / "out").logits(batch, "x"), expected, atol=1e-5, rtol=1e-5)

    def test_heads_of_both_kinds_are_refused(self, tmp_path: Path) -> None:
        model = self.classifier(self.write(tmp_path / "base", ""), 3)
        with torch.no_grad():
            model.bert.embeddings.word_embeddings.weight.add_(0.1)
        write_hf(tmp_path / "x", model)
        save_file({"weight": torch.ones(3, 16)}, tmp_path / "head.safetensors")
        tasks = {**specs(x=3), "y": TaskSpec("memory", head=str(tmp_path / "head.safetensors"))}
        paths = {task: str(tmp_path / "x") for task in tasks}
        with pytest.raises(InputError, match="'y' has a head file, .* and task 'x' the classifier of its"):
            open_vectors(str(tmp_path / "base"), paths, force=True, tasks=tasks)
        backbone = open_vectors(str(tmp_path / "base"), {"y": paths["y"]}, force=True, tasks=tasks)[1]
        assert not [name for name in backbone.names if "pooler" in name]  # sentence vectors, as before
