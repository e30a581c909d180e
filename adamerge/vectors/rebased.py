"""Task vectors on another base: a shared model, and what each expert has beyond it."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from adamerge.errors import InputError, shortlist
from adamerge.state import first_nonfinite
from adamerge.vectors.block import Block, Codec
from adamerge.vectors.store import TaskVectors, _encode, make_codec


class Size(NamedTuple):
    """Stored numbers, and the bytes that they and what tells their places occupy."""

    scalars: int
    n_bytes: int

    @classmethod
    def of(cls, tensors: Iterable[Tensor]) -> "Size":
        """Count tensors."""
        pairs = [(tensor.numel(), tensor.nbytes) for tensor in tensors]
        return cls(sum(n for n, _ in pairs), sum(n for _, n in pairs))

    def plus(self, scalars: int, n_bytes: int) -> "Size":
        """Count more."""
        return Size(self.scalars + scalars, self.n_bytes + n_bytes)


def rebase(
    vectors: TaskVectors,
    merged: Mapping[str, Tensor],
    codec: str | Codec = "low_rank",
    *,
    names: Collection[str] | None = None,
) -> TaskVectors:
    """Split experts into a shared model and exclusive experts: vector = expert - shared.

    This is the first half of Twin-Merging (arXiv:2406.15479), for any merge of the same vectors. With a
    codec that loses nothing, one-hot coefficients still give each expert.

    Args:
        vectors: Base and experts.
        merged: The shared model by parameter name, as `vectors.merge` or `adamerge.merge` gives it; further
            names are passed over. It is stored in the dtype that it has.
        codec: Stored form of the exclusive experts, as in `TaskVectors.open`; not "stream".
        names: Only these tensors keep vectors; the others are the merged model's. Default: all.

    Returns:
        Vectors of the same tasks, on the shared model.

    Raises:
        InputError: A parameter is missing in ``merged`` or has another shape or values that are not finite,
            or nothing can be stored in the codec.
    """
    form = make_codec(codec)
    if form is None:
        raise InputError(
            f"codec {codec!r} stores nothing; exclusive experts stand in no file.", "Use e.g. 'low_rank'."
        )
    _require_fitting(vectors, merged)
    blocks: dict[str, Block] = {}
    fixed: dict[str, Tensor] = {}
    for name, block in vectors.stacks("Encoding exclusive experts").walk():
        base, shared = block.base_tensor(), merged[name].detach().to(block.base_tensor().device)
        if names is None or name in names:
            blocks[name] = _encode(form, name, shared, base.float() + block.dense() - shared.float())
        else:
            fixed[name] = shared
    rest = {**vectors.rest, **vectors.with_aliases(fixed)}
    aliases = {alias: name for alias, name in vectors.aliases.items() if name in blocks}
    digests = vectors.digests or vectors.origins.digests()
    return replace(vectors, blocks=blocks, rest=rest, aliases=aliases, codec=form, digests=digests)


def storage(vectors: TaskVectors) -> dict[str, Size]:
    """Count what is stored, part by part.

    Parts: "base" (tensors that take part in the merge), "rest" (those that no merge changes), and of the
    task vectors "matrices", "kernels" (three dimensions and more) and "others" (biases, scales). A tensor
    that takes part under several names counts once. A low-rank m x n matrix counts r (m + n) numbers a task:
    its singular values are in its left factors, where Twin-Merging's estimate r (m + n + 1) has them apart.
    """
    sizes = {part: Size(0, 0) for part in ("base", "rest", "matrices", "kernels", "others")}
    for tensor in vectors.rest.values():
        sizes["rest"] = sizes["rest"].plus(tensor.numel(), tensor.nbytes)
    for block in vectors.blocks.values():
        base = block.base_tensor()
        part = {0: "others", 1: "others", 2: "matrices"}.get(base.dim(), "kernels")
        scalars = getattr(block, "n_scalars", torch.Size(block.shape).numel())
        sizes["base"] = sizes["base"].plus(base.numel(), base.nbytes)
        sizes[part] = sizes[part].plus(scalars, block.n_bytes - base.nbytes)
    return sizes


def _require_fitting(vectors: TaskVectors, merged: Mapping[str, Tensor]) -> None:
    shapes = {name: block.shape[1:] for name, block in vectors.blocks.items()}
    missing = [name for name in shapes if name not in merged]
    if missing:
        raise InputError(
            f"the merged model lacks {shortlist(missing)}.", "Give all tensors of a merge of these vectors."
        )
    for name, shape in shapes.items():
        found = tuple(merged[name].shape)
        if found != shape:
            raise InputError(
                f"the merged model has {name} of shape {list(found)}, the experts of {list(shape)}.",
                "Give a merge of these vectors.",
            )
        index = first_nonfinite(merged[name])
        if index is not None:
            raise InputError(
                f"the merged model has a non-finite value in {name}, first at {list(index)}.",
                "Its merge or training diverged: look at its coefficients.",
            )
