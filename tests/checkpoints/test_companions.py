"""Beside merged weights lies all that their library needs, and nothing that it would read in their place."""

import json
from pathlib import Path

import pytest

from adamerge.checkpoints.companions import companions_of, copy_companions

MODULES = [
    {"idx": 0, "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    {"idx": 2, "path": "2_Dense", "type": "sentence_transformers.models.Dense"},
    {"idx": 3, "path": "../outside", "type": "sentence_transformers.models.Dense"},
    {"idx": 4, "path": "3_Dense/inner", "type": "sentence_transformers.models.Dense"},
]
NEEDED = (
    *("config.json", "generation_config.json", "preprocessor_config.json", "chat_template.jinja"),
    *("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.txt", "merges.txt", "bpe.codes"),
    *("modules.json", "config_sentence_transformers.json", "sentence_bert_config.json"),
    *("1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors"),
    *("3_Dense/inner/config.json", "3_Dense/inner/pytorch_model.bin"),
    *("chat_templates/tools.jinja", "vocabulary/words/de.txt"),
)
LEFT = (
    *("README.md", "adamerge.json", ".gitattributes", ".cache/huggingface/x.json", "modeling_own.py"),
    *(
        "model.safetensors",
        "model.fp16.safetensors",
        "pytorch_model.bin",
        "tf_model.h5",
        "flax_model.msgpack",
    ),
    *("pytorch_model.bin.index.json", "model.onnx", "rust_model.ot", "model.gguf", "training_args.bin"),
    *("adapter_config.json", "adapter_model.safetensors", "events.out.tfevents.17.host"),
    *("onnx/model.onnx", "onnx/config.json", "openvino/openvino_model.xml", "openvino/config.json"),
    *("checkpoint-50/optimizer.pt", "checkpoint-50/config.json", "runs/Dec/events.out.tfevents.17.host"),
    *("2_Dense/pytorch_model.bin", "2_Dense/dense.py", "9_Dense/model.safetensors", "9_Dense/config.json"),
    "vocabulary/__pycache__/words.pyc",
)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    for name in (*NEEDED, *LEFT, "../outside/model.safetensors"):
        file = tmp_path / "model" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("{}")
    (tmp_path / "model" / "modules.json").write_text(json.dumps(MODULES))
    return tmp_path / "model"


def test_all_that_a_library_needs_is_copied_and_nothing_else(model: Path, tmp_path: Path) -> None:
    (tmp_path / "copy").mkdir()
    copy_companions(model, tmp_path / "copy")
    files = {
        p.relative_to(tmp_path / "copy").as_posix() for p in (tmp_path / "copy").rglob("*") if p.is_file()
    }
    assert files == set(NEEDED)
    assert json.loads((tmp_path / "copy" / "modules.json").read_text()) == MODULES


def test_links_to_files_are_copied_and_links_to_folders_are_not_followed(model: Path, tmp_path: Path) -> None:
    (tmp_path / "blob").write_text("words")
    (model / "added_tokens.json").symlink_to(tmp_path / "blob")
    (model / "vocabulary" / "loop").symlink_to(model)
    (model / "gone.txt").symlink_to(tmp_path / "absent")
    (tmp_path / "copy").mkdir()
    copy_companions(model, tmp_path / "copy")
    assert (tmp_path / "copy" / "added_tokens.json").read_text() == "words"
    assert set(companions_of(model)) == {*NEEDED, "added_tokens.json"}


@pytest.mark.parametrize("content", ["", "[1]", '{"path": 3}', "no json"])
def test_a_strange_list_of_modules_names_none(model: Path, content: str) -> None:
    (model / "modules.json").write_text(content)
    assert "2_Dense/model.safetensors" not in companions_of(model)
    assert "1_Pooling/config.json" in companions_of(model)
