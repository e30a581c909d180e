"""Finds weights that a model's configuration leaves out: a shallower model runs, and says nothing."""

import re
from collections.abc import Collection, Iterable
from pathlib import Path

from adamerge.errors import InputError, shortlist
from adamerge.state import State, info

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")
_TWINS = {"weight": "bias", "bias": "weight"}


def require_all_read(
    read: Collection[str], names: Collection[str], source: Path, role: str, ignored: Iterable[str] = ()
) -> None:
    """Refuse weights of which a model of this configuration would leave layers out.

    A head, a pooler or another tower may be left out; but no further layer of a list of layers that is read,
    and no bias of a matrix that is.

    Args:
        read: Names of the tensors that the model reads.
        names: Names of all tensors, or the state itself, whose integers do not count.
        source: Where they lie.
        role: Who this is, for the message.
        ignored: Patterns of names that the library itself leaves out.

    Raises:
        InputError: Some are left out; they are named.
    """
    left = [name for name in left_out(read, names) if not any(re.search(p, name) for p in ignored)]
    if left:
        raise InputError(
            f"{role}: the configuration of {source} leaves out {len(left)} tensors of its weights: "
            f"{shortlist(left, 3)}.",
            "Were configuration and weights saved together? Look at the number of layers.",
        )


def left_out(read: Collection[str], names: Collection[str]) -> list[str]:
    """List the names that belong to the same lists of layers, or to the same matrices, as what is read.

    Args:
        read: Names of the tensors that a model reads.
        names: Names of all tensors, or the state itself.
    """
    used, forms = set(read), {_NUMBER.sub("#", name) for name in read if _NUMBER.search(name)}
    return [
        name
        for name in names
        if name not in used
        and ((_NUMBER.search(name) and _NUMBER.sub("#", name) in forms) or _twin(name) in used)
        and _is_float(names, name)
    ]


def _twin(name: str) -> str:
    """Return the name of a matrix's bias, or of a bias's matrix; empty for others."""
    module, _, leaf = name.rpartition(".")
    return f"{module}.{_TWINS[leaf]}" if leaf in _TWINS and module else ""


def _is_float(names: Collection[str] | State, name: str) -> bool:
    return not hasattr(names, "keys") or info(names, name).dtype.is_floating_point  # pyright: ignore[reportArgumentType]  # it is a state then
