"""ComPEFT again, slow and literal, against the shipped edit and merges."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from adamerge.static import edit, merge
from adamerge.vectors import TaskVectors

pytestmark = pytest.mark.filterwarnings("ignore:experts")  # coarse vectors may be equal
SHAPES = {"d": (), "c.bias": (3,), "b.weight": (3, 4), "e": (2, 2, 3), "a.kernel": (2, 1, 2, 2)}
State = dict[str, Tensor]
Model = tuple[State, list[State]]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
options = {
    "density": st.sampled_from([0.02, 0.05, 0.2, 0.29, 0.5, 0.9, 1.0]),
    "alpha": st.sampled_from([0.5, 1.0, 4.0]),
    "value": st.sampled_from(["std", "mean"]),
}


@st.composite
def models(draw: st.DrawFn) -> Model:
    """Give a base and 1, 2 or 8 experts that all differ from it; coarse steps make many magnitudes equal."""
    count, dtype = draw(st.sampled_from([1, 2, 8])), draw(st.sampled_from(DTYPES))
    coarse = count < 8 and draw(st.booleans())
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))

    def normal(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator)

    def moved(tensor: Tensor) -> Tensor:
        step = normal(tuple(tensor.shape))
        return (tensor + ((1.5 * step).round() / 8 if coarse else step / 10)).to(dtype)

    base = {name: (8 * normal(shape)).round() for name, shape in SHAPES.items()}
    experts = [{name: moved(tensor) for name, tensor in base.items()} for _ in range(count)]
    for expert in experts:
        expert["d"] = base["d"].to(dtype) + 1
    return {name: tensor.to(dtype) for name, tensor in base.items()}, experts


def flat_vectors(model: Model) -> list[list[float]]:
    base, experts = model
    return [
        [x for n in sorted(SHAPES) for x in (expert[n].float() - base[n].float()).flatten().tolist()]
        for expert in experts
    ]


def unflatten(flat: list[float]) -> State:
    pieces, start = {}, 0
    for name, shape in sorted(SHAPES.items()):
        stop = start + math.prod(shape)
        pieces[name] = torch.tensor(flat[start:stop]).reshape(shape)
        start = stop
    return pieces


def sign(x: float) -> int:
    return (x > 0) - (x < 0)


def ternary(row: list[float], density: float, alpha: float, value: str) -> list[float]:
    """B9: sigma of the whole vector; the k % largest become alpha sigma sgn, the others 0; k = 100: as is."""
    if density == 1:
        return row
    count = math.floor(round(density * len(row), 9))
    if count == 0:
        return [0.0] * len(row)
    threshold = sorted(map(abs, row), reverse=True)[count - 1]
    kept = [abs(x) for x in row if abs(x) >= threshold and x != 0]
    mean = math.fsum(row) / len(row)
    sigma = math.sqrt(math.fsum((x - mean) ** 2 for x in row) / len(row))
    size = alpha * (sigma if value == "std" else math.fsum(kept) / max(len(kept), 1))
    size = torch.tensor(size, dtype=torch.float32).item()
    return [size * sign(x) if abs(x) >= threshold else 0.0 for x in row]


def joined(rows: list[list[float]], aggregate: str) -> list[float]:
    """B3 steps 3 and 4 on the ternary rows."""
    elected = [sign(sum(column)) for column in zip(*rows, strict=True)]
    majority = sign(sum(elected))
    merged = []
    for column, elect in zip(zip(*rows, strict=True), elected, strict=True):
        agreeing = [x for x in column if x and sign(x) == (elect or majority)]
        total = {"sum": sum(agreeing), "mean": sum(agreeing) / max(len(agreeing), 1)}
        merged.append(total.get(aggregate, max(agreeing, key=abs, default=0.0)))
    return merged


def open_vectors(model: Model, codec: str) -> TaskVectors:
    base, experts = model
    return TaskVectors.open(base, {f"t{i}": e for i, e in enumerate(experts)}, codec, force=True)


def assert_merges_to(expected: list[float], model: Model, **options: object) -> None:
    merged = merge(open_vectors(model, "fp32"), "compeft", dtype=torch.float32, **options)
    for name, vector in unflatten(expected).items():
        assert_close(merged[name], model[0][name].float() + vector)


@settings(max_examples=40, deadline=None)
@given(model=models(), codec=st.sampled_from(["fp32", "stream"]), **options)
def test_the_edit(model: Model, codec: str, density: float, alpha: float, value: str) -> None:
    found = dict(
        edit(open_vectors(model, codec), "compeft", density=density, alpha=alpha, value=value).stacks()
    )
    for i, row in enumerate(flat_vectors(model)):
        for name, tensor in unflatten(ternary(row, density, alpha, value)).items():
            assert_close(found[name][i], tensor, rtol=1e-6, atol=1e-7)


@settings(max_examples=20, deadline=None)
@given(model=models(), **options)
def test_the_linear_merge(model: Model, density: float, alpha: float, value: str) -> None:
    rows = [ternary(row, density, alpha, value) for row in flat_vectors(model)]
    expected = [0.5 * sum(column) for column in zip(*rows, strict=True)]
    assert_merges_to(expected, model, density=density, alpha=alpha, value=value, scale=0.5)


@settings(max_examples=40, deadline=None)
@given(model=models(), aggregate=st.sampled_from(["sum", "mean", "max"]), **options)
def test_the_ties_merge(model: Model, aggregate: str, density: float, alpha: float, value: str) -> None:
    rows = [ternary(row, density, alpha, value) for row in flat_vectors(model)]
    expected = [0.5 * x for x in joined(rows, aggregate)]
    chosen = {"density": density, "alpha": alpha, "value": value, "aggregate": aggregate}
    assert_merges_to(expected, model, merger="ties", scale=0.5, **chosen)
