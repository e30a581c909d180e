"""OPCM again, expert by expert with full SVDs, rescaled after each as section B10 has it."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from adamerge.static import merge
from adamerge.vectors import TaskVectors

pytestmark = pytest.mark.filterwarnings("ignore:expert")  # T = 1, and vectors of zeros
SHAPES = {
    "scalar": (),
    "bias": (4,),
    "tall": (9, 4),
    "wide": (3, 7),
    "row": (1, 5),
    "embed": (6, 3),
    "conv": (2, 3, 2),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

Model = dict[str, np.ndarray]


def norm(model: Model) -> float:
    return float(np.sqrt(sum((tensor**2).sum() for tensor in model.values())))


def projected(merged: np.ndarray, vector: np.ndarray, alpha: float) -> np.ndarray:
    """Step 2; on the diagonal, null directions (an arbitrary choice) are not dropped."""
    u, s, vh = np.linalg.svd(merged)
    rank = int((s > 1e-6 * s[0]).sum())
    p = u.T @ vector @ vh.T
    share = np.cumsum(s) / s.sum() if rank else []
    split = next((i for i, held in enumerate(share) if held > alpha), rank)
    p[:split, :split] = 0
    for i in range(rank):
        p[i, i] = 0
    return u @ p @ vh


def opcm(experts: list[Model], alpha: float) -> Model:
    merged, scale, norms = dict(experts[0]), 1.0, [norm(experts[0])]
    for expert in experts[1:]:
        for name, vector in expert.items():
            is_linear = vector.ndim == 2 and name != "embed"
            new = projected(merged[name], vector, alpha) if is_linear else vector
            merged[name] = scale * merged[name] + new
        norms.append(norm(expert))
        scale = norm(merged) / np.mean(norms) or 1.0
        merged = {name: tensor / scale for name, tensor in merged.items()}
        assert norm(merged) == pytest.approx(np.mean(norms))
    return merged


@st.composite
def experts(draw: st.DrawFn) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    tasks, dtype = draw(st.sampled_from([1, 2, 8])), draw(st.sampled_from(DTYPES))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    base = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}
    still = draw(st.sampled_from([None, 0, 1]))
    states = [
        {n: (b + torch.randn(b.shape, generator=generator) * (i != still)).to(dtype) for n, b in base.items()}
        for i in range(tasks)
    ]
    return base, states


@settings(max_examples=60, deadline=None)
@given(drawn=experts(), alpha=st.sampled_from([0.0, 0.3, 0.5, 0.9]))
def test_opcm(drawn: tuple[dict[str, Tensor], list[dict[str, Tensor]]], alpha: float) -> None:
    base, states = drawn
    taus = [{n: (s[n].float() - b.float()).double().numpy() for n, b in base.items()} for s in states]
    assume(any(norm(tau) for tau in taus))
    opened = TaskVectors.open(base, {f"t{i}": s for i, s in enumerate(states)}, force=True)
    merged = merge(opened, "opcm", alpha=alpha, dtype=torch.float32)
    for name, expected in opcm(taus, alpha).items():
        assert_close(
            merged[name], base[name].float() + torch.as_tensor(expected).float(), rtol=1e-4, atol=1e-4
        )
