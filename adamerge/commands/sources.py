"""The base and experts that a command line names."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path
from typing import Any

from adamerge.checkpoints import locate
from adamerge.checkpoints.foreign_code import code_notes
from adamerge.errors import AdamergeWarning, InputError, shortlist
from adamerge.models.hf_encoder import HFEncoder, headless_base
from adamerge.models.opening import require_same_function
from adamerge.names import require_name
from adamerge.progress import console
from adamerge.vectors import TaskVectors
from adamerge.vectors.store import open_base, open_expert


def parse_experts(items: Sequence[str]) -> dict[str, str]:
    """Read ``name=path`` items.

    Raises:
        InputError: An item has another form, or a name stands twice or cannot name a file.
    """
    experts: dict[str, str] = {}
    for item in items:
        name, equals, path = item.partition("=")
        if not (name and equals and path):
            raise InputError(f"expert {item!r} has no name or no path.", "Write --experts NAME=PATH")
        if name in experts:
            raise InputError(f"two experts are called {name!r}: {experts[name]} and {path}.", "Rename one.")
        require_name(name, "expert")
        experts[name] = path
    if not experts:
        raise InputError("no experts were given.", "Write --experts NAME=PATH --experts NAME=PATH ...")
    return experts


@dataclass(frozen=True)
class Sources:
    """A base and experts, found on disk.

    Attributes:
        given: What the command line said, by role ("base", then each expert's name).
        paths: The local files or folders, by role.
    """

    given: dict[str, str]
    paths: dict[str, Path]

    @classmethod
    def find(cls, base: str, experts: Sequence[str], *, force: bool = False) -> "Sources":
        """Find what was named, and compare the configurations that lie beside the weights.

        Args:
            base: The base, as the command line has it.
            experts: NAME=PATH of each expert.
            force: Warn of configurations that differ instead of refusing them.

        Raises:
            InputError: A name or path is wrong, or configurations differ.
            EnvironmentProblem: A hub id was given and the hub cannot be reached.
        """
        given = {"base": base, **parse_experts(experts)}
        paths = {
            role: locate(path, role if role == "base" else f"expert {role!r}") for role, path in given.items()
        }
        found = cls(given, paths)
        require_same_function(found.base, found.experts, force=force)
        for note in code_notes(paths):
            warnings.warn(note, AdamergeWarning, stacklevel=2)
        return found

    @property
    def base(self) -> Path:
        """Path of the base."""
        return self.paths["base"]

    @property
    def experts(self) -> dict[str, Path]:
        """Paths of the experts."""
        return {role: path for role, path in self.paths.items() if role != "base"}

    def open(
        self,
        allow_missing: Sequence[str],
        exclude: Sequence[str],
        *,
        merge_classifier: bool = False,
        force: bool,
    ) -> TaskVectors:
        """Return the vectors, which stay in their files; for the arguments see `TaskVectors.open`.

        A base without the layers of its experts' classifiers stays without them.
        """
        experts, lone, own = self._without_own_layers()
        vectors = TaskVectors.open(
            self.base,
            experts,
            "stream",
            allow_missing=[*allow_missing, *lone],
            exclude=[*exclude, *own],
            merge_classifier=merge_classifier,
            force=force,
        )
        for task, expert in vectors.origins.experts.items():
            if dialect := getattr(expert, "dialect", ""):
                console.print(f"expert {task!r}: its names are read {dialect}.", soft_wrap=True)
        names = {name for s in (vectors.origins.base, *vectors.origins.experts.values()) for name in s}
        idle = [p for p in (*allow_missing, *exclude) if not any(fnmatch(name, p) for name in names)]
        if idle:
            raise InputError(f"no tensor's name matches {shortlist(idle)}.", "Look for a typing error.")
        return vectors

    @cached_property
    def headless(self) -> HFEncoder | None:
        """The backbone of a base that lacks layers of its experts' classifiers; None of any other base."""
        return headless_base(self.base, self.experts)

    def _without_own_layers(self) -> tuple[dict[str, Any], list[str], tuple[str, ...]]:
        """Return the experts of a headless base, what only the base has, and what only the experts have."""
        backbone = self.headless
        if backbone is None:
            return {**self.experts}, [], ()
        console.print(
            "the experts' own layers are not merged, the base has none of them: "
            f"{shortlist(backbone.unmerged)}.",
            soft_wrap=True,
        )
        return backbone.opened(self.experts, open_base(self.base), open_expert)
