"""Reads a PEFT LoRA folder as the complete expert that it makes of its base, lazily."""

import hashlib
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from itertools import chain
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from adamerge.checkpoints.hub import local_path
from adamerge.checkpoints.lora import CONFIG, MERGE_HINT, WEIGHTS, Edit, read_edits
from adamerge.checkpoints.reading import Checkpoint, open_checkpoint
from adamerge.errors import InputError, shortlist
from adamerge.state import State, TensorInfo, info, is_mergeable

Modules = Callable[[], Mapping[str, str]]
_LOOKED_AT = 4  # names of an adapter by which prefixes are found


class Adapter(Mapping[str, Tensor]):
    """A lazy map from the base's names to the tensors of base + adapter, which are never all held.

    LoRA (arXiv:2106.09685), rsLoRA (arXiv:2312.03732) and, for linear layers, DoRA (arXiv:2402.09353).
    Tensors that the adapter leaves alone, and all integers, are the base's own.

    Args:
        root: The PEFT folder.
        base: The state that the adapter was trained on; its names stand.
        modules: Returns the base's names by the names that the model's own library has for its tensors in
            memory, after which PEFT names its tensors; asked where no names fit as they are.

    Attributes:
        changed: Names of the base's tensors that the adapter changes.
        outside: Names of whole tensors that the adapter holds and the base lacks, as of a classifier.

    Raises:
        InputError: The folder is damaged, holds what is not reproduced here, or does not fit the base.
    """

    def __init__(self, root: Path, base: State, modules: Modules | None = None) -> None:
        self.root, self.files = root, (root / CONFIG, root / WEIGHTS)
        self._base = base
        self._tensors, edits = read_edits(root)
        self._edits = _place(edits, base, self._tensors, modules)
        self.changed = tuple(name for name in base if name in self._edits)
        self.outside = frozenset(name for name in self._edits if name not in base)
        _refuse_ties(base, [name for name in self.changed if self._edits[name].rank])

    def __getitem__(self, name: str) -> Tensor:
        edit = self._edits.get(name)
        if edit is None:
            return self._base[name]
        if edit.saved and not edit.factors:
            return self._tensors[edit.saved].float()
        return self._wide(name) + self._change(name, edit)

    def __iter__(self) -> Iterator[str]:
        return chain(self._base, self.outside)

    def __len__(self) -> int:
        return len(self._base) + len(self.outside)

    def __contains__(self, name: object) -> bool:
        return name in self._base or name in self.outside

    def info(self, name: str) -> TensorInfo:
        """Return the shape and dtype of a tensor without reading its values; changed ones are fp32."""
        edit = self._edits.get(name)
        if edit is not None and edit.saved:
            return TensorInfo(self._tensors.info(edit.saved).shape, torch.float32)
        found = info(self._base, name)
        return found if edit is None else found._replace(dtype=torch.float32)

    def delta(self, name: str) -> Float[Tensor, "..."] | None:
        """Give the adapter's change of a tensor in fp32, or None where it leaves the tensor alone."""
        edit = self._edits.get(name)
        return None if edit is None else self._change(name, edit)

    def rank(self, name: str) -> int | None:
        """Give the r of a change that is B A and no more; None for any other tensor."""
        edit = self._edits.get(name)
        return None if edit is None or edit.saved or edit.magnitude else edit.rank

    def file_digest(self) -> str:
        """Hash the bytes of all files (SHA-256), which stands for this adapter in reports."""
        return adapter_digest(self.root)

    def _wide(self, name: str) -> Tensor:
        return self._base[name].detach().cpu().float()

    def _change(self, name: str, edit: Edit) -> Tensor:
        change = torch.zeros(())
        if edit.saved:
            change = self._tensors[edit.saved].float() - self._wide(name)
        if edit.factors:
            change = change + edit.scale * self._update(edit)
        if edit.magnitude:
            whole = self._wide(name) + change
            norm = torch.linalg.vector_norm(whole, dim=0 if edit.transposed else 1, keepdim=True)
            ratio = self._tensors[edit.magnitude].float().reshape(norm.shape) / norm
            change = (ratio - 1) * whole + change
        return change

    def _update(self, edit: Edit) -> Tensor:
        factors = [self._tensors[key].float() for key in edit.factors]
        if len(factors) == 1:
            return factors[0]
        b, a = (factor.flatten(1) for factor in factors)
        return (b @ a).T if edit.transposed else (b @ a).reshape(edit.shape)


def adapter_digest(root: Path) -> str:
    """Hash the files of a PEFT folder (SHA-256), whatever base it belongs to."""
    digests = (hashlib.sha256((root / name).read_bytes()).digest() for name in (CONFIG, WEIGHTS))
    return hashlib.sha256(b"".join(digests)).hexdigest()


def fitted_base(root: Path, base: State, rows: Collection[str]) -> State:
    """Return a base that a PEFT folder fits which holds a classifier of its own shape.

    Args:
        root: The PEFT folder.
        base: The state that the adapter was trained on.
        rows: Names of the classifier's tensors, whose shapes are taken from the folder where it has them.
    """
    if not (root / WEIGHTS).is_file():
        return base
    saved = open_checkpoint(root / WEIGHTS)
    own = {name: key for name in rows for key in saved if key.endswith(f".{name}")}
    return (
        {**base, **{name: torch.zeros(saved.info(key).shape) for name, key in own.items()}} if own else base
    )


def open_adapter(path: str | Path, base: State, *, role: str, modules: Modules | None = None) -> Adapter:
    """Open a PEFT LoRA folder as an expert of `base`, without reading its tensors.

    Args:
        path: A folder with ``adapter_config.json`` and ``adapter_model.safetensors``, or a hub id.
        base: The state that the adapter was trained on; all names may differ by one prefix.
        role: Who this is ("expert 'cars'"), for error messages.
        modules: See `Adapter`.

    Raises:
        InputError: A file is missing or damaged, a setting changes weights in a way that is not
            reproduced here, or tensors do not fit the base (one message lists them).
        EnvironmentProblem: A hub id was given and the hub cannot be reached.
    """
    root = local_path(path, role)
    try:
        return Adapter(root, base, modules)
    except InputError as error:
        raise InputError(f"{role}: {error}") from error


def _place(
    edits: Mapping[str, Edit], base: State, tensors: Checkpoint, modules: Modules | None
) -> dict[str, Edit]:
    """Return the edits by the base's names, or one message of all that does not fit."""
    ways = _ways(list(edits), base)
    misfits = [list(_misfits(edits, way, base, tensors)) for way in ways]
    if all(misfits) and modules is not None and (named := modules()):
        own = [{n: named.get(m, m) for n, m in way.items()} for way in _ways(list(edits), named)]
        ways += [way for way in own if len(set(way.values())) == len(way)]
        misfits += [list(_misfits(edits, way, base, tensors)) for way in ways[len(misfits) :]]
    fitting = [way for way, problems in zip(ways, misfits, strict=True) if not problems]
    if not fitting:
        problems = min(misfits, key=len)
        raise InputError(
            f"{len(problems)} of {len(edits)} changed tensors do not fit the base: {shortlist(problems)}.",
            "Give the base that the adapter was trained on.",
        )
    known = [sum(name in base for name in way.values()) for way in fitting]
    fitting = [way for way, count in zip(fitting, known, strict=True) if count == max(known)]
    places = dict.fromkeys(next(iter(way.values())) for way in fitting)
    if misfits[0] and len(places) > 1:
        raise InputError(f"its names fit the base in several places: {shortlist(places)}.", MERGE_HINT)
    placed = {fitting[0][name]: edit for name, edit in edits.items()}
    return _turn(
        {n: e for n, e in placed.items() if n not in base or is_mergeable(info(base, n).dtype)}, base
    )


def _ways(names: list[str], base: Collection[str]) -> list[dict[str, str]]:
    """List where an adapter's names may stand in the base: as they are, or one prefix more or less."""
    above = {
        base_name.removesuffix(n)
        for n in names[:_LOOKED_AT]
        for base_name in base
        if base_name.endswith(f".{n}")
    }
    inner = {n.removesuffix(b) for n in names[:_LOOKED_AT] for b in _ends(n) if b in base} - {""}
    ways = [tuple(names)]
    ways += [tuple(prefix + name for name in names) for prefix in sorted(above)]
    ways += [tuple(name.removeprefix(prefix) for name in names) for prefix in sorted(inner)]
    return [dict(zip(names, way, strict=True)) for way in dict.fromkeys(ways) if len(set(way)) == len(way)]


def _ends(name: str) -> list[str]:
    """List a name's dotted endings."""
    parts = name.split(".")
    return [".".join(parts[start:]) for start in range(1, len(parts))]


def _misfits(
    edits: Mapping[str, Edit], way: Mapping[str, str], base: State, tensors: Checkpoint
) -> Iterator[str]:
    for name, edit in edits.items():
        if edit.saved and not edit.factors and _is_of_own_shape(way[name], edit, base, tensors):
            continue  # a module of the adapter's own, whole: the audit of all experts judges it
        if way[name] not in base:
            yield f"{name} is not in the base"
            continue
        shape, dtype = info(base, way[name])
        saved = tensors.info(edit.saved).shape if edit.saved else shape
        turned = edit.linear and edit.shape[::-1] == shape
        if saved != shape or (edit.factors and edit.shape != shape and not turned):
            yield f"{name} {list(edit.shape or saved)} vs base {list(shape)}"
        elif edit.factors and not is_mergeable(dtype):
            yield f"{name} is {dtype} in the base (dequantise it first)"


def _is_of_own_shape(name: str, edit: Edit, base: State, tensors: Checkpoint) -> bool:
    return bool(edit.saved) and (name not in base or info(base, name).shape != tensors.info(edit.saved).shape)


def _turn(edits: dict[str, Edit], base: State) -> dict[str, Edit]:
    """Let shapes tell which linear layers store [in, out]; a square one is as fan_in_fan_out says.

    PEFT stores one fan_in_fan_out for layers of both kinds: where shapes speak against it, it is void.
    """
    linear = {name: edit for name, edit in edits.items() if edit.linear}
    square = [name for name, edit in linear.items() if edit.shape[0] == edit.shape[1]]
    turned = {
        name: replace(edit, transposed=info(base, name).shape != edit.shape)
        for name, edit in linear.items()
        if name not in square
    }
    if square and any(edit.transposed != linear[name].transposed for name, edit in turned.items()):
        raise InputError(
            "the shapes of some layers contradict its fan_in_fan_out, so that these square ones can be "
            f"read in two ways: {shortlist(square)}.",
            MERGE_HINT,
        )
    return edits | turned


def _refuse_ties(base: State, names: Collection[str]) -> None:
    """Refuse to change a tensor that the base holds twice: its copy would stay behind."""

    def look(name: str) -> tuple[object, ...]:
        return info(base, name), *base[name].flatten()[:64].tolist()

    kinds = {info(base, name) for name in names}
    alike: dict[tuple[object, ...], list[str]] = defaultdict(list)
    for name in base:
        if info(base, name) in kinds:
            alike[look(name)].append(name)
    for name in names:
        twins = [n for n in alike[look(name)] if n != name and torch.equal(base[n], base[name])]
        if twins and base[name].any():
            raise InputError(
                f"it changes {name}, which the base holds again as {twins[0]}.",
                f"If the model ties them, save the base without {twins[0]}. Otherwise: {MERGE_HINT}",
            )
