"""`adamerge data check`: files, images, classes and digests of a benchmark's data, before any work."""

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from typing import Any

import yaml

from adamerge.atomic import refuse_existing, write_text
from adamerge.benchmarks import define, defined, read_benchmark
from adamerge.benchmarks.files import read_document
from adamerge.checkpoints import class_names
from adamerge.commands.bench import benchmark_file
from adamerge.data.checking import Report, check_source
from adamerge.data.labels import HeadClasses
from adamerge.data.tasks import TaskSpec, resolve
from adamerge.data.texts import preprocessing_of
from adamerge.documents import read_mapping
from adamerge.errors import AdamergeError, InputError, nearest, shortlist
from adamerge.models import Head, open_backbone
from adamerge.models.opening import format_of
from adamerge.progress import console, print_columns, terminal

_PARTS = {"test": ("n_test", "digest"), "adapt": ("n_adapt", "adapt_digest")}
_EXIT_DATA = 3


def data(
    action: str,
    *,
    benchmark: str | None = None,
    sources: list[str] | None = None,
    mirror: str | None = None,
    manifest: str | None = None,
    write: str | None = None,
    json: bool = False,
    overwrite: bool = False,
) -> int:
    """Count files, images (or texts), classes and images per class, and decode every image once.

    Files that are not read are named. Labels are compared with the classes of the task, of its head file
    and of its expert's configuration. Exits with 3 where an image cannot be decoded, or something differs
    from the manifest: a YAML file with n_test, classes (names in label order, or their number), digest,
    n_adapt and adapt_digest by task, each only where it is known. The CLIP benchmarks know their n_test.

    Args:
        action: What to do: check.
        benchmark: clip8, clip14, clip20, ...; a YAML file with data.tasks; or embedded.
        sources: Sources of labelled images instead, each NAME=SOURCE.
        mirror: A folder where the CLIP benchmarks' data are looked for before the hub is.
        manifest: What is expected.
        write: Writes the manifest of what is there to this file.
        json: Print one JSON document instead of a table.
        overwrite: Replace the manifest if it exists.
    """
    if action != "check":
        raise InputError(f"there is no action {action!r}.", "Write: adamerge data check --benchmark NAME")
    tasks, expected = _tasks(benchmark, sources, mirror)
    expected = _read_manifest(Path(manifest), tasks) if manifest else expected
    if write is not None:
        refuse_existing(Path(write), overwrite=overwrite)
    tokenize = cache(partial(_tokenizer, benchmark))
    heads = _heads(str(benchmark), tasks) if sources is None and benchmark not in defined() else {}
    reports = {key: _report(*key, tasks, expected, tokenize=tokenize, heads=heads) for key in _parts(tasks)}
    if json:
        _print_json(reports)
    else:
        _print(reports)
    if write is not None:
        write_text(Path(write), yaml.safe_dump(_manifest(reports), sort_keys=False, allow_unicode=True))
        console.print(f"Manifest of what is there: {write}")
    return _EXIT_DATA if any(report.problems for report in reports.values()) else 0


def _tasks(
    benchmark: str | None, sources: list[str] | None, mirror: str | None
) -> tuple[dict[str, TaskSpec], dict[str, dict[str, Any]]]:
    """Give the rows of all tasks, and what the benchmark itself knows of them."""
    if (benchmark is None) == (sources is None):
        raise InputError("either --benchmark or --sources is needed.", "Write --sources NAME=SOURCE ...")
    if sources is not None:
        pairs = [source.partition("=") for source in sources]
        if not all(name and path for name, _, path in pairs):
            raise InputError(f"--sources {' '.join(sources)}: a name is missing.", "Write NAME=SOURCE ...")
        return {name: TaskSpec(test=path) for name, _, path in pairs}, {}
    if benchmark in defined():
        definition = define(benchmark, mirror=mirror)
        rows = {name: TaskSpec(**row) for name, row in definition.document["data"]["tasks"].items()}
        return rows, {name: {"n_test": count} for name, count in definition.premises.images.items()}
    file = benchmark_file(str(benchmark))
    if "data" not in read_document(file):
        raise InputError(f"{file} has no data.tasks.", "Write data: {tasks: {NAME: {test: SOURCE}}}.")
    return resolve(read_benchmark(file, "data")[0].get("tasks") or {}), {}


def _heads(benchmark: str, tasks: Mapping[str, TaskSpec]) -> dict[str, HeadClasses]:
    """Return what head files, and the configurations of local experts, say of the heads' rows.

    What cannot be read there is told by the commands that read it.
    """
    model = read_document(benchmark_file(benchmark)).get("model")
    experts = model.get("experts") if isinstance(model, Mapping) else None
    experts = experts if isinstance(experts, Mapping) else {}
    heads: dict[str, HeadClasses] = {}
    for task, spec in tasks.items():
        with suppress(InputError):
            if spec.head:
                head = Head.from_file(spec.head)
                heads[task] = HeadClasses(len(head.weight), head.classes, by_classes=True)
            elif task in experts:
                folder = Path(str(experts[task]))
                names, own = class_names(folder) or (), not format_of(folder).normalize
                heads[task] = HeadClasses(len(names) or None, names if own else (), by_classes=own)
    return heads


def _parts(tasks: Mapping[str, TaskSpec]) -> Iterator[tuple[str, str]]:
    """Name every task's sources once: where both parts are the same images, those are tested."""
    for name, spec in tasks.items():
        if spec.adapt and spec.adapt != spec.test:
            yield name, "adapt"
        if spec.test:
            yield name, "test"


def _report(
    name: str,
    part: str,
    tasks: Mapping[str, TaskSpec],
    expected: Mapping[str, Mapping[str, Any]],
    *,
    tokenize: Callable[[], Any],
    heads: Mapping[str, HeadClasses],
) -> Report:
    count, digest = _PARTS[part]
    row = expected.get(name, {})
    known = {"images": row.get(count), "digest": row.get(digest)}
    known |= {"classes": row.get("classes")} if part == "test" else {}
    options: dict[str, Any] = {"part": part, "tokenize": tokenize, "head": heads.get(name)}
    return check_source(tasks[name], f"task {name!r}, {part} data", known, **options)


def _tokenizer(benchmark: str | None) -> Any:
    """Return what tokenises texts for the benchmark's base; None where that is not known, or reads images."""
    if benchmark is None or benchmark in defined():
        return None
    try:
        model, data = read_benchmark(benchmark_file(benchmark), "model", "data")
        backbone = open_backbone(model["base"])
        return preprocessing_of(backbone, data.get("max_length"))[0] if backbone.modality == "text" else None
    except (AdamergeError, KeyError):  # the model is not what is checked here
        return None


def _read_manifest(file: Path, tasks: Mapping[str, TaskSpec]) -> dict[str, dict[str, Any]]:
    known = {"classes", *(key for keys in _PARTS.values() for key in keys)}
    try:
        rows = {str(name): dict(row) for name, row in read_mapping(file).items()}
    except (InputError, ValueError, TypeError) as error:
        reason = str(error).partition("\n")[0].removesuffix(".")
        raise InputError(f"--manifest {file} cannot be read: {reason}.") from error
    for name, row in rows.items():
        for key in row.keys() - known:
            raise InputError(f"--manifest {file}, {name}: {key!r} is unknown.", nearest(key, known))
        if name not in tasks:
            raise InputError(f"--manifest {file} has {name!r}, which is no task.", nearest(name, tasks))
    return rows


def _manifest(reports: Mapping[tuple[str, str], Report]) -> dict[str, dict[str, Any]]:
    rows: dict[str, dict[str, Any]] = {}
    for (name, part), report in reports.items():
        count, digest = _PARTS[part]
        row = rows.setdefault(name, {})
        row |= {count: report.images, digest: report.digest}
        if part == "test":
            row["classes"] = list(report.classes) or len(report.per_class)
    return rows


def _print_json(reports: Mapping[tuple[str, str], Report]) -> None:
    rows = [{"task": name, "part": part, **asdict(report)} for (name, part), report in reports.items()]
    sys.stdout.write(json.dumps(rows, indent=2, ensure_ascii=False) + "\n")


def _print(reports: Mapping[tuple[str, str], Report]) -> None:
    lines, kinds = [], {report.kind for report in reports.values() if report.images} or {"images"}
    for (name, part), report in reports.items():
        sizes, per_class = max(len(report.classes), len(report.per_class)), report.per_class
        spread = f"{min(per_class)}-{max(per_class)}" if per_class else "-"
        count = report.images if len(kinds) == 1 else f"{report.images} {report.kind}"
        cells = (report.files, count, sizes, spread, report.digest[:12])
        lines.append([name, part, *map(str, cells)])
    column = kinds.pop() if len(kinds) == 1 else "inputs"
    print_columns(["task", "part", "files", column, "classes", "per class", "digest"], lines)
    out = terminal()
    for (name, part), report in reports.items():
        left = [f"these were left out: {shortlist(report.left_out)}"] if report.left_out else []
        for line in (*report.notes, *report.problems, *left):
            out.print(f"{name}, {part}: {line}", markup=False, soft_wrap=True)
