"""Small random models of every rank and dtype, as the literal methods and the shipped ones see them."""

from typing import NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from adamerge.static import edit, merge
from adamerge.vectors import TaskVectors

SHAPES = {
    "bias": (5,),
    "cube": (2, 3, 2),
    "kernel": (2, 1, 2, 4),
    "matrix": (3, 7),
    "scalar": (),
    "x": (2, 0),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

Rows = list[list[float]]  # one flat list per task


class Model(NamedTuple):
    base: dict[str, Tensor]
    experts: list[dict[str, Tensor]]
    codec: str

    def vectors(self) -> TaskVectors:
        named = {f"t{i}": expert for i, expert in enumerate(self.experts)}
        return TaskVectors.open(self.base, named, self.codec, force=True)

    def rows(self) -> dict[str, Rows]:
        """Give every parameter's task vectors, flat."""
        return {
            name: [(expert[name].float() - base.float()).flatten().tolist() for expert in self.experts]
            for name, base in self.base.items()
        }


@st.composite
def models(draw: st.DrawFn, *, coarse: bool) -> Model:
    """Draw a base and experts; coarse ones have many entries that are equal, or that cancel exactly."""
    count, dtype = draw(st.sampled_from([1, 2, 8])), draw(st.sampled_from(DTYPES))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))

    def change(shape: tuple[int, ...]) -> Tensor:
        if coarse:
            return torch.randint(-4, 5, shape, generator=generator) / 4
        return torch.randn(shape, generator=generator) / 8

    base = {n: torch.randint(-8, 9, s, generator=generator).to(dtype) for n, s in SHAPES.items()}
    experts = [{n: (b.float() + change(SHAPES[n])).to(dtype) for n, b in base.items()} for _ in range(count)]
    if count > 1 and draw(st.booleans()):
        experts[0] = base
    return Model(base, experts, draw(st.sampled_from(["fp32", "stream"])))


MODELS = st.booleans().flatmap(lambda coarse: models(coarse=coarse))


def assert_edits_to(model: Model, expected: dict[str, Rows], name: str, **options: object) -> None:
    for parameter, stack in edit(model.vectors(), name, **options).stacks():
        assert_close(stack, torch.tensor(expected[parameter]).reshape(stack.shape), rtol=1e-5, atol=1e-6)


def assert_merges_to(model: Model, expected: dict[str, list[float]], method: str, **options: object) -> None:
    merged = merge(model.vectors(), method, dtype=torch.float32, **options)
    for name, base in model.base.items():
        assert_close(
            merged[name], base + torch.tensor(expected[name]).reshape(base.shape), rtol=1e-5, atol=1e-5
        )


def summed(rows: Rows, scale: float) -> list[float]:
    return [scale * sum(column) for column in zip(*rows, strict=True)]


def largest_first(line: list[float]) -> list[int]:
    """Order positions by magnitude; of equal magnitudes, earlier ones come first."""
    return sorted(range(len(line)), key=lambda i: (-abs(line[i]), i))
