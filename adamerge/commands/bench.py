"""`adamerge bench run BENCHMARK`: a table of methods on one benchmark."""

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from adamerge.atomic import write_text
from adamerge.benchmarks import Benchmark, Definition, configs, define, defined, method_file, oracles
from adamerge.benchmarks.clip import AdaptSplit, Form
from adamerge.benchmarks.gate import Premises
from adamerge.benchmarks.opened import INDIVIDUAL
from adamerge.benchmarks.report import write_report
from adamerge.documents import read_mapping, require_source
from adamerge.errors import AdamergeError, InputError, nearest
from adamerge.progress import duration, print_line
from adamerge.results import ResultRow, outcome
from adamerge.static import METHODS

_LIMITS = ("max_", "min_")  # of the trainer's settings, those that say how long it learns


def bench(
    action: str,
    benchmark: str,
    *,
    methods: list[str] | None = None,
    out: str | None = None,
    backbone: str | None = None,
    family: str | None = None,
    form: Form | None = None,
    mirror: str | None = None,
    base: str | None = None,
    experts: dict[str, str] | None = None,
    adapt_split: AdaptSplit | None = None,
    corruption: str | None = None,
    codec: str | None = None,
    expect: str | None = None,
    waive: list[str] | None = None,
    gate: dict[str, float] | None = None,
    data: dict[str, Any] | None = None,
    trainer: dict[str, Any] | None = None,
    force: bool = False,
) -> int:
    """Run methods on a benchmark, one row each; rows that were finished before are not computed again.

    Before anything is merged, the benchmark's premises must hold: test images, activation, preprocessing,
    and every expert's accuracy with its own head.

    Args:
        action: What to do: run.
        benchmark: clip8, clip14, clip20, clip8-unseen1, clip8-unseen2 or clip4; a YAML file of base, experts
            and tasks; or embedded.
        methods: Names, separated by commas or repeated: zero_shot, individual, any static method or oracle,
            a file of configs/methods, or the path of your own. Default: the bounds, static methods, oracles.
        out: Folder of the table and the rows; default: runs/bench/BENCHMARK.
        backbone: Of the CLIP benchmarks: ViT-B-32 (default), ViT-B-16 or ViT-L-14.
        family: Of their checkpoints: tanganke (default), tanganke_lora, task_arithmetic or tall.
        form: Of their files: hf or open_clip; default: the family's own.
        mirror: A folder where models and data are looked for by their hub ids, before the hub is.
        base: Another base.
        experts: Other experts, by task: --experts.cars PATH.
        adapt_split: Images to adapt on: train (default), or test, the published protocol.
        corruption: motion_blur, impulse_noise, gaussian_noise, pixelate, spatter, contrast or
            jpeg_compression: the hub's corrupted test images; NAME/SEVERITY corrupts here, the images to
            adapt on too.
        codec: Stored form of the task vectors: fp32 (default), bf16, fp16.
        expect: A YAML file of other premises: accuracy, images, activation, transform, tolerance.
        waive: Tasks whose premises need not hold; the report says so.
        gate: --gate.tolerance POINTS by which an expert may miss its accuracy; default: 1.
        data: Settings of the images: --data.batch_size 32, --data.holdout 0.
        trainer: Settings of the rows of configs/methods: --trainer.accelerator gpu; numbers of steps,
            such as --trainer.max_steps 100, are those of rows that learn.
        force: Accept experts that look as if they came from another base, or whose settings differ from its.
    """
    if action != "run":
        raise InputError(f"there is no action {action!r}.", "Write: adamerge bench run BENCHMARK")
    began = time.monotonic()
    given: dict[str, Any] = {
        "backbone": backbone,
        "family": family,
        "form": form,
        "mirror": mirror,
        "base": base,
        "experts": experts,
        "adapt_split": adapt_split,
        "corruption": corruption,
        "codec": codec,
    }
    given = {name: value for name, value in given.items() if value is not None}
    names = [name for item in methods or () for name in item.split(",")]
    names = names or ["zero_shot", "individual", *sorted(METHODS), *oracles()]
    definition = define(benchmark, **given) if benchmark in defined() else None
    if definition is None and given:
        raise InputError(
            f"--{next(iter(given))} is an option of the CLIP benchmarks: {', '.join(defined())}."
        )
    source = definition.document if definition else benchmark_file(benchmark)
    name = definition.folder if definition else Path(benchmark).stem
    table = Benchmark(
        source,
        Path(out) if out else Path("runs") / "bench" / name,
        definition.premises if definition else None,
        data,
        force=force,
    )
    table.premises = _stated(table.premises, expect, waive, gate)
    clean = define(benchmark, **{**given, "corruption": ""}) if corruption else None
    with table.claimed():
        told = _pass_clean(clean, table, data) if clean else []
        settings = {name: _settings(name, trainer or {}) for name in names}
        rows = table.run(names, settings, keep_going=True)
        table.waived = [*told, *table.waived]
        if rows:
            _write(table, rows, name, definition)
            print_line(_closing(rows, time.monotonic() - began, table.out))
    return _exit_code(table.failures, len(names))


def _closing(rows: Sequence[ResultRow], seconds: float, out: Path) -> str:
    merged = [row for row in rows if row.mean is not None and row.method != INDIVIDUAL]
    best = max(merged, key=lambda row: row.mean or 0, default=None)
    suffix = f" Best: {best.method}, {outcome(best)}." if best else ""
    return f"{len(rows)} rows in {duration(seconds)}.{suffix} Table, picture and report: {out}"


def _exit_code(failures: Mapping[str, Exception], count: int) -> int:
    """Name the rows that failed, and return the first one's exit code; 0 where none failed."""
    if not failures:
        return 0
    sys.stderr.write(f"adamerge: {len(failures)} of {count} rows failed: {', '.join(failures)}.\n")
    first = next(iter(failures.values()))
    return first.exit_code if isinstance(first, AdamergeError) else AdamergeError.exit_code


def _write(table: Benchmark, rows: list[ResultRow], name: str, definition: Definition | None) -> None:
    """Write table, picture and report, with what was published."""
    rows = rows + (definition.published() if definition else [])
    title = f"{definition.title if definition else name}: top-1 accuracy, %"
    table.write(rows, title)
    report = write_report(table, rows, title, definition.choices if definition else ())
    write_text(table.out / "report.md", report)


def benchmark_file(benchmark: str) -> Path:
    """Find a benchmark's YAML file: a path, or the name of a shipped one.

    Raises:
        InputError: There is no such file, or no such name.
    """
    require_source("benchmark", benchmark)
    file = Path(benchmark)
    if file.is_file():
        return file
    shipped = {path.stem: path for path in (configs() / "benchmarks").glob("*.yaml")}
    if benchmark in shipped:
        return shipped[benchmark]
    known = [*shipped, *defined()]
    if file.suffix in (".yaml", ".yml") or "/" in benchmark:
        raise InputError(f"the file {benchmark} does not exist.", f"Or name one of: {', '.join(known)}.")
    raise InputError(f"there is no benchmark {benchmark!r}.", nearest(benchmark, known))


def _stated(
    premises: Premises, expect: str | None, waive: list[str] | None, gate: dict[str, float] | None
) -> Premises:
    """Put what the user states of the premises in the place of the benchmark's own."""
    if expect:
        premises = premises.expecting(Path(expect))
    for key in gate or {}:
        if key != "tolerance":
            raise InputError(f"--gate.{key} is unknown.", "Did you mean --gate.tolerance?")
    waived = tuple(name for item in waive or () for name in item.split(","))
    return replace(premises, waived=waived, **(gate or {}))


def _settings(method: str, trainer: Mapping[str, Any]) -> list[str]:
    """Write the trainer's settings as arguments, without numbers of steps where there is nothing to learn."""
    file = method_file(method)
    learns = file and (read_mapping(file).get("trainer") or {}).get("max_steps", 1)
    kept = {name: value for name, value in trainer.items() if learns or not name.startswith(_LIMITS)}
    return [f"--trainer.{name}={value}" for name, value in kept.items()]


def _pass_clean(clean: Definition, table: Benchmark, data: Mapping[str, Any] | None) -> list[str]:
    """Let the experts pass the gate on clean images; of corrupted ones their accuracy is not known.

    Returns:
        What the report says of it.
    """
    checked = Benchmark(clean.document, table.out / "clean", table.premises, data)
    checked.pass_gate()
    table.premises = replace(table.premises, accuracy={})
    passed = "experts passed the gate on clean images" + (
        ", but for what is waived" if checked.waived else ""
    )
    told = [passed] if checked.premises.accuracy else []
    return [*told, *(f"on clean images: {line}" for line in checked.waived)]
