"""The gate: a benchmark's premises, looked at before anything is merged."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adamerge.data.module import MultiTaskData
from adamerge.documents import read_mapping
from adamerge.errors import AdamergeError, DataError, InputError, nearest
from adamerge.models import Backbone

_KEYS = ("size", "interpolation", "mean", "std")
_NOISE_SIDE = 90  # of the probe image; three times as wide as high, so that every centre crop is exact


@dataclass(frozen=True)
class Premises:
    """What must hold before a table means anything.

    Attributes:
        accuracy: Percent that each expert must reach with its own head, by task.
        images: Number of test images, by task.
        activation: "quick_gelu" or "gelu".
        transform: ``size`` (of the shortest side and the centre crop), ``interpolation`` (PIL's name),
            ``mean`` and ``std``.
        tolerance: Points by which an expert may miss its accuracy, in either direction.
        waived: Tasks whose failures are reported, and do not stop.
        source: Where the accuracies come from.
    """

    accuracy: dict[str, float] = field(default_factory=dict)
    images: dict[str, int] = field(default_factory=dict)
    activation: str | None = None
    transform: dict[str, Any] | None = None
    tolerance: float = 1.0
    waived: tuple[str, ...] = ()
    source: str = ""

    @property
    def are_stated(self) -> bool:
        """Whether anything must hold."""
        return bool(self.accuracy or self.images or self.activation or self.transform)

    def expecting(self, file: Path) -> "Premises":
        """Replace premises by those of a YAML file with some of these attributes but ``waived``.

        Its tasks, and its keys of ``transform``, join ours.

        Raises:
            InputError: The file cannot be read, has other keys, or its ``transform`` is none.
        """
        known = [f.name for f in fields(self) if f.name != "waived"]
        try:
            given = _read_expectations(file)
            for key in given:
                if key not in known:
                    raise InputError(f"--expect {file} has an unknown key {key!r}.", nearest(key, known))
            accuracy = {task: float(value) for task, value in given.get("accuracy", {}).items()}
            images = {task: int(value) for task, value in given.get("images", {}).items()}
            given["tolerance"] = float(given.get("tolerance", self.tolerance))
            transform = {**(self.transform or {}), **given.get("transform", {})}
        except (ValueError, TypeError, AttributeError, OverflowError) as error:
            raise InputError(f"--expect {file} cannot be read: {error}.") from error
        _require_transform(transform, f"--expect {file}")
        given |= {"accuracy": self.accuracy | accuracy, "images": self.images | images}
        return replace(self, **{"source": str(file), **given, "transform": transform or None})


def _read_expectations(file: Path) -> dict[str, Any]:
    try:
        return read_mapping(file)
    except InputError as error:
        raise InputError(f"--expect {file} cannot be read: {error}") from error


def _require_transform(transform: Mapping[str, Any], role: str) -> None:
    """Refuse a preprocessing, where one is stated, that cannot be compared with a backbone's."""
    from PIL import Image

    methods = [method.name.lower() for method in Image.Resampling]
    for key in transform:
        if key not in _KEYS:
            raise InputError(f"{role}: transform has an unknown key {key!r}.", nearest(key, _KEYS))
    missing = [key for key in _KEYS if transform and key not in transform]
    if missing:
        raise InputError(f"{role}: transform lacks {', '.join(missing)}.", f"It needs {', '.join(_KEYS)}.")
    name, size = transform.get("interpolation", "bicubic"), transform.get("size", 1)
    if str(name).lower() not in methods:
        raise InputError(f"{role}: interpolation {name!r} is unknown.", nearest(str(name), methods))
    if not isinstance(size, int) or size < 1:
        raise InputError(f"{role}: transform has size {size!r}.", "It is one positive number of pixels.")
    for key in ("mean", "std"):
        values = transform.get(key, [0.0] * 3)
        if not isinstance(values, list) or [type(v) in (int, float) for v in values] != [True] * 3:
            raise InputError(f"{role}: transform has {key} {values!r}.", "It is a list of three numbers.")


def require_known(names: Iterable[str], tasks: Collection[str]) -> None:
    """Refuse names of tasks that there are not, which would check or waive nothing.

    Raises:
        InputError: A name is unknown.
    """
    for name in names:
        if name not in tasks:
            raise InputError(f"the gate names task {name!r}, and there is none.", nearest(name, tasks))


class Finding(NamedTuple):
    """A premise that does not hold: of a task, or (None) of the model."""

    task: str | None
    problem: str
    kind: type[AdamergeError] = DataError


def check_backbone(premises: Premises, backbone: Backbone) -> list[Finding]:
    """Compare activation, preprocessing and normalisation with what they do, not with their names."""
    found: list[str] = []
    module = getattr(backbone, "module", None)
    if premises.activation and module is not None:
        activation = _activation_of(module)
        if activation != premises.activation:
            found.append(f"activation is {activation}, the checkpoints need {premises.activation}")
    if premises.transform:
        found += _transform_problems(premises.transform, backbone)
    return [Finding(None, problem, InputError) for problem in found]


def check_images(premises: Premises, data: MultiTaskData) -> list[Finding]:
    """Load every task's test images; compare their number, and the order of their class names."""
    found = []
    for task in data.tested_tasks:
        try:
            images = data.test(task)
        except DataError as error:
            found.append(Finding(task, str(error).replace("\n", " ").removeprefix(f"task {task!r}: ")))
            continue
        expected = premises.images.get(task, len(images))
        if len(images) != expected:
            found.append(Finding(task, f"{len(images)} test images, {expected} are expected"))
    return found


def check_accuracy(premises: Premises, accuracy: Mapping[str, float]) -> list[Finding]:
    """Compare every expert's accuracy with its own head with the one that it must reach."""
    found = []
    for task, expected in premises.accuracy.items():
        reached = "accuracy was not measured, for want of test images or of an expert"
        if task in accuracy:
            reached = f"the expert reaches {accuracy[task]:.2f} %"
            if abs(accuracy[task] - expected) <= premises.tolerance:
                continue
        problem = f"{reached}, {expected:.2f} % is expected (tolerance {premises.tolerance:g})"
        found.append(Finding(task, problem, InputError))
    return found


def judge(findings: Sequence[Finding], premises: Premises) -> list[str]:
    """Stop for what does not hold and is not waived, all of it in one message.

    Returns:
        What is waived, for the report.

    Raises:
        DataError: Only data are at fault.
        InputError: Models, or models and data are.
    """
    grave = [finding for finding in findings if finding.task not in premises.waived]
    if grave:
        lines = [f"{finding.task or 'model'}: {finding.problem}" for finding in grave]
        kind = DataError if all(finding.kind is DataError for finding in grave) else InputError
        tasks = ",".join(dict.fromkeys(finding.task for finding in grave if finding.task))
        waive = f" To go on all the same, and have the report say so: --waive {tasks}." if tasks else ""
        raise kind(
            "the benchmark's premises do not hold, and nothing was merged:\n  " + "\n  ".join(lines),
            f"See to the checkpoints and data, or state other premises with --expect FILE.{waive}",
        )
    return [f"waived, {finding.task}: {finding.problem}" for finding in findings]


def _activation_of(module: torch.nn.Module) -> str:
    """Name what the blocks compute by its value at 1: classes and settings have many names."""
    probe = torch.ones(1)
    known = {"quick_gelu": torch.sigmoid(1.702 * probe), "gelu": torch.nn.functional.gelu(probe)}
    acts = [part for part in module.modules() if "GELU" in type(part).__name__.upper()]
    values = {type(part).__name__: part(probe) for part in acts}
    names = {next((k for k, v in known.items() if v.allclose(x)), n) for n, x in values.items()}
    return " and ".join(sorted(names)) or "unknown"


def _transform_problems(expected: Mapping[str, Any], backbone: Backbone) -> list[str]:
    from PIL import Image

    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (_NOISE_SIDE, 3 * _NOISE_SIDE, 3), generator=generator, dtype=torch.uint8)
    probe = Image.fromarray(pixels.numpy())
    wanted, found = _preprocessed(probe, expected), backbone.preprocess(probe)
    size = expected["size"]
    if found.shape != wanted.shape:
        return [f"preprocessing gives {[*found.shape]}, the checkpoints need {[*wanted.shape]}"]
    problems = []
    if (found.int() - wanted.int()).abs().max() > 1:
        problems.append(
            f"preprocessing is not {expected['interpolation']} to {size} and a centre crop "
            f"(it says {getattr(backbone, 'transform_key', 'nothing')})"
        )
    for name in ("mean", "std"):
        ours = getattr(backbone, name, torch.zeros(0)).flatten()
        theirs = torch.tensor(expected[name])
        if ours.shape != theirs.shape or not ours.allclose(theirs, atol=1e-4):
            problems.append(f"{name} of pixels is {ours.tolist()}, the checkpoints need {expected[name]}")
    return problems


def _preprocessed(image: Any, expected: Mapping[str, Any]) -> Tensor:
    """Apply the expected preprocessing to the probe, with PIL alone."""
    import numpy as np
    from PIL import Image

    size, method = expected["size"], Image.Resampling[str(expected["interpolation"]).upper()]
    cropped = image.resize((3 * size, size), method).crop((size, 0, 2 * size, size))
    return torch.from_numpy(np.array(cropped)).permute(2, 0, 1)
