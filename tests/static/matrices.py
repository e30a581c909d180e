"""Task matrices for tests, and one call that merges them by any method."""

import torch
from torch import Tensor

from adamerge.static import METHODS
from adamerge.vectors import Stacks

SHAPES = [(8, 5), (5, 8), (6, 6)]


def merged(method: str, stack: Tensor, *, name: str = "w", **options: object) -> Tensor:
    """Merge one parameter; SVC corrects the sum of the vectors."""
    row = METHODS[method]
    known = {"name": name, "merged": options.pop("merged", stack.sum(0))}
    needs = {need: known[need] for need in row.needs}
    if row.scope == "model":
        return row.function(Stacks.of({name: stack}), **options)(stack, **needs)
    return row.function(stack, **needs, **options)


def diagonal(*rows: list[float]) -> Tensor:
    return torch.stack([torch.diag(torch.tensor(row)).float() for row in rows])


def random(shape: tuple[int, ...], tasks: int = 3, seed: int = 0) -> Tensor:
    return torch.randn(tasks, *shape, generator=torch.Generator().manual_seed(seed))


def low_rank(shape: tuple[int, int], tasks: int = 2) -> Tensor:
    return random((shape[0], 2), tasks, 1) @ random((2, shape[1]), tasks, 2)


def rotation(size: int, seed: int = 3) -> Tensor:
    return torch.linalg.qr(random((size, size), 1, seed)[0]).Q
