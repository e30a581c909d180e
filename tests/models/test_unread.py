"""A configuration that asks for fewer layers, or fewer biases, than the weights hold is refused by name."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_networks import images, make_hf, texts, write_hf, write_timm

from adamerge import open_backbone
from adamerge.errors import InputError
from adamerge.fitting import open_vectors
from adamerge.models.unread import left_out, require_all_read


def change(folder: Path, name: str = "config.json", *, keys: tuple[str, ...], value: Any) -> None:
    document = json.loads((folder / name).read_text())
    place = document
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    (folder / name).write_text(json.dumps(document))


def write_open_clip(folder: Path) -> None:
    from conftest import write_clip

    write_clip(folder)


MODELS: dict[str, tuple[Callable[[Path], object], str, tuple[str, ...], Any, str]] = {
    "open_clip": (
        write_open_clip,
        "open_clip_config.json",
        ("model_cfg", "vision_cfg", "layers"),
        1,
        r"leaves out 12 tensors of its weights: visual\.transformer\.resblocks\.1\.",
    ),
    "timm": (
        lambda folder: write_timm(folder, "vit"),
        "config.json",
        ("model_args", "depth"),
        1,
        r"leaves out 12 tensors of its weights: blocks\.1\.",
    ),
    "image classifier": (
        lambda folder: write_hf(folder, make_hf(images("ViT"))),
        "config.json",
        ("num_hidden_layers",),
        1,
        r"leaves out 16 tensors of its weights: .*layers?\.1\.",
    ),
    "biases": (
        lambda folder: write_hf(folder, make_hf(images("ViT"))),
        "config.json",
        ("qkv_bias",),
        False,
        r"leaves out 6 tensors of its weights: .*bias",
    ),
    "text classifier": (
        lambda folder: write_hf(folder, make_hf(texts("Bert"))),
        "config.json",
        ("num_hidden_layers",),
        1,
        r"leaves out 16 tensors of its weights: bert\.encoder\.layer\.1\.",
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_shallower_configuration_is_refused_by_the_tensors(name: str, tmp_path: Path) -> None:
    write, file, keys, value, message = MODELS[name]
    folder = tmp_path / "model"
    write(folder)
    open_backbone(folder)
    change(folder, file, keys=keys, value=value)
    with pytest.raises(InputError, match=message):
        open_backbone(folder)


@pytest.mark.parametrize("prefix", ["", "other."])
def test_a_deeper_expert_is_refused(prefix: str, tmp_path: Path) -> None:
    deep = make_hf(images("ViT"), seed=1)
    shallow = images("ViT")
    shallow.num_hidden_layers = 1
    write_hf(tmp_path / "base", make_hf(shallow))
    write_hf(tmp_path / "expert", deep)
    state = load_file(tmp_path / "expert" / "model.safetensors")
    renamed = {prefix + name: tensor for name, tensor in state.items()}
    save_file(renamed, tmp_path / "expert" / "model.safetensors", {"format": "pt"})
    change(tmp_path / "expert", keys=("num_hidden_layers",), value=1)
    with pytest.raises(InputError):
        open_vectors(str(tmp_path / "base"), {"a": str(tmp_path / "expert")})


def test_heads_poolers_towers_and_counters_may_be_left_out() -> None:
    read = ["vit.layers.0.w.weight", "vit.layers.1.w.weight", "vit.norm.weight", "vit.norm.bias"]
    left = [
        "text.layers.5.w.weight",
        "pooler.dense.weight",
        "lm_head.weight",
        "vit.mask_token",
        "logit_scale",
    ]
    left += ["logit_scale", "vit.layers.1.attn.inv_freq", "vit.norm.num_batches_tracked"]
    assert left_out(read, [*read, *left]) == []
    assert left_out(read, [*read, "vit.layers.2.w.weight"]) == ["vit.layers.2.w.weight"]
    assert left_out(read, [*read, "vit.layers.1.w.bias"]) == ["vit.layers.1.w.bias"]
    assert left_out(read, {"vit.layers.2.w.weight": torch.ones(1, dtype=torch.int64)}) == []


def test_what_the_library_itself_leaves_out_may_be_left_out() -> None:
    read, names = ["layers.0.w"], ["layers.0.w", "layers.1.w"]
    require_all_read(read, names, Path("model"), "base", [r"layers\.1\."])
    with pytest.raises(InputError, match=r"base: the configuration of model leaves out 1 tensors"):
        require_all_read(read, names, Path("model"), "base")
