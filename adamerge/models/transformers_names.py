"""Names that transformers' own classes have for the tensors of a folder's files, asked of the library.

Versions rename modules; files keep older names. The library converts names while it loads: so numbers are
loaded in place of tensors, and where each arrives tells which tensor is which.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adamerge.checkpoints import Checkpoint
from adamerge.documents import read_object
from adamerge.errors import InputError
from adamerge.models.libraries import transformers_class, transformers_config, transformers_model
from adamerge.state import State, info, is_mergeable


def match_tensors(family: Any, config: Any, state: State) -> tuple[Any, dict[str, str], set[str]]:
    """Let a class of transformers load numbers in place of tensors.

    Files of other versions have other names, prefixes come and go, and only the library knows them all.
    Integers (tables of positions, counters) are loaded as they are, for they decide what a model computes.

    Args:
        family: The class.
        config: Its configuration.
        state: The tensors, of which only names and shapes are read.

    Returns:
        The model, without the floats of the state; from its tensors to the state's names, of which a tied
        tensor has all; and which of its tensors the library joins or splits tensors for.
    """
    names = list(state)
    numbers = {name: _numbered(state, name, i) for i, name in enumerate(names, 1)}
    model, report = transformers_model(family, config, numbers)
    lost = {*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])}
    arrived = {n: t for n, t in model.state_dict().items() if n not in lost and t.is_floating_point()}
    whole = {n: t for n, t in arrived.items() if not any(t.stride()) or t.numel() == 1}  # still one number
    found = {name: _name_of(name, tensor, names) for name, tensor in whole.items()}
    return model, {n: file for n, file in found.items() if file}, arrived.keys() - whole.keys()


def module_names(base: State) -> dict[str, str]:
    """Return the base's tensor names by the names that its own class of transformers has for them.

    Args:
        base: A checkpoint; what is no folder of transformers has no such names.
    """
    family, config = _family_of(getattr(base, "root", None))
    return match_tensors(family, config, base)[1] if family is not None else {}


def under_library_names(base: State, expert: Checkpoint) -> Checkpoint:
    """Read an expert under the base's names, where the base's own class says which tensors are the same.

    Args:
        base: The base's tensors.
        expert: The expert, which keeps its names where the library does not bring more into the base.
    """
    if aliases := _tied_vectors(base, expert):
        names = {name: name for name in expert} | aliases
        expert = expert.renamed(names, expert.outside.difference(aliases), expert.dialect)
    if all(name in base or name in expert.outside for name in expert):
        return expert
    if all(name in expert for name in base if is_mergeable(info(base, name).dtype)):
        return expert
    family, config = _family_of(getattr(base, "root", None))
    if family is None:
        return expert
    ours = match_tensors(family, config, base)[1]
    theirs = match_tensors(family, config, expert)[1]
    names = {file: theirs[module] for module, file in ours.items() if module in theirs}
    if len(names) <= sum(name in expert for name in base):
        return expert
    used = set(names.values())
    rest = {name: name for name in expert if name not in used and name not in names}
    outside = expert.outside & {*rest, *(name for name in base if name not in names)}
    told = ", ".join(filter(None, (expert.dialect, "as transformers names the same tensors")))
    return expert.renamed(rest | names, outside, told)


def _tied_vectors(base: State, expert: Checkpoint) -> dict[str, str]:
    """Find vectors that the base stores under two names, the expert under one, as tied biases are.

    Vectors may be equal by chance, as zeros are; so the base's own class says which are tied.

    Returns:
        From the name that the expert lacks to the one that it has.
    """
    lacking = (name for name in base if name not in expert and name not in expert.outside)
    twins = [(name, other) for name in lacking for other in _twins_of(name, base, expert)]
    family, config = _family_of(getattr(base, "root", None)) if twins else (None, None)
    if family is None:
        return {}
    model, *_ = match_tensors(family, config, base)
    sources: dict[str, str] = model.get_expanded_tied_weights_keys(all_submodels=True)
    return {name: other for name, other in twins if sources.get(name, name) == sources.get(other, other)}


def _twins_of(name: str, base: State, expert: State) -> Iterator[str]:
    """List the other names of the base that hold the same vector, and that the expert has."""
    shape, dtype = info(base, name)
    if len(shape) != 1 or not is_mergeable(dtype):
        return
    for other in base:
        is_alike = other != name and other in expert and info(base, other) == (shape, dtype)
        if is_alike and torch.equal(base[other], base[name]):
            yield other


def _family_of(root: Path | None) -> tuple[Any, Any]:
    """Return the class and the configuration of a transformers folder; None for each of any other."""
    settings: Mapping[str, Any] = read_object(root / "config.json") if root is not None else {}
    if not isinstance(settings.get("model_type"), str) or root is None:
        return None, None
    import transformers

    try:
        config = transformers_config(root)
    except InputError:  # of a class that is not the library's, or of a later version
        return None, None
    kinds = settings.get("architectures") or [""]
    family = getattr(transformers, str(kinds[0]), None) if str(kinds[0]).isidentifier() else None
    if isinstance(family, type) and issubclass(family, transformers.PreTrainedModel):
        return family, config
    try:
        return transformers_class(transformers.AutoModel, config), config
    except ValueError:  # no class for this configuration
        return None, None


def _numbered(state: State, name: str, number: int) -> Tensor:
    """Return a number in the shape of a tensor, without its memory; integers are returned as they are."""
    shape, dtype = info(state, name)
    return torch.tensor(float(number)).expand(shape) if dtype.is_floating_point else state[name]


def _name_of(name: str, tensor: Tensor, names: Sequence[str]) -> str | None:
    """Return whose number has arrived; its own name where the library has written zeros over it."""
    number = int(tensor.flatten()[0]) if tensor.numel() else 0
    return names[number - 1] if number else name if name in names else None
