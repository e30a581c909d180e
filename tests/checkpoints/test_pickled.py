"""Pickled checkpoints give their tensors, and nothing of them is ever run."""

import builtins
import contextlib
import os
import pickle
import sys
import zipfile
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from adamerge.checkpoints import pickled
from adamerge.checkpoints.contents import choose, tensors_in
from adamerge.checkpoints.pickled import open_pickled, read_all
from adamerge.errors import InputError

pytestmark = pytest.mark.filterwarnings(
    "ignore:Couldn't retrieve source"
)  # torch, of a module without a file


class ImageEncoder(nn.Module):
    """A model of research code, with all that such models carry along."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Conv2d(3, 4, 2), nn.BatchNorm2d(4), nn.MultiheadAttention(8, 2))
        self.model.add_module("narrow", nn.Linear(3, 3).half())
        self.brain = nn.Linear(2, 2).bfloat16()
        self.tied = self.brain
        self.register_buffer("scale", torch.tensor(2.5))
        self.register_buffer("mask", torch.ones(2), persistent=False)
        self.norm = partial(nn.LayerNorm, eps=1e-6)
        self.activation = nn.functional.relu
        self.args = Namespace(save=Path("x"), device=torch.device("cpu"), dtype=torch.float16, lr=1e-5)
        self.statistics = [numpy.ones(2), numpy.float32(3), OrderedDict(a={1, 2})]


@pytest.fixture
def foreign(monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """Give a model of a module that exists only until it is pickled."""
    package, module = ModuleType("src"), ModuleType("src.modeling")
    monkeypatch.setitem(sys.modules, "src", package)
    monkeypatch.setitem(sys.modules, "src.modeling", module)
    monkeypatch.setattr(ImageEncoder, "__module__", "src.modeling")
    monkeypatch.setattr(module, "ImageEncoder", ImageEncoder, raising=False)
    torch.manual_seed(0)
    return ImageEncoder()


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the foreign module unknown again."""
    monkeypatch.delitem(sys.modules, "src.modeling")
    monkeypatch.delitem(sys.modules, "src")


WRITERS: dict[str, Callable[[Any, Path], None]] = {
    "zip": torch.save,
    "old": lambda value, file: torch.save(value, file, _use_new_zipfile_serialization=False),
} | {
    f"pickle {p}": lambda value, file, p=p: file.write_bytes(pickle.dumps(value, p))
    for p in range(pickle.HIGHEST_PROTOCOL + 1)
}
TORCH = ("zip", "old")


def tensors(file: Path, key: str = "") -> dict[str, Tensor]:
    with open_pickled(file) as found:
        return read_all(tensors_in(choose(found, key)[0]), file)


def refused(file: Path) -> str:
    with pytest.raises(InputError) as caught:
        tensors(file)
    assert str(file) in str(caught.value)
    return str(caught.value)


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].is_contiguous()
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("how", WRITERS)
def test_a_module_whose_class_is_gone_gives_its_state_dict(
    how: str, foreign: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    WRITERS[how](foreign, tmp_path / "m.pt")
    forget(monkeypatch)
    with pytest.raises((ModuleNotFoundError, pickle.UnpicklingError)):
        torch.load(tmp_path / "m.pt", weights_only=how in TORCH)
    assert_same(tensors(tmp_path / "m.pt"), foreign.state_dict())


@pytest.mark.parametrize("how", WRITERS)
def test_views_and_parameters_become_tensors_of_their_own(how: str, tmp_path: Path) -> None:
    whole = torch.arange(24.0).reshape(4, 6)
    views = {"transposed": whole.t(), "strided": whole[1:, ::2], "expanded": torch.ones(1).expand(3, 3)}
    views |= {"empty": torch.empty(0, 3), "scalar": torch.tensor(2), "parameter": nn.Parameter(whole[2])}
    views |= {"bool": torch.tensor([True, False]), "fp8": torch.ones(3).to(torch.float8_e4m3fn)}
    WRITERS[how](views, tmp_path / "m.pt")
    found = tensors(tmp_path / "m.pt")
    found["fp8"], views["fp8"] = found["fp8"].float(), views["fp8"].float()
    assert_same(found, views)
    found["transposed"].zero_()
    assert found["strided"].any()


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")  # it is what the first CLIP came as
def test_a_torchscript_archive_gives_its_state_dict(tmp_path: Path) -> None:
    script = torch.jit.script(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)))
    torch.jit.save(script, str(tmp_path / "m.pt"))
    assert_same(tensors(tmp_path / "m.pt"), script.state_dict())


W, V = torch.ones(2), torch.zeros(3)
OPTIMIZER = {"state": {0: {"exp_avg": V}}}
CHOICES: dict[str, tuple[Any, str, list[str]]] = {
    "a state dict": ({"a.w": W, "b": V, "note": "x"}, "", ["a.w", "b"]),
    "nested parts of one": ({"w": W, "head": {"b": V}}, "", ["w", "head.b"]),
    "a training checkpoint": ({"epoch": 3, "state_dict": {"w": W}, "optimizer": OPTIMIZER}, "", ["w"]),
    "beside counters": ({"best": torch.tensor(9.0), "model": {"w": W}}, "", ["w"]),
    "beside a random state": ({"rng_state": V, "model": {"w": W}}, "", ["w"]),
    "in a list": ([{"w": W}, 7], "", ["w"]),
    "by key": ({"student": {"w": W}, "teacher": {"v": V}}, "teacher", ["v"]),
    "by a longer key": ({"nets": {"a": {"w": W}, "b": {"v": V}}}, "nets.b", ["v"]),
    "an optimizer, if asked": ({"model": {"w": W}, "optimizer": OPTIMIZER}, "optimizer", ["state.0.exp_avg"]),
}


@pytest.mark.parametrize("case", CHOICES)
def test_the_model_is_found_in_what_lies_around_it(case: str, tmp_path: Path) -> None:
    value, key, names = CHOICES[case]
    torch.save(value, tmp_path / "m.pt")
    assert list(tensors(tmp_path / "m.pt", key)) == names


def test_what_contains_itself_comes_to_an_end(tmp_path: Path) -> None:
    value: dict[str, Any] = {"w": W, "twin": {"v": V}}
    value["twin"]["back"] = value
    torch.save(value, tmp_path / "m.pt")
    assert {"w", "twin.v"} <= tensors(tmp_path / "m.pt").keys()


def test_a_choice_between_models_is_the_users(tmp_path: Path) -> None:
    torch.save({"ema": {"w": W, "v": V}, "net": {"w": W}, "optimizer": OPTIMIZER}, tmp_path / "m.pt")
    expected = r"ema \(2 tensors\), net \(1 tensors\), optimizer \(1 tensors\).\nChoose one: --key ema"
    with pytest.raises(InputError, match=expected):
        tensors(tmp_path / "m.pt")
    with pytest.raises(InputError, match="there is no key 'nett'.*\nDid you mean 'net'"):
        tensors(tmp_path / "m.pt", "nett")
    torch.save({"epoch": 3}, tmp_path / "none.pt")
    with pytest.raises(InputError, match="it holds no tensors"):
        tensors(tmp_path / "none.pt")


class Evil:
    """Calls something when it is unpickled."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


def attacks(target: Path) -> dict[str, tuple[Evil, str]]:
    """Ways of making a folder."""
    code = f"__import__('os').mkdir({str(target)!r})"
    return {
        "a system call": (Evil(os.mkdir, str(target)), "posix.mkdir"),
        "eval": (Evil(builtins.eval, code), "builtins.eval"),
        "through a partial": (Evil(partial(os.mkdir, str(target))), "posix.mkdir"),
        "through a library": (Evil(numpy.testing.run_threaded, None), "numpy.testing"),
    }


@pytest.mark.parametrize("attack", ["a system call", "eval", "through a partial", "through a library"])
@pytest.mark.parametrize("how", [*TORCH, "pickle 0", "pickle 2", "pickle 4"])
@pytest.mark.parametrize("hidden", [False, True])
def test_a_malicious_file_is_refused_by_what_it_asks_for_and_not_run(
    hidden: bool, how: str, attack: str, foreign: nn.Module, tmp_path: Path
) -> None:
    evil, name = attacks(tmp_path / "pwned")[attack]
    foreign.model.surprise = evil
    WRITERS[how](foreign if hidden else {"w": W, "x": evil}, tmp_path / "m.pt")
    message = refused(tmp_path / "m.pt")
    assert f"m.pt refused: the file asks to import {name}" in message
    assert "nothing of it was run" in message
    assert not (tmp_path / "pwned").exists()


def test_an_attack_inside_a_tensors_own_bytes_is_refused_too(tmp_path: Path) -> None:
    inner = pickle.dumps(Evil(os.mkdir, str(tmp_path / "pwned")))
    outer = Evil(torch.storage._load_from_bytes, inner)
    (tmp_path / "m.pt").write_bytes(pickle.dumps({"w": outer}))
    assert "asks to import posix.mkdir" in refused(tmp_path / "m.pt")
    assert not (tmp_path / "pwned").exists()


def test_files_inside_files_are_read_once_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten of the next level in each of six levels would be a million files."""
    data = pickle.dumps({"w": 1})
    for _ in range(6):
        data = pickle.dumps([Evil(torch.storage._load_from_bytes, data) for _ in range(10)])
    (tmp_path / "m.pt").write_bytes(data)
    read, count = pickled._read_stream, []
    monkeypatch.setattr(pickled, "_read_stream", lambda stream: count.append(0) or read(stream))
    with pytest.raises(InputError):
        tensors(tmp_path / "m.pt")
    assert len(count) <= 7


def test_a_name_alone_is_enough_to_refuse(tmp_path: Path) -> None:
    (tmp_path / "m.pt").write_bytes(pickle.dumps({"w": 1, "f": os.system}))
    assert "asks to import posix.system" in refused(tmp_path / "m.pt")


def test_what_a_pickle_calls_is_data_or_refused(tmp_path: Path) -> None:
    """Nothing that it gets hold of can be called, changed or filled."""
    for opcodes in (b"]K\x01\x85R.", b"ccollections\nOrderedDict\n}X\x01\x00\x00\x00aK\x01sb0}."):
        (tmp_path / "m.pt").write_bytes(b"\x80\x02" + opcodes)
        with pytest.raises(InputError, match="int is called|list is called|holds no tensors"):
            tensors(tmp_path / "m.pt")
    assert not hasattr(OrderedDict, "a")


def bomb(file: Path) -> None:
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("m/data.pkl", bytes(2**25))


def archive_without_pickle(file: Path) -> None:
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("weights.npy", b"x")


def million_paths(file: Path) -> None:
    parts: dict[str, Any] = {"w": W}
    for _ in range(20):
        parts = {"a": parts, "b": parts}
    torch.save({"w": parts, "v": W}, file)


def big_endian(file: Path) -> None:
    torch.save({"w": W}, file)
    with zipfile.ZipFile(file) as old:
        entries = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(file, "w") as new:
        for name, content in entries.items():
            new.writestr(name, b"big" if name.endswith("byteorder") else content)


HOPELESS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a page": (lambda file: file.write_bytes(b"<html>404</html>"), "an HTML page"),
    "a pointer": (lambda file: file.write_bytes(b"version https://git-lfs.github.com/spec"), "git-LFS"),
    "nothing": (lambda file: file.write_bytes(b""), "0 bytes"),
    "safetensors": (lambda file: save_file({"w": W}, file), "looks like safetensors"),
    "a zip bomb": (bomb, "refused: .* would become 33.6 MB"),
    "a tensor of a terabyte": (
        lambda file: torch.save({"w": torch.ones(1).expand(10**12)}, file),
        "would become 4000.0 GB",
    ),
    "another archive": (archive_without_pickle, "an archive without data.pkl"),
    "a million paths to one tensor": (million_paths, "nested without end"),
    "two of one name": (lambda file: torch.save({"a.w": W, "a": {"w": W}}, file), "two tensors named a.w"),
    "another machine's": (big_endian, "big-endian"),
    "sparse": (
        lambda file: torch.save({"w": torch.eye(3).to_sparse()}, file),
        "a kind that safetensors does not have .sparse_tensor.",
    ),
    "on no device": (
        lambda file: torch.save({"w": torch.ones(2, device="meta")}, file),
        "a kind that .*meta_tensor",
    ),
    "conjugated": (
        lambda file: torch.save({"w": torch.ones(2, dtype=torch.complex64).conj()}, file),
        "a kind that .*conj",
    ),
    "a folder": (lambda file: file.mkdir(), "is no file"),
}


@pytest.mark.parametrize("case", HOPELESS)
def test_what_cannot_be_read_is_told(case: str, tmp_path: Path) -> None:
    write, told = HOPELESS[case]
    write(tmp_path / "m.pt")
    with pytest.raises(InputError, match=told):
        tensors(tmp_path / "m.pt")


@pytest.mark.parametrize("how", [*TORCH, "pickle 4"])
def test_a_file_that_is_cut_off_anywhere_is_refused(how: str, tmp_path: Path) -> None:
    WRITERS[how](nn.Linear(30, 30), tmp_path / "m.pt")
    whole = (tmp_path / "m.pt").read_bytes()
    for kept in (1, 3, 20, 200, 1000, len(whole) // 2, len(whole) - 1):
        (tmp_path / "m.pt").write_bytes(whole[:kept])
        refused(tmp_path / "m.pt")


SMALL = [pickle.dumps({"w": W, "p": Path("x"), "s": {1}, "n": Namespace(a=1)}, p) for p in range(6)]


@given(which=st.sampled_from(SMALL), at=st.integers(0, 400), flip=st.integers(1, 255))
def test_no_damage_makes_it_do_anything_else(
    which: bytes, at: int, flip: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    data = bytearray(which)
    data[at % len(data)] ^= flip
    file = tmp_path_factory.getbasetemp() / "flipped.pt"
    file.write_bytes(data)
    with contextlib.suppress(InputError):
        assert all(isinstance(tensor, Tensor) for tensor in tensors(file).values())
