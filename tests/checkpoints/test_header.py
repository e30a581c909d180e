"""Files are laid out as safetensors lays them out: any tensors, in any order of arrival."""

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from adamerge.checkpoints import save, save_stream
from adamerge.state import as_bytes

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
DTYPES += [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool]


@st.composite
def models(draw: st.DrawFn) -> dict[str, Tensor]:
    """Tensors of any name, dtype and rank up to 4, empty ones too."""
    names = draw(
        st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1, max_size=8, unique=True)
    )
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    shapes = st.lists(st.integers(0, 3), max_size=4)
    return {
        name: (9 * torch.randn(draw(shapes), generator=generator)).to(draw(st.sampled_from(DTYPES)))
        for name in names
        if name != "__metadata__"
    }


@given(model=models(), data=st.data())
def test_any_tensors_in_any_order_give_the_file_that_safetensors_writes(
    model: dict[str, Tensor], data: st.DataObject
) -> None:
    order = data.draw(st.permutations(list(model)))
    with TemporaryDirectory() as folder:
        like, out = Path(folder, "like.safetensors"), Path(folder, "out.safetensors")
        save_file(model, like, metadata={"format": "pt"})
        save_stream(((name, model[name]) for name in order), out, like=like)
        assert out.read_bytes() == like.read_bytes()
        reread = load_file(out)
        assert all(torch.equal(as_bytes(reread[name]), as_bytes(model[name])) for name in model)


@given(model=models(), asked=st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]))
def test_a_dtype_that_was_asked_for_is_that_of_all_whole_floats(
    model: dict[str, Tensor], asked: torch.dtype
) -> None:
    with TemporaryDirectory() as folder:
        like, out = Path(folder, "like.safetensors"), Path(folder, "out.safetensors")
        save_file(model, like)
        save(model, out, like=like, dtype=asked)
        for name, tensor in load_file(out).items():
            is_kept = not tensor.is_floating_point() or tensor.element_size() == 1
            expected = model[name] if is_kept else model[name].to(asked)
            assert tensor.dtype == expected.dtype
            assert torch.equal(as_bytes(tensor), as_bytes(expected))
