"""What a stored form of task vectors must offer, and the one autograd rule that serves every form.

The loss depends on a merging coefficient only through the merged weights, so

    d loss / d coefficient[t] = < d loss / d weights, vector[t] >

and a form that can combine its vectors and project a gradient onto them can be trained; it is never
expanded.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from adamerge.vectors.activations import apply_dense, sample_values


@runtime_checkable
class Block(Protocol):
    """The base tensor and the T task vectors of one parameter, in some stored form."""

    @property
    def n_bytes(self) -> int:
        """Bytes that the base tensor and the stored vectors occupy."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the expanded vectors, ``(task, *param)``, known without reading them."""
        ...

    def combine(self, coefficients: Float[Tensor, " task"]) -> Float[Tensor, "*param"]:
        """Give base + sum over tasks of coefficient x vector, in fp32."""
        ...

    def project(self, gradient: Float[Tensor, "*param"]) -> Float[Tensor, " task"]:
        """Give the inner product of a gradient with each task's vector: combine's adjoint, in fp32."""
        ...

    def base_tensor(self) -> Float[Tensor, "*param"]:
        """Give the base tensor in its source dtype."""
        ...

    def dense(self) -> Float[Tensor, "task *param"]:
        """Expand all vectors to fp32: the reference that tests and static methods use."""
        ...

    def pieces(self) -> Iterator[tuple[slice, Float[Tensor, "task entry"]]]:
        """Walk the flattened parameter piece by piece: a span of its entries, and the fp32 vectors there.

        A piece may live in a buffer that the next one overwrites.
        """
        ...

    def apply(
        self,
        x: Float[Tensor, "sample row in"],
        weights: Float[Tensor, "sample task"] | Float[Tensor, "sample row task"],
        *,
        transposed: bool = False,
    ) -> Float[Tensor, "sample row out"]:
        """Apply every sample's (or row's) own matrix, base + sum of weight x vector, to its rows.

        The parameter is seen as a matrix ``[out, in]``: its first axis against all others; `transposed`,
        as its transpose. Differentiable in ``x`` and in ``weights``.
        """
        ...

    def values(self, weights: Float[Tensor, "*batch task"]) -> Float[Tensor, "..."]:
        """Give every sample's own tensor, ``[*batch, *param]`` in fp32: for small parameters."""
        ...

    def to(self, device: torch.device) -> "Block":
        """Give the same block on a device (itself where it is there already)."""
        ...


@runtime_checkable
class Codec(Protocol):
    """Chooses the stored form of one parameter's task vectors."""

    @property
    def name(self) -> str:
        """The codec's name in configurations and reports."""
        ...

    def encode(self, base: Float[Tensor, "*param"], vectors: Float[Tensor, "task *param"]) -> Block:
        """Store one parameter's fp32 task vectors beside its base tensor.

        Raises:
            OverflowError: A value does not fit the stored form.
        """
        ...


class PiecewiseBlock(ABC):
    """A block whose arithmetic follows from its pieces."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Shape of the expanded vectors, ``(task, *param)``."""

    @abstractmethod
    def base_tensor(self) -> Float[Tensor, "*param"]:
        """Give the base tensor in its source dtype."""

    @abstractmethod
    def pieces(self) -> Iterator[tuple[slice, Float[Tensor, "task entry"]]]:
        """Walk the flattened parameter in fp32."""

    def combine(self, coefficients: Float[Tensor, " task"]) -> Float[Tensor, "*param"]:
        """Give base + sum over tasks of coefficient x vector, in fp32."""
        row, device = coefficients.float()[None, None], coefficients.device
        base = self.base_tensor().reshape(1, 1, -1)
        merged = torch.empty(base.shape, device=device)
        for span, vectors in self.pieces():
            start = base[..., span].to(device, torch.float32)
            torch.baddbmm(start, row, vectors[None].to(device), out=merged[..., span])
        return merged.reshape(self.shape[1:])

    def project(self, gradient: Float[Tensor, "*param"]) -> Float[Tensor, " task"]:
        """Give the inner product of a gradient with each task's vector, in fp32."""
        flat = gradient.reshape(-1).float()
        total = flat.new_zeros(self.shape[0])
        for span, vectors in self.pieces():
            total += vectors.to(flat.device) @ flat[span]
        return total

    def dense(self) -> Float[Tensor, "task *param"]:
        """Expand all vectors to fp32."""
        stack = self.base_tensor().new_empty(self.shape, dtype=torch.float32)
        flat = stack.reshape(self.shape[0], -1)
        for span, vectors in self.pieces():
            flat[:, span] = vectors
        return stack

    def apply(
        self,
        x: Float[Tensor, "sample row in"],
        weights: Float[Tensor, "sample task"] | Float[Tensor, "sample row task"],
        *,
        transposed: bool = False,
    ) -> Float[Tensor, "sample row out"]:
        """Apply every sample's own matrix to its rows."""
        base, stack = self.base_tensor(), self._stored()
        base, stack = base.reshape(len(base), -1), stack.reshape(*stack.shape[:2], -1)
        return (
            apply_dense(base.mT, stack.mT, x, weights) if transposed else apply_dense(base, stack, x, weights)
        )

    def values(self, weights: Float[Tensor, "*batch task"]) -> Float[Tensor, "..."]:
        """Give every sample's own tensor in fp32."""
        return sample_values(self.base_tensor(), self._stored(), weights)

    def _stored(self) -> Float[Tensor, "task *param"]:
        """Give all vectors, in whatever dtype costs no conversion."""
        return self.dense()


class Merge(torch.autograd.Function):
    """Coefficients to merged weights, for any list of blocks; keeps no tensor for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, coefficients: Float[Tensor, "task tensor"], blocks: Sequence[Block]
    ) -> tuple[Tensor, ...]:
        """Combine every block with its own column of coefficients."""
        ctx.blocks = blocks
        ctx.set_materialize_grads(False)
        columns = coefficients.unbind(1)
        return tuple(b.combine(column) for b, column in zip(blocks, columns, strict=True))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, None]:  # type: ignore[override]  # torch declares Any
        """Project each weight's gradient onto its block's vectors."""
        return project(ctx.blocks, gradients), None


def project(
    blocks: Sequence[Block], gradients: Sequence[Tensor | None]
) -> Float[Tensor, "task tensor"] | None:
    """Collect every block's projection; a weight without gradient contributes zeros.

    Returns:
        d loss / d coefficients, fp32; None where no weight has a gradient.
    """
    return stack_columns(
        [None if g is None else project_one(b, g) for b, g in zip(blocks, gradients, strict=True)]
    )


@torch.no_grad()
def project_one(block: Block, gradient: Float[Tensor, "*param"]) -> Float[Tensor, " task"]:
    """Project one weight's gradient in fp32, under autocast too."""
    with torch.autocast(gradient.device.type, enabled=False):
        return block.project(gradient)


def stack_columns(columns: Sequence[Float[Tensor, " task"] | None]) -> Float[Tensor, "task tensor"] | None:
    """Join columns, with zeros where one is missing; None where all are."""
    known = next((column for column in columns if column is not None), None)
    if known is None:
        return None
    zeros = torch.zeros_like(known)
    return torch.stack([zeros if column is None else column for column in columns], dim=1)
