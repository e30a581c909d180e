"""A State maps parameter names to tensors; what is mergeable is decided here, once."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatch
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from adamerge.errors import InputError, shortlist

State = Mapping[str, Tensor]
_PREFIXES = ("module.", "model.", "vision_model.", "visual.")
_TOWERS = ("visual.", "vision_model.")  # an image tower alone is a complete expert of a CLIP
_WHOLE_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class TensorInfo(NamedTuple):
    """What is known of a tensor without reading its values."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@runtime_checkable
class LazyState(Protocol):
    """A state that can describe a tensor without reading it, as a checkpoint can."""

    def info(self, name: str) -> TensorInfo:
        """Give the shape and dtype of the tensor ``name``."""
        ...


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


def audit(base: State, experts: Mapping[str, State], *, allow_missing: Sequence[str] = ()) -> tuple[str, ...]:
    """Check that every expert fits the base, before any arithmetic.

    An expert that holds an image tower alone, and all of it, fits a complete CLIP.

    Args:
        base: The base model's tensors.
        experts: Each expert's tensors, by task name.
        allow_missing: Patterns (``fnmatch``) of names that experts may lack; the base's values stand.

    Returns:
        The names that take part in the merge, in sorted order: floating point, in at least one expert.

    Raises:
        InputError: One message that lists, per expert, all tensors that are missing, unexpected,
            of another shape or quantised.
    """
    problems = [
        problem
        for task, expert in experts.items()
        for problem in _problems_of(base, task, expert, allow_missing)
    ]
    quantised = [n for n in base if _is_quantised(info(base, n).dtype)]
    if quantised:
        problems.insert(0, f"base: quantised tensors {shortlist(quantised)}: dequantise first.")
    if problems:
        raise InputError("the experts do not fit the base:\n" + "\n".join(problems))
    present = {name for expert in experts.values() for name in expert}
    return tuple(sorted(n for n in base if n in present and is_mergeable(info(base, n).dtype)))


def _problems_of(base: State, task: str, expert: State, allowed: Sequence[str]) -> Iterable[str]:
    needed = _needed_of(base, expert)
    missing = [n for n in needed if n not in expert and not any(fnmatch(n, p) for p in allowed)]
    extra = [n for n in expert if n not in base]
    if missing:
        yield (
            f"expert {task!r} lacks {len(missing)} of {len(base)} tensors: {shortlist(missing)}."
            + (_prefix_hint(missing, extra) or " If that is meant, pass allow_missing=[PATTERN, ...].")
        )
    if extra:
        yield f"expert {task!r} has {len(extra)} tensors that the base lacks: {shortlist(extra)}."
    common = [name for name in expert if name in base]
    yield from _shape_problems(base, task, expert, common)
    quantised = [n for n in common if _is_quantised(info(expert, n).dtype)]
    if quantised:
        yield f"expert {task!r}: quantised tensors {shortlist(quantised)}: dequantise first."


def _needed_of(base: State, expert: State) -> list[str]:
    """Give the names that an expert must have: all, or one tower's where it holds nothing else."""
    for tower in _TOWERS:
        if all(name.startswith(tower) for name in expert):
            return [name for name in base if name.startswith(tower)] or list(base)
    return list(base)


def _shape_problems(base: State, task: str, expert: State, common: list[str]) -> Iterable[str]:
    differing = [
        f"{name} {list(info(expert, name).shape)} vs base {list(info(base, name).shape)}"
        for name in common
        if info(expert, name).shape != info(base, name).shape
    ]
    if differing:
        yield (
            f"expert {task!r}: {len(differing)} of {len(common)} tensors differ from the base in "
            f"shape: {shortlist(differing)}. Another architecture, patch size or vocabulary?"
        )


def _prefix_hint(missing: Sequence[str], extra: Sequence[str]) -> str:
    """Name the prefix whose removal or addition would make the names agree, if there is one."""
    for prefix in _PREFIXES:
        if any(name.removeprefix(prefix) in missing for name in extra if name.startswith(prefix)):
            return f" The expert's names carry the prefix {prefix!r}: strip it."
        if any(prefix + name in missing for name in extra):
            return f" The expert's names lack the prefix {prefix!r}: add it."
    return ""


def _is_quantised(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point and dtype not in _WHOLE_FLOATS


def first_nonfinite(tensor: Tensor) -> tuple[int, ...] | None:
    """Give the index of the first NaN or Inf of a tensor, or None where all are finite."""
    if torch.isfinite(tensor).all():
        return None
    return tuple(int(i) for i in (~torch.isfinite(tensor)).nonzero()[0])


def digest(state: State) -> str:
    """Hash names, dtypes, shapes and values: the same digest means the same model.

    Returns:
        64 hexadecimal digits of SHA-256, independent of the order of names.
    """
    total = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()
