"""Task vectors that stay in their files: every walk reads base and experts again and subtracts in fp32."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from adamerge.checkpoints import Checkpoint, SpanReader
from adamerge.errors import InputError
from adamerge.state import State, first_nonfinite, info
from adamerge.vectors.block import Block, PiecewiseBlock
from adamerge.vectors.origins import Origins

_CHUNK = 2**19  # entries of all tasks together: a piece should stay in a core's cache
_ZERO = torch.zeros(())
_HALVES = (torch.float16, torch.bfloat16)


@runtime_checkable
class Deltas(Protocol):
    """An expert that knows its differences from the base exactly, as an adapter does."""

    def delta(self, name: str) -> Tensor | None:
        """Give the fp32 difference of one tensor; None where it is the base's."""
        ...


@dataclass(frozen=True)
class StreamedBlock(PiecewiseBlock):
    """One parameter, read anew in every walk.

    Args:
        name: The parameter's name.
        origins: The base and the experts, of which one that lacks the parameter has the base's; the norms
            go there when the parameter is first read.
    """

    name: str
    origins: Origins

    @property
    def n_bytes(self) -> int:
        """Nothing is kept."""
        return 0

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the vectors, ``(task, *param)``."""
        return (len(self.origins.experts), *info(self.origins.base, self.name).shape)

    def base_tensor(self) -> Float[Tensor, "*param"]:
        """Give the base tensor in its source dtype."""
        return self.origins.base[self.name].detach().cpu()

    def combine(self, coefficients: Float[Tensor, " task"]) -> Float[Tensor, "*param"]:
        """Give base + sum over tasks of coefficient x vector, in fp32; what counts 0 is read but once."""
        row = coefficients.float()
        merged = self.base_tensor().reshape(-1).to(row.device, torch.float32, copy=True)
        for tasks, pieces in self._walks([task for task, c in enumerate(row.tolist()) if c != 0]):
            for span, vectors in pieces:
                merged[span].addmv_(vectors.to(row.device).T, row[tasks])
        return merged.reshape(self.shape[1:])

    def project(self, gradient: Float[Tensor, "*param"]) -> Float[Tensor, " task"]:
        """Give the inner product of a gradient with each task's vector, in fp32."""
        flat = gradient.reshape(-1).float()
        total = flat.new_zeros(self.shape[0])
        for tasks, pieces in self._walks([*range(self.shape[0])]):
            for span, vectors in pieces:
                total[tasks] += vectors.to(flat.device) @ flat[span]
        return total

    def prefetch(self) -> None:
        """Ask the system to read the parameter's files meanwhile."""
        for state in (self.origins.base, *self.origins.experts.values()):
            if isinstance(state, Checkpoint) and self.name in state:
                SpanReader(state, self.name).prefetch()

    def pieces(self) -> Iterator[tuple[slice, Float[Tensor, "task entry"]]]:
        """Walk the flattened parameter in fp32.

        Raises:
            InputError: A value is not finite.
        """
        buffer = torch.empty(self.shape[0], min(self._step, self._size))
        return self._read(lambda span: buffer[:, : span.stop - span.start])

    def dense(self) -> Float[Tensor, "task *param"]:
        """Read all vectors, each entry straight to its place."""
        stack = torch.empty(self.shape)
        flat = stack.reshape(self.shape[0], self._size)
        for _ in self._read(lambda span: flat[:, span]):
            pass
        return stack

    def to(self, device: torch.device) -> "StreamedBlock":
        """Stay: files are read on the CPU."""
        return self

    def _walks(self, wanted: list[int]) -> Iterator[tuple[list[int], Iterator[tuple[slice, Tensor]]]]:
        """Walk wanted experts: those read span by span together, each that makes whole tensors alone.

        The first walk is of all experts, for the norms.
        """
        origins, experts = self.origins, [*self.origins.experts.items()]
        is_new = self.name not in origins.base_norms
        wanted = [*range(len(experts))] if is_new else wanted
        alone = [task for task in wanted if not isinstance(experts[task][1], Checkpoint | dict)]
        together = [task for task in wanted if task not in alone]
        base_norm, norms = 0.0, dict[int, float]()
        for tasks in filter(None, (together, *([task] for task in alone))):
            known = {} if is_new else origins.base_norms
            part = Origins(origins.base, dict(experts[task] for task in tasks), base_norms=known)
            yield tasks, StreamedBlock(self.name, part).pieces()
            if is_new:
                base_norm = part.base_norms[self.name]
                norms |= zip(tasks, part.vector_norms[self.name], strict=True)
        if is_new:
            origins.add(self.name, base_norm, [norms[task] for task in sorted(norms)])

    @property
    def _size(self) -> int:
        return torch.Size(self.shape[1:]).numel()

    @property
    def _step(self) -> int:
        return max(_CHUNK // (self.shape[0] + 1), 1)

    def _read(self, place: Callable[[slice], Tensor]) -> Iterator[tuple[slice, Tensor]]:
        """Read span by span, the vectors to the place that a span has."""
        sources = (self.origins.base, *self.origins.experts.values())
        readers = [_reader(state, self.name) for state in sources]
        stored = info(self.origins.base, self.name).dtype
        kinds = [
            None if r is None or isinstance(s, Deltas) else _rounding(stored, info(s, self.name).dtype)
            for r, s in zip(readers, sources, strict=True)
        ]
        size, step = self._size, self._step
        base, is_new, norms = torch.empty(min(step, size)), self.name not in self.origins.base_norms, []
        for start in range(0, size, step):
            span = slice(start, min(start + step, size))
            rows, origin = place(span), base[: span.stop - start]
            for row, reader in zip((origin, *rows), readers, strict=True):
                row.copy_(_ZERO if reader is None else reader[span])
            _subtract(origin, rows, kinds[1:])
            if is_new:
                norms.append(torch.cat([origin.norm()[None], torch.linalg.vector_norm(rows, dim=1)]))
            yield span, rows
        if is_new:
            self._note(norms)

    def _note(self, pieces: list[Tensor]) -> None:
        """Note the norms of base and vectors; a value that is not finite shows in them."""
        norms = torch.stack(pieces).double().norm(dim=0) if pieces else torch.zeros(self.shape[0] + 1)
        if not norms.isfinite().all():
            self._refuse_nonfinite()  # else all are finite, but squares of some are not in fp32
            norms = torch.full_like(norms, torch.finfo(torch.float32).max)
        base, *vectors = norms.tolist()
        self.origins.add(self.name, base, vectors)

    def _refuse_nonfinite(self) -> None:
        experts = {f"expert {task!r}": state for task, state in self.origins.experts.items()}
        for role, state in {"base": self.origins.base, **experts}.items():
            tensor = state.get(self.name, _ZERO)
            index = first_nonfinite(tensor)
            if index is not None:
                count = int((~torch.isfinite(tensor)).sum())
                raise InputError(
                    f"{role}: {count} non-finite value(s) in {self.name}, first at {list(index)}.",
                    "Its training diverged or its file is damaged: leave it out or save it again.",
                )


@dataclass(frozen=True)
class EditedBlock(PiecewiseBlock):
    """A block under a task-vector edit that is applied anew in every walk.

    Args:
        inner: The block that is edited.
        edit: From fp32 vectors to vectors of the same shape.
        entrywise: Whether the edit treats every entry on its own, so that pieces can be edited.
    """

    inner: Block
    edit: Callable[[Tensor], Tensor]
    entrywise: bool

    @property
    def n_bytes(self) -> int:
        """Bytes that the block keeps."""
        return self.inner.n_bytes

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the vectors, ``(task, *param)``."""
        return self.inner.shape

    def base_tensor(self) -> Float[Tensor, "*param"]:
        """Give the base tensor in its source dtype."""
        return self.inner.base_tensor()

    def pieces(self) -> Iterator[tuple[slice, Float[Tensor, "task entry"]]]:
        """Walk the edited vectors."""
        if self.entrywise:
            for span, piece in self.inner.pieces():
                yield span, self.edit(piece)
        else:
            stack = self.edit(self.inner.dense())
            yield slice(0, stack[0].numel()), stack.reshape(len(stack), -1)

    def dense(self) -> Float[Tensor, "task *param"]:
        """Expand and edit."""
        return self.edit(self.inner.dense())

    def to(self, device: torch.device) -> "EditedBlock":
        """Give the block on a device."""
        return replace(self, inner=self.inner.to(device))


def read_ahead(blocks: Iterable[tuple[str, Block]]) -> Iterator[tuple[str, Block]]:
    """Yield the blocks; while one is at work, the system reads the next one from disk."""
    waiting = None
    for name, block in blocks:
        _prefetch(block)
        if waiting is not None:
            yield waiting
        waiting = name, block
    if waiting is not None:
        yield waiting


def _prefetch(block: Block) -> None:
    if isinstance(block, EditedBlock):
        _prefetch(block.inner)
    elif isinstance(block, StreamedBlock):
        block.prefetch()


def _rounding(base: torch.dtype, expert: torch.dtype) -> torch.dtype:
    """Return the dtype to which the base is rounded before it is subtracted: a narrower expert's."""
    return expert if expert != base and expert in _HALVES else torch.float32


def _subtract(base: Tensor, rows: Tensor, kinds: Sequence[torch.dtype | None]) -> None:
    """Turn the rows that hold an expert's values into differences; None stands for what is one already.

    An expert in half precision was rounded when it was saved: what training did not touch equals the base
    once that is rounded, too. Values of the base that half precision cannot hold are not rounded.
    """
    if all(kind is torch.float32 for kind in kinds):
        rows.sub_(base)
        return
    for row, kind in zip(rows, kinds, strict=True):
        if kind is torch.float32:
            row.sub_(base)
        elif kind is not None:
            rounded = base.to(kind).float()
            row.sub_(torch.where(rounded.isfinite(), rounded, base))


def _reader(state: State, name: str) -> "SpanReader | Tensor | None":
    if isinstance(state, Deltas):
        delta = state.delta(name)
        return None if delta is None else delta.reshape(-1)
    if name not in state:
        return None
    if isinstance(state, Checkpoint):
        return SpanReader(state, name)
    return state[name].detach().cpu().reshape(-1)
