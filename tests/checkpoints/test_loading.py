"""The line that opens a merged model is right for every layout that is written."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from adamerge.checkpoints import loading_advice, loading_code

OWN = {"normalize": False, "names": {"weight": "classifier.weight"}}


@pytest.mark.parametrize(
    ("files", "code"),
    [
        ({"open_clip_config.json": {}}, "open_clip.create_model('local-dir:{}')"),
        ({"config.json": {"architectures": ["ViTModel"]}}, "transformers.ViTModel.from_pretrained('{}')"),
        ({"config.json": {"architecture": "resnet18"}}, "timm.create_model('local-dir:{}', pretrained=True)"),
        (
            {"modules.json": [], "config.json": {"architectures": ["BertModel"]}},
            "sentence_transformers.SentenceTransformer('{}')",
        ),
        ({"adamerge.json": {"kind": "mixture"}, "open_clip_config.json": {}}, "adamerge.load('{}')"),
        (
            {
                "adamerge.json": {"kind": "checkpoint", "heads": {"cars": OWN, "pets": OWN}},
                "config.json": {"architectures": ["ViTForImageClassification"]},
            },
            "adamerge.load('{}')",
        ),
        (
            {
                "adamerge.json": {"kind": "checkpoint", "heads": {"cars": OWN}},
                "config.json": {"architectures": ["LlamaForCausalLM"]},
            },
            "adamerge.load('{}')",
        ),
        (
            {
                "adamerge.json": {"kind": "checkpoint", "heads": {"cars": {}}},
                "config.json": {"architectures": ["CLIPModel"]},
            },
            "transformers.CLIPModel.from_pretrained('{}')",
        ),
        (
            {
                "adamerge.json": {"kind": "checkpoint", "heads": {"merged": OWN}},
                "config.json": {"architectures": ["BertForSequenceClassification"]},
            },
            "transformers.BertForSequenceClassification.from_pretrained('{}')",
        ),
        ({}, "adamerge.open_checkpoint('{}')"),
        ({"config.json": 3}, "adamerge.open_checkpoint('{}')"),
    ],
)
def test_a_folder_is_opened_by_its_own_library(files: dict[str, Any], code: str, tmp_path: Path) -> None:
    for name, document in files.items():
        (tmp_path / name).write_text(json.dumps(document))
    assert loading_code(tmp_path) == code.format(tmp_path)


def test_a_file_is_read_by_safetensors(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    assert loading_code(file) == f"safetensors.torch.load_file('{file}')"


def test_classifiers_of_experts_can_be_exported(tmp_path: Path) -> None:
    folder = tmp_path / "two words"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"architectures": ["ViTForImageClassification"]}))
    assert loading_advice(folder) == f"Load it: {loading_code(folder)}"
    (folder / "adamerge.json").write_text(json.dumps({"kind": "checkpoint", "heads": {"cars": OWN}}))
    line = (
        f"adamerge.load({str(folder)!r}); plain classifiers: adamerge export '{folder}' --task NAME --out DIR"
    )
    assert loading_advice(folder) == f"Load it: {line}"
    save_file({"heads/cars/up": torch.ones(2, 2)}, folder / "heads.safetensors")  # Surgery
    assert loading_advice(folder) == f"Load it: adamerge.load({str(folder)!r})"
