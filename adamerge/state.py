"""A State maps parameter names to tensors; what is mergeable is decided here, once."""

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import UInt8
from torch import Tensor

from adamerge.errors import InputError, shortlist
from adamerge.names import (
    extra_hint,
    looks_like,
    missing_hint,
    needed_of,
    require_file_names,
    shape_hint,
)

State = Mapping[str, Tensor]
_WHOLE_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class TensorInfo(NamedTuple):
    """What is known of a tensor without reading its values."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def n_bytes(self) -> int:
        """Bytes of its values."""
        return math.prod(self.shape) * self.dtype.itemsize


Infos = Mapping[str, TensorInfo]


@runtime_checkable
class LazyState(Protocol):
    """A state that can describe a tensor without reading it, as a checkpoint can."""

    def info(self, name: str) -> TensorInfo:
        """Give the shape and dtype of the tensor ``name``."""
        ...


@runtime_checkable
class _Rooted(Protocol):
    """A state that comes from a path, which messages name."""

    root: Path


def info(state: State, name: str) -> TensorInfo:
    """Describe one tensor of any state, without reading it where that is possible."""
    if isinstance(state, LazyState):
        return state.info(name)
    tensor = state[name]
    if tensor.is_meta:
        raise InputError(f"tensor {name} is on the meta device and has no values.", "Load it first.")
    return TensorInfo(tuple(tensor.shape), tensor.dtype)


def is_mergeable(dtype: torch.dtype) -> bool:
    """Tell whether tensors of this dtype take part in a merge: floating point only."""
    return dtype.is_floating_point


def audit(
    base: State,
    experts: Mapping[str, State],
    *,
    allow_missing: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> tuple[str, ...]:
    """Check that every expert fits the base, before any arithmetic.

    An expert that holds an image tower alone, and all of it, fits a complete CLIP. A name that the base
    lacks is ignored where it is an alias: a tensor that an expert with tied weights stores twice.

    Args:
        base: The base model's tensors.
        experts: Each expert's tensors, by task name.
        allow_missing: Patterns (``fnmatch``) of names that experts may lack; the base's values stand.
        exclude: Patterns of names that stay the base's, whatever the experts hold.

    Returns:
        The names that take part in the merge, in sorted order: floating point, in at least one expert.

    Raises:
        InputError: A task name cannot be a file name; a tensor has no values; or, in one message and per
            expert, all tensors that are missing, unexpected, of another shape or quantised.
    """
    require_file_names(experts)
    ours = _infos("base", base, exclude)
    problems = [f"base: {text}" for text in _quantised_problems(ours, ours)]
    present: set[str] = set()
    for task, expert in experts.items():
        role = f"expert {task!r}" + (f" ({expert.root})" if isinstance(expert, _Rooted) else "")
        theirs = _infos(role, expert, exclude)
        present.update(theirs)
        theirs = {n: found for n, found in theirs.items() if not is_alias(n, expert, theirs, ours)}
        problems += _problems_of(role, ours, theirs, allow_missing)
    if problems:
        raise InputError("the experts do not fit the base:\n" + "\n".join(problems))
    return tuple(sorted(n for n in ours if n in present and is_mergeable(ours[n].dtype)))


def tied_names(base: State, experts: Mapping[str, State]) -> dict[str, str]:
    """Find matrices that are one and the same in the base and in every expert, such as tied embeddings.

    An expert that lacks the alias does not untie it. Constant matrices are not taken for tied.

    Returns:
        From each alias to the name that stands for it.
    """
    alike: dict[tuple[TensorInfo, bytes], list[str]] = {}
    tied: dict[str, str] = {}
    for name in sorted(base, key=lambda n: (-sum(n in expert for expert in experts.values()), n)):
        found = info(base, name)
        if len(found.shape) < 2 or not is_mergeable(found.dtype):
            continue
        kept = alike.setdefault((found, as_bytes(_sample(base[name])).numpy().tobytes()), [])
        twins = (other for other in kept if _are_tied(other, name, base, experts))
        tied[name] = next(twins, name)
        if tied[name] == name:
            kept.append(name)
    return {alias: name for alias, name in tied.items() if alias != name}


def _are_tied(name: str, alias: str, base: State, experts: Mapping[str, State]) -> bool:
    holders = [base, *(expert for expert in experts.values() if alias in expert)]
    return all(name in state and _is_same(state[name], state[alias]) for state in holders)


def is_alias(name: str, expert: State, theirs: Infos, ours: Infos) -> bool:
    """Tell whether a name that the base lacks holds another of the expert's tensors once more."""
    if name in ours:
        return False
    twins = (other for other in theirs if other in ours and theirs[other] == theirs[name])
    return any(_is_same(expert[name], expert[other]) for other in twins)


def _is_same(a: Tensor, b: Tensor) -> bool:
    """Compare two tensors bit for bit, a sample first; what is constant is nobody's copy."""
    samples = as_bytes(_sample(a)), as_bytes(_sample(b))
    if a.shape != b.shape or a.dtype != b.dtype or not torch.equal(*samples):
        return False
    return torch.equal(as_bytes(a), as_bytes(b)) and not (_is_constant(_sample(a)) and _is_constant(a))


def _is_constant(tensor: Tensor) -> bool:
    entries = as_bytes(tensor).view(-1, tensor.element_size())
    return bool((entries == entries[:1]).all())


def _sample(tensor: Tensor) -> Tensor:
    """Take some entries from all over a tensor: runs, of which each lies in one page of a mapped file."""
    flat = tensor.detach().reshape(-1)
    run = flat.numel() // 8
    return flat[: 8 * run].view(8, run)[:, :8] if run else flat


def _infos(role: str, state: State, exclude: Sequence[str]) -> Infos:
    try:
        return {name: info(state, name) for name in state if not matches(name, exclude)}
    except InputError as error:
        raise InputError(f"{role}: {error}") from error


def _problems_of(role: str, ours: Infos, theirs: Infos, allowed: Sequence[str]) -> Iterable[str]:
    needed = needed_of(ours, theirs)
    missing = [n for n in needed if n not in theirs and not matches(n, allowed)]
    extra = [n for n in theirs if n not in ours]
    shapes = {n: (theirs[n].shape, ours[n].shape) for n in theirs if n in ours}
    differing = {n: pair for n, pair in shapes.items() if pair[0] != pair[1]}
    seen = looks_like({n: i.shape for n, i in theirs.items()}, {n: ours[n].shape for n in needed})
    if missing:
        hint = seen or missing_hint(missing, extra)
        yield f"{role} lacks {len(missing)} of {len(ours)} tensors: {shortlist(missing)}. {hint}"
    if extra:
        hint = seen or extra_hint(extra)
        yield f"{role} has {len(extra)} tensors that the base lacks: {shortlist(extra)}. {hint}"
    if differing:
        listed = shortlist(f"{n} {list(a)} vs base {list(b)}" for n, (a, b) in differing.items())
        yield (
            f"{role}: {len(differing)} of {len(shapes)} tensors differ from the base in shape: {listed}. "
            + (seen or shape_hint(differing))
        )
    yield from (f"{role}: {text}" for text in _quantised_problems(theirs, ours))


def _quantised_problems(found: Infos, ours: Infos) -> Iterable[str]:
    names = [
        name
        for name, (_, dtype) in found.items()
        if is_quantised(dtype)
        or (name in ours and is_mergeable(ours[name].dtype) and not is_mergeable(dtype))
    ]
    if names:
        dtypes = shortlist(sorted({str(found[name].dtype) for name in names}))
        yield f"quantised tensors {shortlist(names)}: dequantise first (found {dtypes})."


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Tell whether a name matches one of the patterns (``fnmatch``)."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def is_quantised(dtype: torch.dtype) -> bool:
    """Tell whether a floating dtype is too narrow to stand without scales."""
    return dtype.is_floating_point and dtype not in _WHOLE_FLOATS


def as_bytes(tensor: Tensor) -> UInt8[Tensor, " byte"]:
    """Give a tensor's memory, on the CPU, without a copy where it is contiguous there."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def first_nonfinite(tensor: Tensor) -> tuple[int, ...] | None:
    """Give the index of the first NaN or Inf of a tensor, or None where all are finite."""
    tensor = tensor.detach()
    if is_quantised(tensor.dtype):
        tensor = tensor.float()
    # A sum shows every NaN and infinity, at the speed of memory; one that overflows by itself proves nothing.
    if not is_mergeable(tensor.dtype) or tensor.sum().isfinite() or torch.isfinite(tensor).all():
        return None
    return tuple(int(i) for i in (~torch.isfinite(tensor)).nonzero()[0])


def digest(state: State) -> str:
    """Hash names, dtypes, shapes and values: the same digest means the same model.

    Returns:
        64 hexadecimal digits of SHA-256, independent of the order of names.
    """
    total = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name]
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        total.update(as_bytes(tensor).numpy().data)
    return total.hexdigest()
