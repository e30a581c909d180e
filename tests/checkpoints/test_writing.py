"""What is written has the layout of its model, appears whole, and is readable by others."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from adamerge.checkpoints import open_checkpoint, save, save_stream, save_tensors
from adamerge.checkpoints.reading import INDEX
from adamerge.errors import InputError, NumericError
from adamerge.ownership import LIST


def state() -> dict[str, Tensor]:
    return {"b.weight": torch.arange(6.0).reshape(2, 3), "b.bias": torch.ones(2), "ids": torch.arange(3)}


@pytest.fixture
def like(tmp_path: Path) -> Path:
    """A sharded folder in mixed dtypes, with companions."""
    folder = tmp_path / "like"
    (folder / "nested").mkdir(parents=True)
    save_file({"b.weight": state()["b.weight"].half()}, folder / "one.safetensors")
    save_file({"b.bias": state()["b.bias"], "ids": state()["ids"]}, folder / "two.safetensors")
    weight_map = {"b.weight": "one.safetensors", "b.bias": "two.safetensors", "ids": "two.safetensors"}
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    for name in ("config.json", "README.md", "pytorch_model.bin"):
        (folder / name).write_text("{}")
    return folder


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "merged"


def entries(folder: Path) -> list[str]:
    """Give the names of a model's files; every folder has the list of them beside."""
    return sorted(set(os.listdir(folder)) - {LIST})


def test_a_folder_keeps_shards_dtypes_and_companions(like: Path, out: Path) -> None:
    assert save(state(), out, like=like, card="# merged") == out
    assert entries(out) == ["README.md", "config.json", INDEX, "one.safetensors", "two.safetensors"]
    assert (out / "README.md").read_text() == "# merged"
    assert json.loads((out / INDEX).read_text())["metadata"]["total_size"] == 6 * 2 + 2 * 4 + 3 * 8
    reread = open_checkpoint(out)
    assert {n: t.dtype for n, t in reread.items()} == {n: t.dtype for n, t in open_checkpoint(like).items()}
    assert all(torch.equal(reread[n].float(), t.float()) for n, t in state().items())


def test_a_file_is_written_like_a_file(tmp_path: Path, out: Path) -> None:
    save_file(state(), tmp_path / "like.safetensors")
    save(state(), out, like=tmp_path / "like.safetensors")
    assert set(load_file(out)) == set(state())


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_modes_follow_the_umask(tmp_path: Path, like: Path, out: Path, kind: str) -> None:
    save_file(state(), tmp_path / "like.safetensors")
    before = os.umask(0o027)
    try:
        save(state(), out, like=like if kind == "folder" else tmp_path / "like.safetensors")
    finally:
        os.umask(before)
    assert out.stat().st_mode & 0o777 == (0o750 if kind == "folder" else 0o640)
    assert all(path.stat().st_mode & 0o777 == 0o640 for path in out.glob("*"))


def test_open_clip_loads_the_merged_folder_without_us(clip: Path, out: Path) -> None:
    merged = {name: tensor + 1 for name, tensor in open_checkpoint(clip / "base").items()}
    save(merged, out, like=clip / "base")
    model = open_clip.create_model(f"local-dir:{out}")
    assert torch.equal(model.visual.proj, merged["visual.proj"])


def test_symlinks_and_unusual_names(tmp_path: Path, like: Path) -> None:
    (tmp_path / "link").symlink_to(like, target_is_directory=True)
    (like / "config.json").rename(tmp_path / "blob")
    (like / "config.json").symlink_to(tmp_path / "blob")  # as the hub's cache has it
    out = save(state(), tmp_path / "Modèle β [1]" / "fusionné", like=tmp_path / "link")
    assert not (out / "config.json").is_symlink()
    assert torch.equal(open_checkpoint(out)["ids"], state()["ids"])


def test_tensors_that_share_memory_are_written_apart(tmp_path: Path, out: Path) -> None:
    save_file({"a": torch.ones(2), "b": torch.ones(2)}, tmp_path / "like.safetensors")
    tied = torch.full((2,), 3.0)
    save({"a": tied, "b": tied}, out, like=tmp_path / "like.safetensors")
    assert torch.equal(load_file(out)["b"], tied)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ([("ids", torch.arange(3)), ("b.bias", torch.ones(2))], "1 tensors of .*like did not come: b.weight"),
        ([("ids", torch.arange(3))] * 2, "tensor ids was given twice"),
        ([("new", torch.ones(1))], "tensor new is not in .*like"),
        ([("ids", torch.arange(6).reshape(2, 3))], r"tensor ids has shape \[2, 3\], but \[3\] in .*like"),
        ([("ids", torch.ones(3, device="meta"))], "tensor ids is on the meta device"),
    ],
    ids=["missing", "repeated", "unknown", "shape", "meta"],
)
def test_a_stream_of_another_model_is_refused(
    like: Path, out: Path, tensors: list[tuple[str, Tensor]], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        save_stream(iter(tensors), out, like=like)
    assert entries(out.parent) == ["like"]


def test_nothing_is_visible_before_the_last_tensor_and_the_card_comes_after_it(like: Path, out: Path) -> None:
    seen = []

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in state().items():
            assert not out.exists()
            yield name, tensor
            seen.append(name)

    save_stream(tensors(), out, like=like, card=lambda: f"after {len(seen)}")
    assert (out / "README.md").read_text() == "after 3"


def test_metadata_of_the_files_is_kept_and_added_to(like: Path, out: Path) -> None:
    save_file(
        {"b.weight": state()["b.weight"]}, like / "one.safetensors", metadata={"format": "np", "by": "us"}
    )
    save_stream(state().items(), out, like=like, metadata={"method": "ties"})
    assert open_checkpoint(out).metadata == {
        out / "one.safetensors": {"format": "pt", "by": "us", "method": "ties"},
        out / "two.safetensors": {"format": "pt", "method": "ties"},
    }


def test_other_forms_of_the_weights_are_not_companions(like: Path, out: Path) -> None:
    for name in ("model.gguf", "model.onnx", "pytorch_model.bin.index.json", "tokenizer.json"):
        (like / name).write_text("{}")
    save(state(), out, like=like)
    assert entries(out) == ["config.json", INDEX, "one.safetensors", "tokenizer.json", "two.safetensors"]


@pytest.mark.parametrize("max_shard_size", ["1GB", "5KB"])
def test_transformers_loads_a_merged_language_model_without_us(
    tmp_path: Path, out: Path, max_shard_size: str
) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, tie_word_embeddings=True, **small))
    model.save_pretrained(tmp_path / "like", max_shard_size=max_shard_size)
    merged = {name: tensor + 1 for name, tensor in open_checkpoint(tmp_path / "like").items()}
    save_stream(reversed(merged.items()), out, like=tmp_path / "like")
    assert (out / INDEX).exists() == (max_shard_size == "5KB")
    found = LlamaForCausalLM.from_pretrained(out).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in merged.items())
    assert torch.equal(found["lm_head.weight"], merged["model.embed_tokens.weight"])


def test_an_existing_output_is_kept_unless_told_otherwise(like: Path, out: Path) -> None:
    save(state(), out, like=like)
    doubled = {name: 2 * tensor for name, tensor in state().items()}
    with pytest.raises(InputError, match=r"exists already\.\nChoose another path, or pass overwrite=True"):
        save(doubled, out, like=like)
    assert torch.equal(open_checkpoint(out)["ids"], state()["ids"])
    save(doubled, out, like=out, overwrite=True)  # its own layout may be the model
    assert torch.equal(open_checkpoint(out)["ids"], 2 * state()["ids"])
    assert entries(out.parent) == ["like", "merged"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": None}, "lacks 1 tensors of .* \\(ids\\)"),
        ({"new": torch.ones(1)}, "has 1 others \\(new\\)"),
        ({"b.bias": torch.ones(3)}, "1 tensors have another shape than in .*: b.bias"),
    ],
    ids=["missing", "extra", "shape"],
)
def test_a_state_of_another_model_is_refused(
    like: Path, out: Path, change: dict[str, Tensor | None], message: str
) -> None:
    wrong = {name: tensor for name, tensor in (state() | change).items() if tensor is not None}
    with pytest.raises(InputError, match=message):
        save(wrong, out, like=like)
    assert entries(out.parent) == ["like"]


INF = float("inf")
UNFIT: dict[str, tuple[Tensor, torch.dtype | None, str]] = {
    "NaN": (
        torch.tensor([[0, 0, 0], [0, float("nan"), 0]]),
        None,
        r"b.weight\[1, 1\] is not finite; nothing",
    ),
    "infinity": (torch.tensor([[0, 0, INF], [0, 0, 0]]), None, r"b.weight\[0, 2\] is not finite"),
    "NaN in half": (torch.full((2, 3), float("nan")).half(), None, r"b.weight\[0, 0\] is not finite"),
    "half that overflowed and is asked wide": (
        torch.full((2, 3), INF).half(),
        torch.bfloat16,
        "is not finite",
    ),
    "overflow": (
        torch.tensor([[0, -7e4, 0], [0, 6.6e4, 65504]]),
        None,
        r"b.weight reaches 7e\+04: 2 of its 6 values are beyond 65504, the most that torch.float16 can "
        r"hold.\nNothing was written; use --dtype bfloat16 \(dtype=torch.bfloat16\)",
    ),
    "half that overflowed before": (
        torch.tensor([[0, -INF, 0], [0, 0, 1]]).half(),
        None,
        r"overflows: 1 of its 6 values are beyond 65504, .*\n.*use --dtype bfloat16",
    ),
    "overflow of bfloat16": (torch.full((2, 3), 3.4e38), torch.bfloat16, r"use --dtype float32"),
    "overflow of fp32": (
        torch.full((2, 3), 1e300, dtype=torch.float64),
        torch.float32,
        r"use --dtype float64",
    ),
}


@pytest.mark.parametrize("what", UNFIT)
def test_values_that_cannot_be_stored_stop_with_nothing_written(like: Path, out: Path, what: str) -> None:
    tensor, dtype, message = UNFIT[what]
    with pytest.raises(NumericError, match=message) as caught:
        save(state() | {"b.weight": tensor}, out, like=like, dtype=dtype)
    assert caught.value.exit_code == 4
    assert entries(out.parent) == ["like"]


def test_sums_that_overflow_are_no_alarm(tmp_path: Path, out: Path) -> None:
    large = {"a": torch.full((9,), 3e38), "b": torch.full((9,), 6e4).half(), "c": torch.tensor([3e38, 3e38])}
    save_file(large, tmp_path / "like.safetensors")
    save(large, out, like=tmp_path / "like.safetensors")
    assert torch.equal(load_file(out)["a"], large["a"])


def test_integers_are_never_rounded(like: Path, out: Path) -> None:
    with pytest.raises(InputError, match="ids \\(torch.float32\\) has values that torch.int64 cannot hold"):
        save(state() | {"ids": torch.tensor([0.0, 1.0, 2.5])}, out, like=like)
    save(state() | {"ids": torch.tensor([0.0, 1.0, 2.0])}, out, like=like)
    assert torch.equal(open_checkpoint(out)["ids"], state()["ids"])


def test_small_files_of_our_own_take_views_and_metadata(tmp_path: Path) -> None:
    file = tmp_path / "run" / "coefficients.safetensors"
    save_tensors({"values": torch.ones(2, 3, requires_grad=True).t()}, file, {"tasks": "a,b"})
    assert load_file(file)["values"].shape == (3, 2)
