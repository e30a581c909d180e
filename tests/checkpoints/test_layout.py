"""Of several files in a folder, the one is read that the folder's own library would read."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from adamerge.checkpoints import is_adapter, open_checkpoint
from adamerge.checkpoints.layout import converted_name, weight_file
from adamerge.errors import InputError

INDEX = "model.safetensors.index.json"


def put(folder: Path, *names: str, **documents: object) -> Path:
    """Write files of one tensor, which is called as the file is, and JSON documents."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        if name.endswith(".safetensors"):
            save_file({name: torch.ones(2)}, folder / name)
        elif name == INDEX:
            (folder / name).write_text(json.dumps({"weight_map": {"shard.safetensors": "shard.safetensors"}}))
        else:
            torch.save({"w": torch.ones(2)}, folder / name)
    for name, document in documents.items():
        (folder / f"{name}.json").write_text(json.dumps(document))
    return folder


TIMM = {"architecture": "test_vit"}
ORDERS = {
    "transformers: a single file before an index": (
        ("model.safetensors", INDEX, "shard.safetensors"),
        {},
        "model.safetensors",
    ),
    "transformers: an index": ((INDEX, "shard.safetensors"), {}, "shard.safetensors"),
    "transformers: safetensors before a pickle": (
        ("pytorch_model.bin", INDEX, "shard.safetensors"),
        {},
        "shard.safetensors",
    ),
    "transformers: the file that its configuration names": (
        ("model.safetensors", "own.safetensors"),
        {"config": {"model_type": "bert", "transformers_weights": "own.safetensors"}},
        "own.safetensors",
    ),
    "transformers: its own name before open_clip's": (
        ("model.safetensors", "open_clip_model.safetensors"),
        {"config": {"model_type": "clip"}},
        "model.safetensors",
    ),
    "open_clip: its own name before transformers'": (
        ("model.safetensors", "open_clip_model.safetensors"),
        {"open_clip_config": {}},
        "open_clip_model.safetensors",
    ),
    "open_clip: transformers' name where it is alone": (
        ("model.safetensors",),
        {"open_clip_config": {}},
        "model.safetensors",
    ),
    "timm: transformers' name": (
        ("open_clip_model.safetensors", "model.safetensors"),
        {"config": TIMM},
        "model.safetensors",
    ),
}


@pytest.mark.parametrize("order", ORDERS)
def test_the_first_file_of_the_library_is_read(tmp_path: Path, order: str) -> None:
    names, documents, read = ORDERS[order]
    assert list(open_checkpoint(put(tmp_path / "x", *names, **documents))) == [read]


def test_open_clip_reads_its_pickle_before_a_file_of_transformers(tmp_path: Path) -> None:
    folder = put(tmp_path, "open_clip_pytorch_model.bin", "model.safetensors", open_clip_config={})
    with pytest.raises(InputError, match=f"adamerge convert {folder}/open_clip_pytorch_model.bin"):
        open_checkpoint(folder)


@pytest.mark.parametrize("file", ["model.fp16.safetensors", "model.safetensors.index.fp16.json"])
def test_a_variant_is_named(tmp_path: Path, file: str) -> None:
    put(tmp_path, *([file] if file.endswith(".safetensors") else []))
    (tmp_path / file).touch()
    with pytest.raises(InputError, match=f"the variant {file}"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("document", [{}, {"open_clip_config": {}}, {"config": TIMM}], ids=str)
def test_an_adapter_beside_full_weights_is_refused_with_both_names(
    tmp_path: Path, document: dict[str, object]
) -> None:
    folder = put(tmp_path, "model.safetensors", adapter_config={"peft_type": "LORA"}, **document)
    with pytest.raises(InputError, match=r"\(model.safetensors\) and a PEFT adapter \(adapter_config.json\)"):
        open_checkpoint(folder)
    assert not is_adapter(folder)
    (folder / "model.safetensors").unlink()
    assert is_adapter(folder)
    assert weight_file(folder) is None


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config (awq)"),
        ({"quantization_config": {"load_in_4bit": True}}, "quantization_config (of an unnamed method)"),
        (
            {"text_config": {"quantization_config": {"quant_method": "fp8"}}},
            "text_config.quantization",
        ),
        (
            {"thinker_config": {"text_config": {"quantization_config": {"quant_method": "gptq"}}}},
            "thinker_config.text_config.quantization_config (gptq)",
        ),
        ({"compression_config": {"quant_method": "compressed-tensors"}}, "(compressed-tensors)"),
    ],
    ids=str,
)
def test_weights_that_are_quantised_by_their_configuration_are_refused(
    tmp_path: Path, config: dict[str, object], named: str
) -> None:
    with pytest.raises(InputError) as caught:
        open_checkpoint(put(tmp_path, "model.safetensors", config=config))
    assert named in str(caught.value)
    open_checkpoint(put(tmp_path, "model.safetensors", config={"quantization_config": None}))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("pytorch_model.bin", "model.safetensors"),
        ("open_clip_pytorch_model.bin", "open_clip_model.safetensors"),
        ("adapter_model.bin", "adapter_model.safetensors"),
        ("pytorch_model-00001-of-00002.bin", "model-00001-of-00002.safetensors"),
        ("finetuned.pt", "finetuned.safetensors"),
    ],
)
def test_converted_files_get_the_names_that_readers_look_for(old: str, new: str) -> None:
    assert converted_name(Path("x") / old) == new


def test_what_may_be_meant_instead_is_named(tmp_path: Path) -> None:
    """A folder in the folder of an archive, a browser's second download, a link without its cache."""
    for name in ("nested/model", "copy", "link"):
        (tmp_path / name).mkdir(parents=True)
    put(tmp_path / "nested" / "model", "model.safetensors")
    put(tmp_path / "copy", "model.safetensors")
    (tmp_path / "copy" / "model.safetensors").rename(tmp_path / "copy" / "model (1).safetensors")
    (tmp_path / "link" / "model.safetensors").symlink_to(tmp_path / "nowhere")
    for folder, said in {
        "nested": f"It holds: model. Is {tmp_path / 'nested' / 'model'} meant?",
        "copy": f"Is {tmp_path / 'copy' / 'model (1).safetensors'} meant?",
        "link": "model.safetensors is a link to what is not there.",
    }.items():
        with pytest.raises(InputError, match=re.escape(said)):
            open_checkpoint(tmp_path / folder)
