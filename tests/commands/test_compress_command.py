"""`adamerge compress` and `decompress`: an expert goes through a small file and comes back as a model."""

import re
from pathlib import Path

import open_clip
import pytest
import torch
from conftest import TASKS
from safetensors.torch import load_file, save_file
from torch import Tensor

from adamerge.checkpoints import open_checkpoint
from adamerge.cli import main
from adamerge.compression import information_bound, open_compressed
from adamerge.static import edit
from adamerge.vectors import TaskVectors


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "cars.safetensors"


def compress(clip: Path, out: Path, *more: str) -> int:
    expert = clip / "experts" / f"{TASKS[0]}.safetensors"
    return main(["compress", "--base", str(clip / "base"), "--expert", str(expert), "--out", str(out), *more])


def decompress(base: Path, file: Path, out: Path, *more: str) -> int:
    return main(["decompress", "--base", str(base), "--file", str(file), "--out", str(out), *more])


def ternary(clip: Path, **options: object) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Give the task vector, and what the compeft edit makes of it."""
    vectors = TaskVectors.open(clip / "base", {"t": clip / "experts" / f"{TASKS[0]}.safetensors"})
    edited = edit(vectors, "compeft", **options)
    return tuple({n: stack[0] for n, stack in v.stacks()} for v in (vectors, edited))


def test_the_file_holds_the_compeft_vector(clip: Path, out: Path) -> None:
    assert compress(clip, out, "--density", "0.1", "--alpha", "2", "--value", "mean") == 0
    found = open_compressed(out, open_checkpoint(clip / "base"))
    for name, tensor in ternary(clip, density=0.1, alpha=2.0, value="mean")[1].items():
        delta = found.delta(name)
        assert torch.equal(torch.zeros_like(tensor) if delta is None else delta, tensor)
    assert found.header.recipe == {"method": "compeft", "density": 0.1, "alpha": 2.0, "value": "mean"}


def test_the_figures_are_what_they_say(clip: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compress(clip, out, "--density", "0.05") == 0
    shown = capsys.readouterr().out
    whole, coded = (torch.cat([t.flatten() for t in v.values()]) for v in ternary(clip, density=0.05))
    size, entries, kept = out.stat().st_size, len(whole), int(coded.count_nonzero())
    assert f"{size} bytes, {4 * entries / size:.1f} times less than" in shown
    assert f"({4 * entries} bytes)" in shown
    bound = information_bound(entries, kept) / entries
    assert f"{8 * size / entries:.4f} bits per entry; information bound {bound:.4f}" in shown
    assert f"{kept} of {entries} entries kept (5.00%; asked: 5.00%" in shown
    error, cosine = map(float, re.findall(r"error ([\d.]+), cosine ([\d.]+)", shown)[0])
    assert error == pytest.approx(float((whole - coded).norm() / whole.norm()), abs=1e-4)
    assert cosine == pytest.approx(float(torch.cosine_similarity(whole, coded, dim=0)), abs=1e-4)


def test_the_checkpoint_is_base_plus_vector_and_loads_without_us(clip: Path, out: Path) -> None:
    assert compress(clip, out) == 0
    assert decompress(clip / "base", out, out.parent / "model") == 0
    model = open_clip.create_model(f"local-dir:{out.parent / 'model'}")
    base, vector = open_checkpoint(clip / "base"), ternary(clip)[1]
    for name, tensor in model.state_dict().items():
        expected = base[name] + vector[name] if name in vector else base.get(name)
        assert expected is None or torch.equal(tensor, expected)


def test_tied_tensors_stay_tied(tmp_path: Path, out: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    for name in ("base", "expert"):
        weight = 0.1 * torch.randn(6, 4, generator=generator) + torch.arange(24).reshape(6, 4)
        save_file({"embed": weight, "head": weight.clone()}, tmp_path / f"{name}.safetensors")
    paths = ["--base", str(tmp_path / "base.safetensors"), "--expert", str(tmp_path / "expert.safetensors")]
    assert main(["compress", *paths, "--out", str(out)]) == 0
    assert decompress(Path(paths[1]), out, tmp_path / "model.safetensors") == 0
    model, base = load_file(tmp_path / "model.safetensors"), load_file(paths[1])
    assert torch.equal(model["embed"], model["head"])
    assert int((model["embed"] != base["embed"]).sum()) == int(0.2 * 24)


def test_a_dtype_can_be_asked_for(clip: Path, out: Path) -> None:
    assert compress(clip, out) == 0
    assert decompress(clip / "base", out, out.parent / "model", "--dtype", "float16") == 0
    assert {t.dtype for t in open_checkpoint(out.parent / "model").values()} == {torch.float16}


def test_outputs_are_replaced_only_when_told(
    clip: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = out.parent / "model"
    assert (compress(clip, out), decompress(clip / "base", out, model)) == (0, 0)
    assert (compress(clip, out), decompress(clip / "base", out, model)) == (2, 2)
    assert capsys.readouterr().err.count("exists already") == 2
    assert compress(clip, out, "--overwrite") == 0
    assert decompress(clip / "base", out, model, "--overwrite") == 0


def test_another_base_is_refused_unless_forced(
    clip: Path, out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compress(clip, out) == 0
    other = tmp_path / "other.safetensors"
    save_file({name: tensor + 1 for name, tensor in open_checkpoint(clip / "base").items()}, other)
    model = tmp_path / "model.safetensors"
    assert decompress(other, out, model) == 2
    assert "was compressed with another base" in capsys.readouterr().err
    assert not model.exists()
    assert decompress(other, out, model, "--force") == 0
    assert set(load_file(model)) == set(load_file(other))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--density", "1"), "density=1 leaves the vector as it is: nothing is compressed"),
        (("--density", "20"), "Did you mean 0.2?"),
        (("--alpha", "-1"), "alpha=-1.0 is no positive number"),
    ],
)
def test_wrong_options_leave_nothing(
    clip: Path, out: Path, more: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compress(clip, out, *more) == 2
    assert message in capsys.readouterr().err
    assert list(out.parent.iterdir()) == []


def test_an_expert_that_is_the_base_or_anothers_leaves_nothing(
    clip: Path, out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    same = ["compress", "--base", str(clip / "base"), "--expert", str(clip / "base"), "--out", str(out)]
    assert main(same) == 2
    assert "no expert differs from the base" in capsys.readouterr().err
    far = tmp_path / "far.safetensors"
    save_file({name: tensor + 99 for name, tensor in open_checkpoint(clip / "base").items()}, far)
    assert main([*same[:3], "--expert", str(far), "--out", str(out)]) == 2
    assert "farther from the base than the base is long" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [far]
