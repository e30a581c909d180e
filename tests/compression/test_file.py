"""Compressed experts are lossless states, bound to their base, and no damage goes unseen."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from adamerge import compression
from adamerge.compression import (
    CompressedExpert,
    is_compressed,
    open_compressed,
    save_compressed,
)
from adamerge.errors import InputError
from adamerge.state import digest
from adamerge.vectors import TaskVectors
from adamerge.vectors.streamed import Deltas
from adamerge.vectors.ternary import TernaryCodec

SCALE = 2.0**-9


def base() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "scalar": (),
        "bias": (25,),
        "weight": (30, 20),
        "kernel": (4, 3, 2, 2),
        "still": (9,),
        "none": (0, 3),
    }
    state = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return state | {"weight": state["weight"].bfloat16(), "ids": torch.arange(4)}


def vector(share: float = 0.3, seed: int = 1) -> dict[str, Tensor]:
    """Give a ternary vector that leaves "still" alone."""
    generator = torch.Generator().manual_seed(seed)

    def signs(tensor: Tensor) -> Tensor:
        drawn = torch.randn(tensor.shape, generator=generator).sign()
        return SCALE * drawn * (torch.rand(tensor.shape, generator=generator) < share)

    vectors = {n: signs(t) for n, t in base().items() if t.is_floating_point()}
    return vectors | {"still": torch.zeros(9), "scalar": torch.tensor(-SCALE)}


def write(path: Path, **options: object) -> compression.Header:
    return save_compressed(vector().items(), path, base=base(), recipe={"density": 0.3}, **options)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    write(tmp_path / "cars.safetensors")
    return tmp_path / "cars.safetensors"


@pytest.fixture
def expert(file: Path) -> CompressedExpert:
    return open_compressed(file, base())


def test_the_vector_comes_back_without_loss(expert: CompressedExpert) -> None:
    for name, tensor in vector().items():
        delta = expert.delta(name)
        assert torch.equal(torch.zeros_like(tensor) if delta is None else delta, tensor)


@settings(max_examples=40, deadline=None)
@given(
    share=st.sampled_from([0.0, 0.02, 0.5, 1.0]),
    seed=st.integers(0, 99),
    scale=st.floats(2**-30, 9, width=32),
)
def test_any_share_and_scale(
    tmp_path_factory: pytest.TempPathFactory, share: float, seed: int, scale: float
) -> None:
    wanted = {name: tensor / SCALE * scale for name, tensor in vector(share, seed).items()}
    path = tmp_path_factory.mktemp("any") / "x"
    header = save_compressed(wanted.items(), path, base=base(), recipe={})
    assert (header.kept, header.entries) == (
        sum(int(t.count_nonzero()) for t in wanted.values()),
        sum(t.numel() for t in wanted.values()),
    )
    found = open_compressed(path, base())
    assert all(torch.equal(found[n].float(), base()[n].float() + t) for n, t in wanted.items())


def test_it_is_a_state_by_the_bases_names(expert: CompressedExpert, file: Path) -> None:
    assert list(expert) == list(base())
    assert len(expert) == len(base())
    assert torch.equal(expert["weight"], base()["weight"].float() + vector()["weight"])
    assert torch.equal(expert["ids"], base()["ids"])
    assert "bias" in expert
    assert "other" not in expert
    assert expert.info("weight") == ((30, 20), torch.float32)
    assert expert.info("ids") == ((4,), torch.int64)
    assert (expert.root, expert.files) == (file, (file,))


def test_what_is_unchanged_costs_nothing(expert: CompressedExpert) -> None:
    assert set(expert.header.streams) == {"scalar", "bias", "weight", "kernel"}
    assert expert.delta("still") is None
    assert expert.delta("ids") is None


def test_tied_names_share_one_code(tmp_path: Path) -> None:
    tied = base() | {"head": base()["weight"].clone()}
    header = save_compressed(
        vector().items(), tmp_path / "x", base=tied, recipe={}, aliases={"head": "weight"}
    )
    assert "head" not in header.streams
    expert = open_compressed(tmp_path / "x", tied)
    assert torch.equal(expert["head"], expert["weight"])
    assert expert.info("head") == expert.info("weight")
    with pytest.raises(InputError, match="1 of 5 tensors .*: head"):
        open_compressed(tmp_path / "x", base(), force=True)


def test_it_merges_like_any_expert_and_stays_ternary(expert: CompressedExpert) -> None:
    assert isinstance(expert, Deltas)
    for codec in ("stream", TernaryCodec()):
        vectors = TaskVectors.open(base(), {"cars": expert}, codec)
        for name, tensor in vector().items():
            assert torch.equal(vectors.blocks[name].dense()[0], tensor)
    assert vectors.digests["cars"] == expert.file_digest()


def test_the_file_is_plain_safetensors_with_a_json_header(file: Path) -> None:
    with safe_open(str(file), "pt") as opened:
        assert opened.get_tensor("streams").dtype == torch.uint8
        header = json.loads(opened.metadata()["header"])
    assert header["base"] == digest(base())
    assert header["recipe"] == {"density": 0.3}
    assert header["scale"] == SCALE
    assert header["streams"]["weight"][:2] == ["bfloat16", [30, 20]]
    assert is_compressed(file)


def test_an_existing_file_is_replaced_only_when_told(file: Path) -> None:
    before = file.read_bytes()
    with pytest.raises(InputError, match="exists already"):
        write(file)
    write(file, overwrite=True)
    assert file.read_bytes() == before


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("bias", torch.linspace(0, 1, 25), "not ternary: bias has magnitudes other than 0.00195"),
        ("still", 2 * SCALE * torch.ones(9), "not ternary: still has magnitudes other than 0.00195"),
        ("bias", torch.zeros(6), "the base has no bias of shape \\[6\\]"),
        ("other", torch.zeros(6), "the base has no other of shape \\[6\\]"),
    ],
)
def test_vectors_that_do_not_fit_are_refused(tmp_path: Path, name: str, tensor: Tensor, message: str) -> None:
    wrong = vector() | {name: tensor}
    with pytest.raises(InputError, match=message):
        save_compressed(wrong.items(), tmp_path / "x", base=base(), recipe={})
    assert list(tmp_path.iterdir()) == []


def test_another_base_is_refused_unless_forced(file: Path) -> None:
    other = base() | {"still": torch.ones(9)}
    with pytest.raises(InputError, match="with another base, whose digest is .*\n.*force=True"):
        open_compressed(file, other)
    assert torch.equal(open_compressed(file, other, force=True)["still"], torch.ones(9))
    assert open_compressed(file, other, base_digest=digest(base())).delta("still") is None


def test_a_base_of_another_shape_is_refused_always(file: Path) -> None:
    other = {n: t for n, t in base().items() if n != "bias"} | {"scalar": torch.ones(1)}
    with pytest.raises(InputError, match="expert 'cars': 2 of 4 tensors of .* missing .*: scalar, bias"):
        open_compressed(file, other, role="expert 'cars'", force=True)


def test_other_files_are_refused(tmp_path: Path) -> None:
    save_file({"streams": torch.ones(2)}, tmp_path / "plain.safetensors")
    with pytest.raises(InputError, match="is no compressed expert"):
        open_compressed(tmp_path / "plain.safetensors", base())
    (tmp_path / "text").write_text("hello, world")
    for path in (tmp_path / "plain.safetensors", tmp_path / "text", tmp_path / "none", tmp_path):
        assert not is_compressed(path)
        with pytest.raises(InputError, match="compressed expert: "):
            open_compressed(path, base())


def test_a_later_version_is_refused(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adamerge.compression.header.VERSION", "2")
    with pytest.raises(InputError, match="has format version '1'; '2' is known here"):
        open_compressed(file, base())


def test_a_file_cut_off_anywhere_is_refused(file: Path) -> None:
    whole = file.read_bytes()
    for length in range(0, len(whole), 37):
        file.write_bytes(whole[:length])
        with pytest.raises(InputError, match="cut off|damaged|cannot be read"):
            open_compressed(file, base())


@pytest.mark.usefixtures("unchecked")  # a check of annotations looks at values
def test_a_flipped_bit_anywhere_is_noticed(file: Path) -> None:
    whole, known = file.read_bytes(), digest(base())
    for position in range(0, len(whole), 5):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        file.write_bytes(damaged)
        with pytest.raises(InputError):
            list(open_compressed(file, base(), base_digest=known).values())


def test_a_header_that_contradicts_its_bytes_is_refused(file: Path) -> None:
    with safe_open(str(file), "pt") as opened:
        metadata, streams = opened.metadata(), opened.get_tensor("streams")
    save_file({"streams": streams[:-1].clone()}, file, metadata)
    with pytest.raises(InputError, match="has another length than its header says"):
        open_compressed(file, base())
    save_file({"streams": streams}, file, metadata | {"header": "{}"})
    with pytest.raises(InputError, match="the header of .* is damaged"):
        open_compressed(file, base())
