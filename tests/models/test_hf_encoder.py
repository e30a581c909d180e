"""Hugging Face classifiers and sentence encoders: transformers itself is the oracle."""

import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import torch
import transformers
from conftest import draw
from pyarrow import parquet
from safetensors.torch import load_file, save_file
from tiny_networks import adaptation, images, make_hf, rename, texts, tokenizer, write_hf
from torch import nn
from torch.testing import assert_close

from adamerge import Router, load, save_mixture
from adamerge.checkpoints import open_checkpoint
from adamerge.data.tasks import TaskSpec
from adamerge.errors import InputError
from adamerge.fitting import merge_task, open_vectors
from adamerge.models import open_backbone, open_heads
from adamerge.models.hf_encoder import HFEncoder

peft = pytest.importorskip("peft")

KINDS = {
    **{f"images {kind}": lambda kind=kind: images(kind) for kind in ("ViT", "ConvNext", "ResNet")},
    **{f"texts {kind}": lambda kind=kind: texts(kind) for kind in ("Bert", "Roberta", "DistilBert")},
}
SENTENCES = ["a good b", "bad", "c red d blue a b c d"]
OLD_NAMES = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}


def inputs(modality: str) -> list[Any]:
    return SENTENCES if modality == "text" else [draw(i, i).resize((20 + i, 30)) for i in range(3)]


def logits(model: nn.Module, folder: Path, values: list[Any]) -> torch.Tensor:
    """Classify as transformers does."""
    if isinstance(values[0], str):
        batch = tokenizer()(values, return_tensors="pt", padding=True)
    else:
        processor = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
        batch = processor(values, return_tensors="pt")
    with torch.no_grad():
        return model(**batch).logits


def specs(**classes: int) -> dict[str, TaskSpec]:
    return {task: TaskSpec("memory", None, [f"{i}" for i in range(n)]) for task, n in classes.items()}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def test_backbone_and_head_together_are_the_expert(kind: str, tmp_path: Path) -> None:
    """The expert has another number of classes than the base."""
    write_hf(tmp_path / "base", make_hf(KINDS[kind]()))
    expert = make_hf(KINDS[kind](), n_classes=5, seed=1)
    write_hf(tmp_path / "expert", expert)
    vectors, backbone = open_vectors(str(tmp_path / "base"), {"x": str(tmp_path / "expert")}, force=True)
    head = open_heads(tmp_path / "base", specs(x=5), {"x": tmp_path / "expert"})["x"]
    values = inputs(backbone.modality)
    batch = torch.stack([backbone.preprocess(value) for value in values])
    features = backbone.features(vectors.merge(vectors.one_hot("x")), batch)
    expected = logits(expert, tmp_path / "expert", values)
    assert expected.shape == (3, 5)
    assert_close(head.logits(features), expected, atol=1e-4, rtol=1e-4)
    assert backbone.modality == kind.partition(" ")[0].removesuffix("s")
    assert not {*backbone.unmerged} & {*vectors.names}


class TestNames:
    """Files of other versions, bare encoders and classifiers name the same tensors differently."""

    def features(self, folder: Path) -> torch.Tensor:
        backbone = open_backbone(folder)
        batch = torch.stack([backbone.preprocess(value) for value in inputs(backbone.modality)])
        return backbone.features(dict(open_checkpoint(folder)), batch)

    def test_old_names_of_norms_are_read(self, tmp_path: Path) -> None:
        write_hf(tmp_path, make_hf(texts("Bert")))
        expected = self.features(tmp_path)
        rename(tmp_path, OLD_NAMES)
        assert torch.equal(self.features(tmp_path), expected)
        assert "bert.embeddings.LayerNorm.gamma" in open_backbone(tmp_path).names

    def test_a_bare_encoder_is_a_base_of_classifiers(self, tmp_path: Path) -> None:
        bare = make_hf(texts("Bert"), auto="AutoModel")
        write_hf(tmp_path / "bare", bare)
        model = make_hf(texts("Bert"), n_classes=4)
        model.bert.load_state_dict(bare.state_dict())
        write_hf(tmp_path / "whole", model)
        assert torch.equal(self.features(tmp_path / "bare"), self.features(tmp_path / "whole"))
        expert = make_hf(texts("Bert"), n_classes=4, seed=1)
        state = write_hf(tmp_path / "expert", expert)
        vectors, _ = open_vectors(str(tmp_path / "bare"), {"x": str(tmp_path / "expert")}, force=True)
        merged = vectors.merge(vectors.one_hot("x"))
        assert "pooler.dense.weight" in merged
        for name, tensor in merged.items():
            assert_close(tensor, state[f"bert.{name}"])

    def test_outputs_keep_the_names_of_the_bases_file(self, tmp_path: Path) -> None:
        state = write_hf(tmp_path, make_hf(images("ViT")))
        assert any(name.endswith("attention.attention.query.weight") for name in state)
        assert {*open_backbone(tmp_path).names} == {n for n in state if not n.startswith("classifier")}

    def test_a_base_that_lacks_a_layer_of_its_encoder_is_refused(self, tmp_path: Path) -> None:
        state = write_hf(tmp_path, make_hf(texts("Roberta"), auto="AutoModel"))
        kept = {name: tensor for name, tensor in state.items() if "layer.1.output.dense" not in name}
        save_file(kept, tmp_path / "model.safetensors")
        with pytest.raises(InputError, match="lack 4 tensors of the model: .*layer.1.output.dense.weight"):
            open_backbone(tmp_path)


class TestAdapters:
    """PEFT names modules as the library does, which are not always the names of files."""

    def adapter(self, folder: Path, model: Any, targets: list[str], head: str) -> Any:
        config = peft.LoraConfig(r=2, target_modules=targets, modules_to_save=[head])
        trained = peft.get_peft_model(model, config)
        with torch.no_grad():
            for parameter in trained.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.3 * torch.rand(parameter.shape))
        trained.save_pretrained(folder)
        return trained.merge_and_unload().eval()

    @pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # PEFT asks transformers
    @pytest.mark.parametrize("kind", ["images ViT", "texts Bert"])
    def test_a_lora_folder_is_an_expert_with_its_own_classes(self, kind: str, tmp_path: Path) -> None:
        base = make_hf(KINDS[kind]())
        write_hf(tmp_path / "base", base)
        model = make_hf(KINDS[kind](), n_classes=5)
        shared = {n: t for n, t in base.state_dict().items() if not n.startswith("classifier")}
        model.load_state_dict(shared, strict=False)
        targets = ["q_proj", "v_proj"] if "ViT" in kind else ["query", "value"]
        merged = self.adapter(tmp_path / "lora", model, targets, "classifier")
        vectors, backbone = open_vectors(str(tmp_path / "base"), {"x": str(tmp_path / "lora")})
        head = open_heads(tmp_path / "base", specs(x=5), {"x": tmp_path / "lora"})["x"]
        values = inputs(backbone.modality)
        batch = torch.stack([backbone.preprocess(value) for value in values])
        found = head.logits(backbone.features(vectors.merge(vectors.one_hot("x")), batch))
        assert_close(found, logits(merged, tmp_path / "base", values), atol=1e-4, rtol=1e-4)

    @pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # PEFT asks transformers
    def test_what_fits_under_no_names_is_refused(self, tmp_path: Path) -> None:
        write_hf(tmp_path / "base", make_hf(images("ViT")))
        self.adapter(tmp_path / "lora", make_hf(texts("Bert")), ["query"], "classifier")
        with pytest.raises(InputError, match="expert 'x': .* changed tensors do not fit the base"):
            open_vectors(str(tmp_path / "base"), {"x": str(tmp_path / "lora")})


class TestTexts:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        write_hf(tmp_path, make_hf(texts("Bert")))
        return tmp_path

    def test_a_text_is_its_fields_at_one_length(self, folder: Path) -> None:
        backbone = open_backbone(folder)
        tokens = backbone.preprocess("a good")
        assert (tokens.dtype, tokens.shape) == (torch.int64, (2, 24))
        assert tokens[:, :5].tolist() == [[2, 4, 8, 3, 0], [1, 1, 1, 1, 0]]
        assert json.loads(backbone.transform_key)["max_length"] == 24

    def test_texts_are_cut_where_the_user_says(self, folder: Path) -> None:
        backbone = HFEncoder(folder, max_length=6)
        assert backbone.preprocess("a b c d a b c d").shape == (2, 6)
        assert backbone.transform_key != open_backbone(folder).transform_key

    def test_padding_does_not_change_features(self, folder: Path) -> None:
        backbone, weights = open_backbone(folder), dict(open_checkpoint(folder))
        short, long = (backbone.preprocess(text) for text in ("a good", "a b c d " * 5))
        together = backbone.features(weights, torch.stack([short, long]))[:1]
        assert_close(backbone.features(weights, short[None]), together, atol=1e-5, rtol=1e-5)

    def test_a_tokenizer_of_another_kind_of_field_is_asked_for_it(self, folder: Path) -> None:
        file = folder / "tokenizer_config.json"
        names = {"model_input_names": ["input_ids", "token_type_ids", "attention_mask"]}
        file.write_text(json.dumps(json.loads(file.read_text()) | names))
        backbone = open_backbone(folder)
        assert backbone.preprocess("a").shape == (3, 24)
        tokens = torch.stack([backbone.preprocess("a")])
        assert backbone.features(dict(open_checkpoint(folder)), tokens).shape == (1, 16)

    @pytest.mark.parametrize(
        ("file", "content", "message"),
        [
            ("tokenizer.json", None, "has no tokenizer: none of tokenizer.json"),
            ("tokenizer.json", "{}", "the tokenizer of .* cannot be read"),
            (
                "tokenizer_config.json",
                '{"tokenizer_class": "PreTrainedTokenizerFast"}',
                "has no padding token",
            ),
            ("config.json", '{"model_type": "bert", "hidden_size": "x"}', "cannot read .*config.json"),
        ],
    )
    def test_a_damaged_folder_is_refused(
        self, folder: Path, file: str, content: str | None, message: str
    ) -> None:
        if content is None:
            (folder / file).unlink()
        else:
            (folder / file).write_text(content)
        with pytest.raises(InputError, match=message):
            open_backbone(folder)


class TestSentenceEncoder:
    """A folder of sentence-transformers, as that library writes it."""

    def write(self, folder: Path, *parts: str, **pooling: bool | str) -> Any:
        model = make_hf(texts("Bert"), auto="AutoModel")
        write_hf(folder, model)
        kinds = [f"sentence_transformers.models.{part}" for part in ("Transformer", "Pooling", *parts)]
        paths = ["", "1_Pooling", *(f"{i}_{part}" for i, part in enumerate(parts, 2))]
        modules = [{"path": path, "type": kind} for path, kind in zip(paths, kinds, strict=True)]
        (folder / "modules.json").write_text(json.dumps(modules))
        (folder / "1_Pooling").mkdir()
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
        return model

    @pytest.mark.parametrize("pooling", [{"pooling_mode_mean_tokens": True}, {"pooling_mode": "mean"}])
    def test_means_of_token_vectors_get_length_one(self, tmp_path: Path, pooling: dict) -> None:
        model = self.write(tmp_path, "Normalize", **pooling)
        backbone = open_backbone(tmp_path)
        batch = torch.stack([backbone.preprocess(text) for text in SENTENCES])
        found = backbone.features(dict(open_checkpoint(tmp_path)), batch)
        for text, row in zip(SENTENCES, found, strict=True):
            with torch.no_grad():
                vectors = model(**tokenizer()(text, return_tensors="pt")).last_hidden_state[0]
            assert_close(row, vectors.mean(0) / vectors.mean(0).norm(), atol=1e-5, rtol=1e-5)
        assert not [name for name in backbone.names if "pooler" in name]

    def test_other_ways_of_pooling(self, tmp_path: Path) -> None:
        model = self.write(tmp_path / "max", pooling_mode_max_tokens=True)
        self.write(tmp_path / "cls", pooling_mode_cls_token=True)
        with torch.no_grad():
            vectors = model(**tokenizer()("a good", return_tensors="pt")).last_hidden_state[0]
        for way, expected in (("max", vectors.amax(0)), ("cls", vectors[0])):
            backbone, weights = open_backbone(tmp_path / way), dict(open_checkpoint(tmp_path / way))
            batch = torch.stack([backbone.preprocess(text) for text in ("a good", "a b c d")])
            assert_close(backbone.features(weights, batch)[0], expected, atol=1e-5, rtol=1e-5)

    def test_its_tasks_need_head_files_which_read_features_as_they_are(self, tmp_path: Path) -> None:
        self.write(tmp_path / "base", pooling_mode="mean")
        write_hf(tmp_path / "x", make_hf(texts("Bert"), auto="AutoModel"))
        with pytest.raises(InputError, match="expert 'x' .* has no classifier beside its encoder"):
            open_heads(tmp_path / "base", specs(x=3), {"x": tmp_path / "x"})
        save_file({"weight": torch.ones(3, 16)}, tmp_path / "head.safetensors")
        spec = TaskSpec("memory", head=str(tmp_path / "head.safetensors"))
        assert not open_heads(tmp_path / "base", {"x": spec})["x"].normalize

    @pytest.mark.parametrize(
        ("parts", "pooling"),
        [(("Dense",), {"pooling_mode": "mean"}), ((), {"pooling_mode": "weightedmean"}), ((), {})],
    )
    def test_other_parts_are_refused(self, tmp_path: Path, parts: tuple[str, ...], pooling: dict) -> None:
        self.write(tmp_path, *parts, **pooling)
        with pytest.raises(InputError, match="makes sentence vectors by Transformer, Pooling"):
            open_backbone(tmp_path)


class TestHeads:
    def test_an_expert_without_classifier_is_told_what_to_give(self, tmp_path: Path) -> None:
        write_hf(tmp_path / "base", make_hf(texts("Bert")))
        state = load_file(tmp_path / "base" / "model.safetensors")
        bare = {n: t for n, t in state.items() if not n.startswith("classifier")}
        save_file(bare, tmp_path / "x.safetensors")
        with pytest.raises(InputError, match="has no classifier classifier.\nGive a file with `weight"):
            open_heads(tmp_path / "base", specs(x=3), {"x": tmp_path / "x.safetensors"})

    def test_a_language_model_is_named_with_what_can_be_done(self, tmp_path: Path) -> None:
        config = transformers.GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2, n_positions=16)
        for name in ("base", "x"):
            transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / name)
            tokenizer().save_pretrained(tmp_path / name)
        message = "has no classifier score: it is a GPT2LMHeadModel.\nGive .* `adamerge merge` merges any"
        with pytest.raises(InputError, match=message):
            open_heads(tmp_path / "base", specs(x=3), {"x": tmp_path / "x"})

    def test_a_model_of_one_output_has_no_classes_to_learn_from(self, tmp_path: Path) -> None:
        for name in ("base", "x"):
            write_hf(tmp_path / name, make_hf(texts("Bert"), n_classes=1))
        with pytest.raises(InputError, match="head of task 'x' has 1 output: regression and reward models"):
            open_heads(tmp_path / "base", {"x": TaskSpec(adapt="x")}, {"x": tmp_path / "x"})

    def test_a_task_without_expert_needs_a_head_file(self, tmp_path: Path) -> None:
        write_hf(tmp_path, make_hf(texts("Bert")))
        with pytest.raises(InputError, match="tasks \\['y'\\] have neither an expert nor a head file"):
            open_heads(tmp_path, specs(y=3), {})


@pytest.fixture
def tasks(tmp_path: Path) -> dict[str, TaskSpec]:
    """Two tasks of texts, a base and two experts of theirs under the tasks' names; classes are unnamed."""
    write_hf(tmp_path / "base", make_hf(texts("Bert")))
    found = {}
    for seed, (task, count) in enumerate({"mood": 2, "colour": 4}.items(), 1):
        write_hf(tmp_path / task, make_hf(texts("Bert"), n_classes=count, seed=seed))
        rows = [{"text": text, "label": i % count} for i, text in enumerate(SENTENCES * 4)]
        parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / f"{task}.parquet")
        found[task] = TaskSpec(*[str(tmp_path / f"{task}.parquet")] * 2)
    return found


def test_three_steps_on_texts_and_an_accuracy(tasks: dict[str, TaskSpec], tmp_path: Path) -> None:
    experts = {task: str(tmp_path / task) for task in tasks}
    model = merge_task(str(tmp_path / "base"), experts, tasks, force=True)
    before = model.coefficients.table()[1].clone()
    accuracy = adaptation(model, tasks, 3)
    assert set(accuracy) == set(tasks)
    assert ((model.coefficients.table()[1] - before).abs() > 0).all(0).float().mean() > 0.8


def test_a_mixture_of_texts_is_saved_and_loaded(tasks: dict[str, TaskSpec], tmp_path: Path) -> None:
    experts = {task: str(tmp_path / task) for task in tasks}
    model = merge_task(str(tmp_path / "base"), experts, tasks, coefficients=Router(), force=True)
    assert model.mixture is not None
    mixture = model.mixture.eval()
    save_mixture(mixture, tmp_path / "out", like=tmp_path / "base")
    loaded = load(tmp_path / "out")
    batch = torch.stack([mixture.backbone.preprocess(text) for text in SENTENCES])
    for task in tasks:
        assert torch.equal(loaded.logits(batch, task), mixture.logits(batch, task))
