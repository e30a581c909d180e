"""A State maps parameter names to tensors; what is mergeable is decided here, once."""

import hashlib
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import UInt8
from torch import Tensor

from adamerge.errors import InputError, shortlist
from adamerge.names import (
    extra_hint,
    is_of_quantisation,
    is_weight,
    keep_hint,
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


@runtime_checkable
class _Partial(Protocol):
    """A state that knows which whole modules only it or only its base has, as a renamed checkpoint does."""

    outside: frozenset[str]


def audit(
    base: State,
    experts: Mapping[str, State],
    *,
    allow_missing: Sequence[str] = (),
    exclude: Sequence[str] = (),
    required: Collection[str] = (),
) -> tuple[str, ...]:
    """Check that every expert fits the base, before any arithmetic.

    An expert that holds an image tower alone, and all of it, fits a complete CLIP. A name that the base
    lacks is ignored where it is an alias: a tensor that an expert with tied weights stores twice. So is a
    head beside a base without one, and the base's head beside an expert without one. Integers that one
    side lacks are ignored, for no merge changes them.

    Args:
        base: The base model's tensors.
        experts: Each expert's tensors, by task name.
        allow_missing: Patterns (``fnmatch``) of names that experts may lack; the base's values stand.
        exclude: Patterns of names that stay the base's, whatever the experts hold.
        required: Names that experts may not lack though they are parts of a head.

    Returns:
        The names that take part in the merge, in sorted order: floating point, in at least one expert.

    Raises:
        InputError: A task name cannot be a file name; a tensor has no values; or, in one message and per
            expert, all tensors that are missing, unexpected, of another shape, quantised, or constants
            that differ.
    """
    require_file_names(experts)
    ours = _infos("base", base, exclude)
    roles = {
        task: f"expert {task!r}" + (f" ({expert.root})" if isinstance(expert, _Rooted) else "")
        for task, expert in experts.items()
    }
    infos = {task: _infos(roles[task], expert, exclude) for task, expert in experts.items()}
    wide = {n for theirs in infos.values() for n in theirs if is_mergeable(theirs[n].dtype)}
    problems = [f"base: {text}" for text in _quantised_problems(ours, ours, wide)]
    for task, expert in experts.items():
        outside = expert.outside.difference(required) if isinstance(expert, _Partial) else frozenset()
        theirs = {
            name: found
            for name, found in infos[task].items()
            if (name in ours or name not in outside) and not is_alias(name, expert, infos[task], ours)
        }
        allowed = [*allow_missing, *outside]
        problems += _problems_of(roles[task], ours, theirs, allowed)
        problems += _constant_problems(roles[task], base, expert, ours, theirs)
    if problems:
        raise InputError("the experts do not fit the base:\n" + "\n".join(problems))
    present = {name for theirs in infos.values() for name in theirs}
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
    return all(name in state and is_same(state[name], state[alias]) for state in holders)


def is_alias(name: str, expert: State, theirs: Infos, ours: Infos) -> bool:
    """Tell whether a name that the base lacks holds another of the expert's tensors once more."""
    if name in ours:
        return False
    twins = (other for other in theirs if other in ours and theirs[other] == theirs[name])
    return any(is_same(expert[name], expert[other]) for other in twins)


def is_same(a: Tensor, b: Tensor) -> bool:
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
    if all(_is_constant_buffer(n, ours[n]) for n in missing):
        missing = []
    if all(_is_constant_buffer(n, theirs[n]) for n in extra):
        extra = []
    shapes = {n: (theirs[n].shape, ours[n].shape) for n in theirs if n in ours}
    differing = {n: pair for n, pair in shapes.items() if pair[0] != pair[1]}
    seen = looks_like({n: i.shape for n, i in theirs.items()}, {n: ours[n].shape for n in needed})
    if missing:
        hint = seen or missing_hint(missing, extra, all_missing=len(missing) == len(needed))
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


def _is_constant_buffer(name: str, found: TensorInfo) -> bool:
    """Return whether a tensor is an integer buffer, which no merge changes, and no code of a quantisation."""
    return not (is_mergeable(found.dtype) or found.dtype.is_complex or is_coded(name, found))


def is_coded(name: str, found: TensorInfo, wanted: TensorInfo | None = None) -> bool:
    """Return whether a tensor holds codes of a quantisation, or what decodes them.

    Args:
        name: Its name.
        found: Its shape and dtype.
        wanted: Shape and dtype of the tensor that the other side has under this name, if any.
    """
    is_integer = not (is_mergeable(found.dtype) or found.dtype.is_complex)
    return (
        is_quantised(found.dtype)
        or is_of_quantisation(name)
        or (is_integer and (is_weight(name) or (wanted is not None and is_mergeable(wanted.dtype))))
    )


def _quantised_problems(found: Infos, ours: Infos, wide: Collection[str] = ()) -> Iterable[str]:
    """Say which tensors are quantised; `wide` are names that another model stores as floating point."""
    names = [n for n, i in found.items() if is_coded(n, i, ours.get(n))]
    names += [n for n in wide if n in found and n not in names and not is_mergeable(found[n].dtype)]
    if names:
        dtypes = shortlist(sorted({str(found[name].dtype) for name in names}))
        yield f"quantised tensors {shortlist(names)}: dequantise first (found {dtypes})."


def differing_constants(base: State, expert: State, ours: Infos, theirs: Infos) -> list[str]:
    """List tensors that no merge changes, integers and complex numbers, of which base and expert differ.

    Counters of one number may differ, as those of batch norms do. What is quantised by its dtype or name
    is left out.
    """
    return [
        name
        for name, found in theirs.items()
        if name in ours
        and not is_mergeable(found.dtype)
        and found.shape == ours[name].shape
        and math.prod(found.shape) > 1
        and not is_mergeable(ours[name].dtype)
        and not is_coded(name, found)
        and not torch.equal(base[name], expert[name])
    ]


def _constant_problems(role: str, base: State, expert: State, ours: Infos, theirs: Infos) -> Iterable[str]:
    names = differing_constants(base, expert, ours, theirs)
    if names:
        dtypes = shortlist(sorted({str(theirs[name].dtype) for name in names}))
        yield (
            f"{role}: {len(names)} tensors of {dtypes} differ from the base, which no merge changes: "
            f"{shortlist(names)}. Quantised? Dequantise first. {keep_hint(names, ours)}"
        )


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
