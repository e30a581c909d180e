"""Dialects of names: the same tensors with a prefix more or less, read under the base's names."""

from collections.abc import Collection

from adamerge.checkpoints.reading import Checkpoint
from adamerge.names import PREFIXES

_COUNTERS = "position_ids"  # older versions of transformers saved them; they are 0, 1, 2, ...


def under_names_of(base: Collection[str], expert: Checkpoint) -> Checkpoint:
    """Read an expert under the base's names, if these are its own after one known prefix comes or goes.

    Nothing is loaded, and files, digests and places in them stay known. Counters that the base does not
    store are left out.

    Args:
        base: The base's tensor names.
        expert: The expert, whose own names stand where no prefix brings more of them into the base.
    """
    names = max(_ways([*expert]), key=lambda way: sum(name in base for name in way))
    renamed = zip(names, expert, strict=True)
    return expert.renamed({new: old for new, old in renamed if new in base or not new.endswith(_COUNTERS)})


def prefix_of(module: Collection[str], names: Collection[str]) -> str:
    """Give what stands before a module's tensor names in a checkpoint.

    Args:
        module: Names of the module's parameters.
        names: The checkpoint's tensor names.
    """
    return max(("", *PREFIXES), key=lambda prefix: sum(prefix + name in names for name in module))


def _ways(names: list[str]) -> list[list[str]]:
    """List names as they are first, then with each prefix more, and with each prefix less."""
    ways = [names]
    ways += [[prefix + name for name in names] for prefix in PREFIXES]
    ways += [[name.removeprefix(prefix) for name in names] for prefix in PREFIXES]
    return [way for way in ways if len(set(way)) == len(names)]
