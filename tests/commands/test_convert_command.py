"""`adamerge convert`: from a pickle of code that is gone to an expert that merges."""

import json
import os
import pickle
import shlex
import sys
from pathlib import Path
from types import ModuleType

import open_clip
import pytest
import torch
from conftest import tiny_config
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from adamerge.checkpoints import open_checkpoint
from adamerge.cli import main
from adamerge.digests import sha256
from adamerge.errors import InputError


class ImageEncoder(nn.Module):
    """What task-vector research code keeps: a CLIP without its text transformer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = open_clip.CLIP(**tiny_config()["model_cfg"])
        del self.model.transformer


@pytest.fixture(scope="module")
def expert() -> nn.Module:
    """Give an expert of the base that `conftest.py` writes."""
    encoder = ImageEncoder()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape))
    return encoder


@pytest.fixture
def old(expert: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give an expert as its authors published it: pickled, of a module that nobody has."""
    module = ModuleType("src.modeling")
    monkeypatch.setattr(module, "ImageEncoder", ImageEncoder, raising=False)
    monkeypatch.setattr(ImageEncoder, "__module__", "src.modeling")
    with monkeypatch.context() as known:
        known.setitem(sys.modules, "src", ModuleType("src"))
        known.setitem(sys.modules, "src.modeling", module)
        (tmp_path / "finetuned.pt").write_bytes(pickle.dumps(expert))
    return tmp_path / "finetuned.pt"


def test_an_old_expert_is_converted_described_and_merges(
    old: Path, expert: nn.Module, clip: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", str(old)]) == 0
    said = capsys.readouterr().out
    assert f"{old} holds src.modeling.ImageEncoder.\n" in said
    assert "Names: model.visual (" in said
    looks = "It looks like the image encoder of open_clip (width 16, patch 7, 2 blocks) under the prefix "
    assert looks + "'model.'; for a base in that layout: --strip model." in said
    assert list(load_file(old.with_suffix(".safetensors"))) == sorted(expert.state_dict())

    new = old.with_name("new.safetensors")
    assert main(["convert", str(old), "--key", "model", "--out", str(new)]) == 0
    whole = load_file(new)
    assert main(["convert", str(old), "--strip", "model.", "--out", str(new), "--overwrite"]) == 0
    found = load_file(new)
    assert found.keys() == whole.keys()
    for name, tensor in expert.state_dict().items():
        assert torch.equal(found[name.removeprefix("model.")], tensor)
    with safe_open(new, "pt") as file:
        assert file.metadata()["source_sha256"] == sha256(old)

    given = ["--base", str(clip / "base"), "--experts", f"cars={new}", "--allow_missing", "transformer.*"]
    assert main(["merge", "average", *given, "--out", str(old.parent / "merged")]) == 0


def test_what_is_left_out_is_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = {"module.w": torch.ones(2), "module.b": torch.ones(1, dtype=torch.int64)}
    torch.save({"epoch": 3, "state_dict": state, "optimizer": {}}, tmp_path / "epoch_3.pt")
    assert main(["convert", str(tmp_path / "epoch_3.pt"), "--strip", "module."]) == 0
    said = capsys.readouterr().out
    assert "epoch_3.safetensors: 2 tensors (1 float32, 1 int64)" in said
    assert "Left out: epoch, optimizer." in said


def test_mistakes_leave_nothing_behind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"a.w": torch.ones(2), "a.a.w": torch.ones(2)}, tmp_path / "m.pt")
    torch.save({"x": torch.ones(2), "y": os.system}, tmp_path / "evil.pt")
    mistakes = (
        (["m.pt", "--strip", "modul."], "no name begins with 'modul.'.\nNames begin with: a.w (1), a.a (1)."),
        (["m.pt", "--strip", "a.w"], "one cannot be"),
        (["m.pt", "--key", "b"], "there is no key 'b'"),
        (["evil.pt"], "refused: the file asks to import posix.system"),
        (["nowhere.pt"], "nowhere.pt is no file"),
        (["m.pt", "--out", str(tmp_path / "m.pt")], "exists already"),
    )
    for (file, *options), told in mistakes:
        assert main(["convert", str(tmp_path / file), *options]) == 2
        assert told in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evil.pt", "m.pt"]


class TestAdvice:
    """What a message advises works when it is followed."""

    def test_a_folder_with_a_pickle_alone_is_read_after_its_advice(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        state = {"layer.weight": torch.ones(2, 2), "norm.weight": torch.ones(2)}
        for name in ("base", "expert"):
            (tmp_path / name).mkdir()
            changed = {n: tensor + (name == "expert") for n, tensor in state.items()}
            torch.save(changed, tmp_path / name / "pytorch_model.bin")
        words = ["merge", "average", "--base", str(tmp_path / "base"), "--out", str(tmp_path / "out")]
        words += ["--experts", f"x={tmp_path / 'expert'}", "--force", "true"]
        for _ in ("base", "expert"):
            assert main(words) == 2
            advice = capsys.readouterr().err.partition("adamerge convert ")[2].split()[0]
            assert main(["convert", advice]) == 0
        assert main(words) == 0
        merged = load_file(tmp_path / "out" / "model.safetensors")
        assert torch.equal(merged["norm.weight"], torch.full((2,), 2.0))

    def test_pickled_shards_are_converted_by_their_index(self, tmp_path: Path) -> None:
        names = {"a": "pytorch_model-00001-of-00002.bin", "b": "pytorch_model-00002-of-00002.bin"}
        for tensor, file in names.items():
            torch.save({tensor: torch.ones(3)}, tmp_path / file)
        index = tmp_path / "pytorch_model.bin.index.json"
        index.write_text(json.dumps({"weight_map": names}))
        with pytest.raises(InputError, match=f"adamerge convert {index}"):
            open_checkpoint(tmp_path)
        assert main(["convert", str(index)]) == 0
        assert set(open_checkpoint(tmp_path)) == {"a", "b"}

    def test_a_missing_shard_is_named_before_anything_is_written(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        torch.save({"a": torch.ones(3)}, tmp_path / "pytorch_model-00001-of-00002.bin")
        names = {"a": "pytorch_model-00001-of-00002.bin", "b": "pytorch_model-00002-of-00002.bin"}
        index = tmp_path / "pytorch_model.bin.index.json"
        index.write_text(json.dumps({"weight_map": names}))
        before = sorted(tmp_path.iterdir())
        assert main(["convert", str(index)]) == 2
        assert f"1 of 2 shards are missing: {names['b']}." in capsys.readouterr().err
        assert sorted(tmp_path.iterdir()) == before

    @pytest.mark.parametrize("name", ["best.pt", "best model.pth", "model.safetensors"])
    def test_a_pickled_file_is_converted_by_its_advice(self, tmp_path: Path, name: str) -> None:
        """Also where its name has a blank, or is that of another format."""
        torch.save({"w": torch.ones(3)}, tmp_path / name)
        with pytest.raises(InputError) as caught:
            open_checkpoint(tmp_path / name)
        advice = str(caught.value).splitlines()[1]
        command, new = advice.partition(": adamerge ")[2].removesuffix(")").split(" (then give ")
        assert main(shlex.split(command)) == 0
        assert set(open_checkpoint(new)) == {"w"}

    def test_names_of_a_safetensors_file_are_stripped(self, tmp_path: Path) -> None:
        save_file({"module.w": torch.ones(2)}, tmp_path / "old.safetensors")
        words = ["convert", str(tmp_path / "old.safetensors"), "--strip", "module."]
        assert main(words) == 2
        assert main([*words, "--out", str(tmp_path / "new.safetensors")]) == 0
        assert list(load_file(tmp_path / "new.safetensors")) == ["w"]
