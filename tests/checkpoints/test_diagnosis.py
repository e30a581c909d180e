"""What a file really is that safetensors refuses, told without running any of it."""

import io
import os
import pickle
import pickletools
import re
import zipfile
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from adamerge.checkpoints import open_checkpoint
from adamerge.checkpoints.diagnosis import imports_of, in_units
from adamerge.errors import InputError


@pytest.fixture
def file(tmp_path: Path) -> Path:
    save_file({"w": torch.arange(6.0)}, tmp_path / "any.safetensors")
    return tmp_path / "any.safetensors"


def refused(file: Path) -> str:
    with pytest.raises(InputError) as caught:
        open_checkpoint(file, role="expert 'cars'")
    assert caught.value.exit_code == 2
    assert str(caught.value).startswith(f"expert 'cars': {file} ")
    return str(caught.value)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3400000000\n"


def archived(content: bytes) -> bytes:
    """An archive that holds one file, as people pack model folders."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("model/model.safetensors", content)
    return stream.getvalue()


DAMAGED: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "truncated": (lambda b: b[:-5], "cut off at 83 of 88 bytes.\nDownload it again"),
    "cut inside the header": (
        lambda b: b[:40],
        "cut off inside its header (or is no safetensors file): 40 bytes",
    ),
    "empty": (lambda b: b"", "cut off inside its header (or is no safetensors file): 0 bytes"),
    "a git-LFS pointer": (lambda b: POINTER, "git-LFS pointer (72 bytes) to 3.4 GB.\nRun `git lfs pull`"),
    "half a git-LFS pointer": (lambda b: POINTER[:50], "it is a git-LFS pointer.\n"),
    "an HTML page": (
        lambda b: b"\n<!DOCTYPE html><html>404</html>" + bytes(12000),
        "an HTML page (12.0 kB) was saved instead of weights",
    ),
    "half an archive": (lambda b: b"PK\x03\x04" + bytes(50), "it is a damaged or cut-off archive"),
    "another archive": (archived, "it is an archive of other files than torch.save's.\nUnpack it"),
    "GGUF": (lambda b: b"GGUF" + bytes(60), "it is GGUF, llama.cpp's format.\nGive the same model as"),
    "HDF5": (lambda b: b"\x89HDF\r\n" + bytes(60), "it is HDF5, as Keras writes it."),
    "a header of noise": (lambda b: (20).to_bytes(8, "little") + b"x" * 30, "its header is damaged"),
    "trailing bytes": (lambda b: b + b"more", "it holds 92 bytes where its header describes 88"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_file_is_diagnosed(file: Path, damage: str) -> None:
    change, reason = DAMAGED[damage]
    file.write_bytes(change(file.read_bytes()))
    assert reason in refused(file)


def test_a_header_whose_length_begins_like_a_pickle_is_still_a_header(tmp_path: Path) -> None:
    (tmp_path / "any.pt").write_bytes((0x280).to_bytes(8, "little") + b"{" + b" " * 9)
    assert "cut off inside its header" in refused(tmp_path / "any.pt")


@pytest.mark.parametrize(
    ("sizes", "text"),
    [
        ((7,), "7 bytes"),
        ((0, 999), "0 of 999 bytes"),
        ((1200,), "1.2 kB"),
        ((1_200_000_000, 3_400_000_000), "1.2 of 3.4 GB"),
        ((40_000, 3_400_000), "0.0 of 3.4 MB"),
        ((3_400_000_000, 3_400_000_005), "3400000000 of 3400000005 bytes"),
    ],
)
def test_sizes_are_written_for_people(sizes: tuple[int, ...], text: str) -> None:
    assert in_units(*sizes) == text


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("as_zip", [True, False])
@pytest.mark.parametrize("name", ["expert.pt", "expert.safetensors"])
def test_a_malicious_pickle_is_refused_by_what_it_imports_and_never_run(
    tmp_path: Path, name: str, as_zip: bool
) -> None:
    content = {"w": torch.ones(2), "x": Evil(tmp_path / "pwned")}
    torch.save(content, tmp_path / name, _use_new_zipfile_serialization=as_zip)
    assert f"{name} refused: the file asks to import posix.mkdir.\nLoading it would run" in refused(
        tmp_path / name
    )
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("as_zip", [True, False])
def test_a_plain_state_dict_is_to_be_converted(tmp_path: Path, as_zip: bool) -> None:
    plain = nn.Linear(2, 2).state_dict() | {
        "half": torch.ones(1).half(),
        "step": 3,
        "p": nn.Linear(1, 1).bias,
    }
    torch.save(plain, tmp_path / "expert.pt", _use_new_zipfile_serialization=as_zip)
    assert "it is a pickle, which can run code.\nRead it without running it: adamerge convert" in refused(
        tmp_path / "expert.pt"
    )


def test_a_pickled_module_is_no_state_dict(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "expert.pt")
    assert "asks to import torch.nn.modules.linear.Linear" in refused(tmp_path / "expert.pt")


@pytest.mark.parametrize("name", ["src.modeling ImageEncoder", "open_clip.model VisualTransformer"])
def test_models_of_research_code_are_recognised(tmp_path: Path, name: str) -> None:
    (tmp_path / "expert.pt").write_bytes(b"\x80\x02c" + name.replace(" ", "\n").encode() + b"\n.")
    message = refused(tmp_path / "expert.pt")
    assert f"asks to import {name.replace(' ', '.')}.\nIt is a whole model of task-vector research" in message


def test_what_no_model_needs_is_named_first(tmp_path: Path) -> None:
    (tmp_path / "expert.pt").write_bytes(b"\x80\x02csrc.modeling\nImageEncoder\ncos\nsystem\n.")
    assert "asks to import os.system, src.modeling.ImageEncoder." in refused(tmp_path / "expert.pt")


def test_a_torchscript_archive_is_recognised(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "expert.pt", "w") as archive:
        archive.writestr("model/constants.pkl", pickle.dumps(()))
    assert "it is a TorchScript archive, which is code" in refused(tmp_path / "expert.pt")


def test_a_damaged_entry_of_an_archive_is_no_surprise(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "expert.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("data.pkl", bytes(1000))
    content = bytearray((tmp_path / "expert.pt").read_bytes())
    content[40:44] = b"\xff" * 4
    (tmp_path / "expert.pt").write_bytes(content)
    assert "it is a damaged or cut-off archive" in refused(tmp_path / "expert.pt")


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_imports_are_found_in_every_protocol(protocol: int) -> None:
    """Protocol 4 and later take names from the stack and the memo."""
    content = [Namespace(a=1), Namespace(b=2), "argparse", re.compile("x"), Evil(Path("x"))]
    expected = {"argparse.Namespace", "re._compile", "posix.mkdir"}
    assert expected <= set(imports_of(pickle.dumps(content, protocol)))


@given(data=st.binary(max_size=200), cut=st.integers(0, 60))
def test_no_bytes_make_it_fail(data: bytes, cut: int) -> None:
    hostile = pickle.dumps([Evil(Path("x")), data])[: -cut or None]
    assert set(imports_of(hostile)) <= {"posix.mkdir"}
    for name in imports_of(data):
        assert isinstance(name, str)


def test_an_import_without_names_is_shown_as_it_is() -> None:
    code = next(op.code for op in pickletools.opcodes if op.name == "STACK_GLOBAL")
    assert imports_of(b"\x80\x04" + code.encode("latin1") + b".") == [""]
