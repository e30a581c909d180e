"""The library says which tensors have a row per class; the configurations say whether the classes agree."""

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from safetensors.torch import load_file
from tiny_networks import images, make_hf, texts, write_hf, write_timm

from adamerge.models.last_layers import classifies_inputs, find_last_layers, labelled_tensors

TOKENS = "AutoModelForTokenClassification"
ROWS: dict[str, tuple[Any, str | None, set[str]]] = {
    "Bert": (texts("Bert"), None, {"classifier.weight", "classifier.bias"}),
    "Roberta": (texts("Roberta"), None, {"classifier.out_proj.weight", "classifier.out_proj.bias"}),
    "tokens": (texts("Bert"), TOKENS, {"classifier.weight", "classifier.bias"}),
    "ViT": (images("ViT"), None, {"classifier.weight", "classifier.bias"}),
    "ResNet": (images("ResNet"), None, {"classifier.1.weight", "classifier.1.bias"}),
    "encoder": (texts("Bert"), "AutoModel", set()),
    "words": (texts("Bert"), "AutoModelForMaskedLM", set()),
    "answers": (texts("Bert"), "AutoModelForQuestionAnswering", set()),
}


@pytest.mark.parametrize("kind", ROWS)
def test_rows_of_transformers_models(tmp_path: Path, kind: str) -> None:
    config, auto, expected = ROWS[kind]
    state = write_hf(tmp_path, make_hf(config, auto=auto))
    assert {*labelled_tensors(tmp_path, state)} == expected
    assert {*labelled_tensors(tmp_path, [f"module.{name}" for name in state])} == {
        f"module.{name}" for name in expected
    }
    assert classifies_inputs(tmp_path) == (kind != "tokens")


def test_a_decoders_score_is_a_classifier_and_its_word_head_is_none(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=40, pad_token_id=0, **sizes)
    transformers.LlamaForSequenceClassification(config).save_pretrained(tmp_path / "reward")
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "words")
    found = [
        labelled_tensors(tmp_path / name, load_file(tmp_path / name / "model.safetensors"))
        for name in ("reward", "words")
    ]
    assert found == [("score.weight",), ()]


@pytest.mark.parametrize(("kind", "layer"), [("vit", "head"), ("resnet", "fc")])
def test_rows_of_timm_models(tmp_path: Path, kind: str, layer: str) -> None:
    state = write_timm(tmp_path, kind)
    assert {*labelled_tensors(tmp_path, state)} == {f"{layer}.weight", f"{layer}.bias"}


def test_a_model_that_no_library_knows_has_rows_of_usual_names(tmp_path: Path) -> None:
    tensors = ["encoder.x", "head.out_proj.weight", "classifier.bias", "encoder.head_norm.weight"]
    (tmp_path / "config.json").write_text("{}")
    assert labelled_tensors(tmp_path, tensors) == ()
    settings = {"architectures": ["OwnForSequenceClassification"], "model_type": "own"}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    assert labelled_tensors(tmp_path, tensors) == ("head.out_proj.weight", "classifier.bias")


class TestAgreement:
    """Rows are merged where all models name the same classes in the same order, and nowhere else."""

    def difference(self, tmp_path: Path, *names: list[str] | None) -> str:
        folders = []
        for i, own in enumerate(names):
            folder = tmp_path / str(i)
            folder.mkdir()
            labels = {} if own is None else {"id2label": dict(enumerate(own))}
            config = {"architectures": ["BertForSequenceClassification"], "model_type": "bert", **labels}
            (folder / "config.json").write_text(json.dumps(config))
            folders.append(folder)
        tensors = ["bert.x", "classifier.weight"]
        experts = {f"e{i}": (folder, tensors) for i, folder in enumerate(folders[1:])}
        return find_last_layers(folders[0], tensors, experts).difference

    def test_equal_names_agree(self, tmp_path: Path) -> None:
        assert not self.difference(tmp_path, ["ham", "spam"], ["ham", "spam"], ["ham", "spam"])

    @pytest.mark.parametrize(
        ("names", "expected"),
        [
            ([["ham", "spam"], ["ham", "spam"], ["spam", "ham"]], "row 0 is 'ham' in the base, 'spam' in"),
            ([["ham", "spam"], ["ham", "spam", "other"]], "row 2 is absent in the base, 'other' in"),
            ([None, ["ham", "spam"], ["ham", "spam"]], "named by the base (id2label"),
            ([["ham", "spam"], None], "named by expert 'e0' (id2label"),
            ([None, None], "named by the base, expert 'e0' (id2label"),
        ],
    )
    def test_others_differ(self, tmp_path: Path, names: list[list[str] | None], expected: str) -> None:
        assert expected in self.difference(tmp_path, *names)

    def test_files_without_a_configuration_are_not_trusted(self, tmp_path: Path) -> None:
        assert not self.difference(tmp_path, ["a", "b"], ["a", "b"])
        tensors = ["classifier.weight"]
        (tmp_path / "1" / "model.safetensors").touch()
        whole = {"x": (tmp_path / "1" / "model.safetensors", tensors)}
        assert not find_last_layers(tmp_path / "0", tensors, whole).difference
        for path in (tmp_path / "1" / "other.safetensors", None):
            found = find_last_layers(tmp_path / "0", tensors, {"x": (path, tensors)})
            assert found.kept == ("classifier.weight",)
