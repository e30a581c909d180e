"""What does not fit between a base and its experts, tensor by tensor, where an audit only refuses."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from adamerge.errors import InputError, shortlist
from adamerge.names import needed_of
from adamerge.state import (
    State,
    TensorInfo,
    audit,
    first_nonfinite,
    info,
    is_alias,
    is_mergeable,
    is_quantised,
    matches,
)

Verdict = Literal["missing", "unexpected", "alias", "shape", "quantised"]
_HEADER = "the experts do not fit the base:\n"


@dataclass(frozen=True)
class Misfit:
    """One tensor that base and expert do not share.

    Attributes:
        role: The expert's name, or "base".
        tensor: The tensor's name.
        verdict: What is wrong: "alias" (a second copy of another tensor) does no harm.
        base: The base's dtype and shape, "float32 [3, 4]"; None where it has no such tensor.
        found: The same of the expert.
    """

    role: str
    tensor: str
    verdict: Verdict
    base: str | None
    found: str | None


@dataclass(frozen=True)
class NonFinite:
    """A tensor with NaN or infinite values.

    Attributes:
        role: The expert's name, or "base".
        tensor: The tensor's name.
        count: Number of such values.
        first: Index of the first one.
    """

    role: str
    tensor: str
    count: int
    first: tuple[int, ...]


class Selection(Mapping[str, Tensor]):
    """Some tensors of a state, read when they are asked for."""

    def __init__(self, state: State, names: Iterable[str]) -> None:
        self._state, self._names = state, dict.fromkeys(names)

    @classmethod
    def without(cls, state: State, names: Collection[str]) -> State:
        """Give a state without some tensors: itself, with all that it can, where it has none of them."""
        left = [name for name in state if name not in names]
        return state if len(left) == len(state) else cls(state, left)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._state[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def info(self, name: str) -> TensorInfo:
        """Give the shape and dtype of a tensor without reading its values."""
        return info(self._state, name)


def describe_all(state: State, exclude: Sequence[str] = ()) -> dict[str, TensorInfo | None]:
    """Describe the tensors of a state; None stands for what torch cannot hold, or what has no values."""
    found: dict[str, TensorInfo | None] = {}
    for name in (name for name in state if not matches(name, exclude)):
        try:
            found[name] = info(state, name)
        except InputError:
            found[name] = None
    return found


def misfits(
    role: str, base: State, expert: State, *, allow_missing: Sequence[str] = (), exclude: Sequence[str] = ()
) -> list[Misfit]:
    """List what an expert does not share with the base; for the base itself, what is quantised.

    Args:
        role: The expert's name, or "base".
        base: The base's tensors.
        expert: The expert's tensors, or the base's once more.
        allow_missing: Patterns of names that experts may lack.
        exclude: Patterns of names that do not matter.
    """
    ours, theirs = describe_all(base, exclude), describe_all(expert, exclude)
    known, found = ({n: i for n, i in infos.items() if i} for infos in (ours, theirs))
    rows = []
    for name in dict.fromkeys([*needed_of(ours, theirs), *theirs]):
        if name not in theirs and matches(name, allow_missing):
            continue
        verdict = _verdict(name, ours, theirs)
        if verdict == "unexpected" and name in found and is_alias(name, expert, found, known):
            verdict = "alias"
        if verdict:
            texts = (text_of(infos[name]) if name in infos else None for infos in (ours, theirs))
            rows.append(Misfit(role, name, verdict, *texts))
    return rows


def _verdict(
    name: str, ours: Mapping[str, TensorInfo | None], theirs: Mapping[str, TensorInfo | None]
) -> Verdict | None:
    if name not in theirs:
        return "missing"
    if name not in ours:
        return "unexpected"
    found, wanted = theirs[name], ours[name]
    if found is None or is_quantised(found.dtype):
        return "quantised"
    if wanted is None:
        return None  # the base's own misfit
    if is_mergeable(wanted.dtype) and not is_mergeable(found.dtype):
        return "quantised"
    return "shape" if found.shape != wanted.shape else None


def audit_problems(
    base: State,
    experts: Mapping[str, State],
    *,
    allow_missing: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> list[str]:
    """Give what the audit says of every expert by itself, so that one does not hide another's faults."""
    problems: dict[str, None] = {}
    for task, expert in experts.items():
        try:
            audit(base, {task: expert}, allow_missing=allow_missing, exclude=exclude)
        except InputError as error:
            text = str(error)
            lines = text.removeprefix(_HEADER).splitlines() if text.startswith(_HEADER) else [one_line(error)]
            problems |= dict.fromkeys(lines)
    return list(problems)


def nonfinite_of(name: str, states: Mapping[str, State]) -> list[NonFinite]:
    """Find the values of one tensor that are not finite, in every state (by role) that has it."""
    rows = []
    for role, state in states.items():
        index = first_nonfinite(state[name]) if name in state else None
        if index is not None:
            count = int((~torch.isfinite(state[name])).sum())
            rows.append(NonFinite(role, name, count, index))
    return rows


def nonfinite_problems(rows: Sequence[NonFinite]) -> list[str]:
    """Say in one line per state which tensors have values that are not finite."""
    problems = []
    for role in dict.fromkeys(row.role for row in rows):
        places = [f"{r.tensor}{list(r.first)} ({r.count})" for r in rows if r.role == role]
        who = role if role == "base" else f"expert {role!r}"
        problems.append(
            f"{who}: {len(places)} tensors have non-finite values; first index (count): {shortlist(places)}."
        )
    return problems


def one_line(error: Exception) -> str:
    """Give an error's text on one line."""
    return " ".join(str(error).splitlines())


def dtype_of(found: TensorInfo | None) -> str:
    """Name a dtype."""
    return "unreadable" if found is None else str(found.dtype).removeprefix("torch.")


def text_of(found: TensorInfo | None) -> str:
    """Describe a tensor: "float32 [3, 4]"."""
    return dtype_of(found) + (f" {list(found.shape)}" if found else "")
