"""Where a result comes from: digests of its inputs and files, and the model card that tells it."""

import contextlib
import hashlib
import json
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

import adamerge
from adamerge import ownership
from adamerge.atomic import write_text
from adamerge.errors import AdamergeWarning, InputError, shortlist
from adamerge.results import ResultRow, agreements, make_row, markdown, markdown_table

MANIFEST, INPUTS = "manifest.json", "inputs.json"
SCHEMA_VERSION = 1  # of the files that a run writes
_LIBRARIES = (
    *("torch", "torchvision", "pytorch-lightning", "open_clip_torch", "transformers", "tokenizers", "timm"),
    *("pillow", "numpy", "datasets"),
)
_VERSIONS = [f"preprocessing.{name}" for name in ("library", "pillow")]  # what they give is hashed itself
_NAMED = ("weights", "data", "files", "tasks", "config.data.tasks", "config.model.experts")
_HARMLESS = (  # they change how a run goes, or how long, but no step of it
    "folder",
    "config.trainer.max_steps",
    "config.trainer.logger",
    "config.data.num_workers",
    "config.data.eval_batch_size",
    "config.save_every",
    "config.run_dir",
)
_STATIC = "The weights are one static model in the base's own layout; they load without adamerge.\n"
_HEADS = (
    "\nEach task's head is in `heads.safetensors`: a classifier's last layer among the weights is the base's "
    "own. `adamerge export` writes a plain checkpoint with one task's head, or with all.\n"
)
_ROUTED = "Every input gets weights of its own: the shared model plus a mixture of the experts.\n"
_FLOW = "Blocks of several models run in an order that was searched; `adamerge.json` has it.\n"
_LOADING = """adamerge loads them, and runs no code of this folder:

```python
import adamerge

model = adamerge.load("FOLDER")  # this folder, or its hub id
found = model.predict(images)  # PIL images; found.task, .class_name, .probability, .weights (of the experts)
```

`adamerge predict --model FOLDER --data IMAGES --out FILE.parquet` does the same for a folder of images.
"""
_ADAPTED = """What is measured here has a correction of each task's features (Representation Surgery) in
`heads.safetensors`. `adamerge.load("FOLDER").predict(images, task=NAME)` applies it; elsewhere the weights
load without it, and what is measured here does not hold.
"""
_BASELINES = {
    "oracle": "the true task's expert",
    "hard_top_1": "the router's best expert alone",
    "uniform": "all experts alike",
    "shared": "the shared model alone",
}
_VOLATILE = ("wandb", "lightning_logs")  # loggers go on writing to their folders


def code_version() -> dict[str, str]:
    """Return version and digest of adamerge's own source, and versions of what changes numbers."""
    from importlib.metadata import PackageNotFoundError, version

    package = Path(adamerge.__file__).parent
    total = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        total.update(path.relative_to(package).as_posix().encode() + path.read_bytes())
    libraries = {}
    for name in _LIBRARIES:
        with contextlib.suppress(PackageNotFoundError):  # built from source, under another name
            libraries[name] = version(name)
    return {"adamerge": adamerge.__version__, "source": total.hexdigest(), **libraries}


def read_inputs(folder: Path) -> dict[str, Any]:
    """Read the digests and the configuration that a run began with."""
    return json.loads((folder / INPUTS).read_text(encoding="utf-8"))


def require_same_inputs(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse to resume a run whose configuration, weights, data or models' own settings have changed.

    Other versions of the libraries are told in a warning: they may change the last digits, and whether they
    change what the model reads is known from the digests of the data. What a run of an older adamerge did not
    record is not compared.

    Raises:
        InputError: What changed.
    """
    if before.get("schema_version") != SCHEMA_VERSION:
        raise InputError(
            f"this run was written in schema {before.get('schema_version')}, here it is {SCHEMA_VERSION}.",
            "Resume it with the version of adamerge that began it, or start anew.",
        )
    changed = changes(before, now)
    if changed:
        raise InputError(
            f"this run cannot be resumed, its inputs changed: {shortlist(changed, 3)}.",
            "Restore them, or pass --resume_anyway true.",
        )
    _warn_of_versions(before, now)


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Compare what two runs began with.

    Returns:
        One line per value that differs and changes a step: "KEY: OLD before, NEW now".
    """
    old, new = (_flatten({key: part[key] for key in part if key != "code"}) for part in (before, now))
    changed = [key for key in old if old[key] != new.get(key) and key not in _VERSIONS]
    changed += [key for key in new if key not in old and _was_recorded(key, before, now)]
    decays = old.get("config.model.decay", "none") != "none"  # the rate depends on the last step
    changed = [
        key
        for key in changed
        if not key.startswith(_HARMLESS) or (decays and key == "config.trainer.max_steps")
    ]
    return [f"{key}: {old.get(key)!r} before, {new.get(key)!r} now" for key in changed]


def _was_recorded(key: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Tell whether a run would have recorded an input that it does not have: all of the same adamerge's own.

    One of an older adamerge had all names of tasks, models and files then, but not the options of today.
    """
    if key.partition(".")[0] not in before:
        return False
    if before.get("code", {}).get("source") == now.get("code", {}).get("source"):
        return True
    place = next((place for place in _NAMED if key.startswith(f"{place}.")), None)
    if place is None:
        return False
    name = key.removeprefix(f"{place}.")
    return not any(name.startswith(f"{known}.") for known in _part(before, place))


def _part(tree: Mapping[str, Any], place: str) -> Mapping[str, Any]:
    """Return what lies at a dotted place; empty where nothing does."""
    found: Any = tree
    for name in place.split("."):
        found = found.get(name, {}) if isinstance(found, Mapping) else {}
    return found if isinstance(found, Mapping) else {}


def _warn_of_versions(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    old, new = before.get("code", {}), now.get("code", {})
    changed = [
        f"{name} {old[name]} (now {new[name]})" for name in old if new.get(name, old[name]) != old[name]
    ]
    changed = [text for text in changed if not text.startswith("source ")]
    if changed:
        warnings.warn(
            f"this run was begun with {', '.join(changed)}: numbers may differ in their last digits.",
            AdamergeWarning,
            stacklevel=3,
        )


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Compare two trees of settings.

    Returns:
        One line per setting that differs: "KEY: OLD before, NEW now".
    """
    old, new = _flatten(dict(before)), _flatten(dict(now))
    changed = [key for key in {**old, **new} if key not in old or key not in new or old[key] != new[key]]
    return [f"{key}: {old.get(key)!r} before, {new.get(key)!r} now" for key in changed]


def write_manifest(folder: Path) -> None:
    """Write the SHA-256 of every file that a finished run wrote."""
    write_text(folder / MANIFEST, json.dumps(_hashes(folder), indent=2) + "\n")


def changed_files(folder: Path) -> list[str]:
    """Compare a run's files with its manifest.

    Returns:
        One line per file that is missing or differs.

    Raises:
        InputError: The folder has no manifest.
    """
    if not (folder / MANIFEST).exists():
        raise InputError(f"{folder} has no {MANIFEST}.", "Only a finished run can be verified.")
    expected = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    told = {name: "missing" for name in expected if not (folder / name).is_file()}
    told |= {n: "changed" for n in expected if n not in told and _hash(folder / n) != expected[n]}
    return [f"{name}: {told[name]}" for name in expected if name in told]


def model_card(
    sources: Mapping[str, str],
    digests: Mapping[str, str],
    config: Mapping[str, Any],
    row: ResultRow | None = None,
    *,
    routed: bool = False,
    flow: bool = False,
    adapted: bool = False,
    heads: bool = True,
    notes: Sequence[str] = (),
) -> str:
    """Write a model card in the hub's form: front matter, what was merged, how, and how well.

    Args:
        sources: Path or id of the "base" and of each expert.
        digests: SHA-256 of the same.
        config: The resolved configuration.
        row: The evaluated row, once there is one.
        routed: Whether every input gets a mixture of its own.
        flow: Whether blocks of several models run in an order of their own.
        adapted: Whether heads read corrected features.
        heads: Whether the tasks' heads lie beside the weights of a static model.
        notes: What else is to be known of the weights, a paragraph each.
    """
    front: dict[str, Any] = {"tags": ["merge", "adamerge"]}
    ids = [source for source in sources.values() if _is_hub_id(source)]
    if ids:
        front |= {"base_model": ids, "base_model_relation": "merge"}
    told = (_ROUTED if routed else _FLOW) + _LOADING if routed or flow else _STATIC + _HEADS * heads
    told += "".join(f"\n{note}\n" for note in notes)
    listed = "\n".join(f"- {name}: `{path}` (SHA-256 `{digests[name]}`)" for name, path in sources.items())
    measured = "".join(f"## {title}\n\n{text}\n" for title, text in _measured(row)) if row else ""
    return (
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n"
        f"# Merged by adamerge {adamerge.__version__}: {config.get('method', 'adaptive')}\n\n{listed}\n\n"
        f"{told}{_ADAPTED if adapted else ''}\n{measured}"
        f"## Configuration\n\n```yaml\n{yaml.safe_dump(dict(config), sort_keys=False)}```\n"
    )


def _is_hub_id(source: str) -> bool:
    """Check whether a source is USER/NAME on the hub: the front matter of a card knows nothing else."""
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", source)) and not Path(source).exists()


def _measured(row: ResultRow) -> Iterator[tuple[str, str]]:
    """Give titles and texts of what a row tells; a routed model's stands beside its baselines."""
    found = row.details
    if found.get("recipe"):
        yield "Recipe", f"{found['recipe']}\n"
    if row.accuracy:
        baselines = found.get("baselines", {})
        rows = [row, *(make_row(name, accuracy) for name, accuracy in baselines.items())]
        told = [f"- {name}: {what}\n" for name, what in _BASELINES.items() if name in baselines]
        yield "Top-1 accuracy, %", "".join([markdown_table(rows), "\n" * bool(told), *told])
    if found.get("agreement"):
        told = agreements(row, found["agreement"])
        yield "Agreement with the experts, without labels", "".join(f"- {line}\n" for line in told)
    if found.get("routing"):
        lines = [[task, *(f"{w:.2f}" for w in weights)] for task, weights in found["routing"].items()]
        yield "Mean routing weight of each expert", markdown([["images of", *found["experts"]], *lines])
    if found.get("stored"):
        parts = [[part, size["scalars"], size["n_bytes"]] for part, size in found["stored"].items()]
        total = ["sum", *(sum(column) for column in list(zip(*parts, strict=True))[1:])]
        lines = [[part, *(f"{count:,}" for count in counts)] for part, *counts in [*parts, total]]
        yield "Stored", markdown([["part", "numbers", "bytes"], *lines])
    if found.get("seconds_per_batch"):
        shared, mixture = (1000 * found["seconds_per_batch"][key] for key in ("shared", "mixture"))
        yield (
            "Latency",
            f"The router and the mixture add {mixture - shared:.1f} ms to a batch: {mixture:.1f} ms instead "
            f"of {shared:.1f} ms for the shared model alone (medians, measured where the model was made).\n",
        )


def _hashes(folder: Path) -> dict[str, str]:
    if ownership.kind_of(folder) is None:
        names = [p.relative_to(folder).as_posix() for p in sorted(folder.rglob("*")) if p.is_file()]
    else:
        names = sorted(ownership.survey(folder).files)
    passed = (MANIFEST, ownership.LIST)
    names = [name for name in names if Path(name).name not in passed and Path(name).parts[0] not in _VOLATILE]
    return {name: _hash(folder / name) for name in names}


def _hash(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {
        key: value
        for name, part in tree.items()
        for key, value in _flatten(part, f"{prefix}.{name}" if prefix else str(name)).items()
    }
