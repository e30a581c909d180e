"""The report beside a table: what was run, on which premises, and which of the known choices were made."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from adamerge.benchmarks.run import Benchmark
from adamerge.results import ResultRow, footnotes, markdown_table
from adamerge.static import EDITS, METHODS

# Where published codes differ, and what is done here whatever the options are.
_ALWAYS = (
    "accuracy: top-1, micro average, each task with its own head",
    "heads: a head file, the expert's own classifier, or zero-shot: the base's text tower, every prompt "
    "normalised, a class's mean normalised again, times exp(logit scale)",
    "gradient of the coefficients: one backward pass of the summed losses, the merged weights as leaves",
    "entropy: from log-softmax, in nats, not divided by log C",
    "weights: base plus coefficients times task vectors, of the tensors that the features depend on",
)
_LEARNED = {
    "coefficients": ("model", "coefficients"),
    "objective": ("model", "objective"),
    "edit": ("model", "edit"),
    "edit options": ("model", "edit_options"),
    "codec": ("model", "codec"),
    "optimizer": ("model", "optimizer"),
    "steps": ("trainer", "max_steps"),
    "inputs per task and step": ("data", "batch_size"),
    "held out": ("data", "holdout"),
    "seed": ("seed_everything",),
}


def write_report(benchmark: Benchmark, rows: Sequence[ResultRow], title: str, choices: Sequence[str]) -> str:
    """Give a table's report in Markdown.

    Args:
        benchmark: What was run.
        rows: Ours and published ones.
        title: What stands above.
        choices: Of the benchmark's definition.
    """
    parts = [
        f"# {title}",
        "Top-1 accuracy, %.",
        markdown_table(rows).strip(),
        *_remarks(rows, benchmark.failures),
    ]
    parts += ["## Premises", _listed(_premises(benchmark, rows))]
    parts += ["## Choices", _listed([*choices, *_ALWAYS, *_options(benchmark, rows)])]
    parts += ["## Inputs", _listed(_inputs(rows))]
    return "\n\n".join(parts) + "\n"


def _remarks(rows: Sequence[ResultRow], failures: Mapping[str, Exception]) -> Iterator[str]:
    yield from (f"\\* {note}." for note in footnotes(rows))
    if any(row.source for row in rows):
        yield (
            'Rows marked "published" were not computed here; they are of the same family of checkpoints as '
            "ours, and their means are as published."
        )
    notes = [f"{row.method}: {note}" for row in rows for note in row.notes]
    notes += [f"{method} failed: {str(error).splitlines()[0]}" for method, error in failures.items()]
    if notes:
        yield _listed(notes)


def _premises(benchmark: Benchmark, rows: Sequence[ResultRow]) -> Iterator[str]:
    premises = benchmark.premises
    reached = next((row.accuracy for row in rows if row.method == "individual" and not row.source), {})
    for task in benchmark.data.tasks:
        expected, count = premises.accuracy.get(task), premises.images.get(task)
        parts = [f"{count} test images" if count else "", f"expert {expected:.2f} %" if expected else ""]
        parts += [f"reached {reached[task]:.2f} %" if expected and task in reached else ""]
        if any(parts):
            yield f"{task}: " + ", ".join(filter(None, parts))
    if premises.accuracy:
        source = premises.source or "the configuration's gate"
        yield f"tolerance {premises.tolerance:g} points; expected accuracies from {source}"
    if premises.activation:
        yield f"activation: {premises.activation}"
    if premises.transform:
        yield "preprocessing: " + ", ".join(f"{k} {v}" for k, v in premises.transform.items())
    yield from benchmark.waived or [
        "nothing was waived" if premises.accuracy else "no expert had to reach an accuracy: none is stated"
    ]


def _options(benchmark: Benchmark, rows: Sequence[ResultRow]) -> Iterator[str]:
    """Tell the options of every row of ours: a static method's defaults, a run's resolved configuration."""
    for row in rows:
        config = benchmark.folder(row.method) / "config.yaml"
        known = {**EDITS, **METHODS}.get(row.method)
        if row.source:
            continue
        if known and known.options:
            yield f"{row.method}: " + ", ".join(f"{n}={p.default!r}" for n, p in known.options.items())
        elif config.exists():
            yield f"{row.method}: " + ", ".join(_chosen(config))


def _chosen(config: Path) -> Iterator[str]:
    document = yaml.safe_load(config.read_text(encoding="utf-8"))
    for name, keys in _LEARNED.items():
        value: Any = document
        for key in keys:
            value = (value or {}).get(key)
        if value is not None:
            yield f"{name} {_short(value)}"


def _short(value: Any) -> str:
    """Write a class with its arguments as a call, without those that are off."""
    if not isinstance(value, dict) or "class_path" not in value:
        return str(value)
    given = {k: v for k, v in (value.get("init_args") or {}).items() if v is not None and v is not False}
    arguments = ", ".join(f"{k}={_short(v)}" for k, v in given.items())
    return f"{value['class_path'].rpartition('.')[2]}({arguments})"


def _inputs(rows: Sequence[ResultRow]) -> Iterator[str]:
    found = next((row.provenance for row in rows if "weights" in row.provenance), {})
    noun = next((row.inputs for row in rows if not row.source), "images")
    for kind, name in (("weights", "weights"), ("data", noun)):
        yield from (f"{name} of {key}: SHA-256 `{value}`" for key, value in found.get(kind, {}).items())
    if found:
        yield "code: " + ", ".join(f"{key} {value}" for key, value in found["code"].items())


def _listed(lines: Sequence[str] | Iterator[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)
