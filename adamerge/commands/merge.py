"""`adamerge merge METHOD`: static merges of checkpoints of any size, from files to files."""

import inspect
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from threading import Thread
from typing import Any, Literal

import torch
from torch import Tensor

from adamerge import provenance
from adamerge.arguments import parse
from adamerge.atomic import refuse_existing
from adamerge.checkpoints import loading_advice, save_stream
from adamerge.commands.classifiers import Classifiers
from adamerge.commands.sources import Sources
from adamerge.errors import InputError, nearest
from adamerge.models.fisher import FisherMode
from adamerge.ownership import protect
from adamerge.progress import duration, print_line
from adamerge.ranges import Count, checked
from adamerge.static import EDITS, METHODS, Method, expert_tensors, merged_tensors
from adamerge.static import edit as edit_vectors
from adamerge.vectors import TaskVectors

OutputDtype = Literal["float64", "float32", "bfloat16", "float16"]
Tensors = Iterator[tuple[str, Tensor]]


def run(given: Sequence[str]) -> int:
    """Parse ``METHOD --option value ...`` and merge.

    Raises:
        InputError: There is no such method, or an argument is wrong.
    """
    if not given or given[0] in ("-h", "--help"):
        _print_methods()
        return 0 if given else 2
    row = _row(given[0])
    vectors = next(iter(inspect.signature(row.function).parameters))
    hidden = ["method", "options"]
    hidden += [] if "merged" in row.needs else ["of", "of_options"]
    hidden += [] if row.oracle else ["task"]
    hidden += [] if row.statistics else ["data", "samples", "fisher_mode"]
    skip = {row.function: {vectors, *row.needs}, merge: hidden}
    values = parse(f"adamerge merge {row.name}", [*skip], given[1:], skip=skip, positional=False)
    options = {option: values.pop(option) for option in row.options}
    return checked(merge)(row.name, options, **values)


def merge(
    method: str,
    options: Mapping[str, Any],
    *,
    base: str,
    experts: list[str],
    out: str,
    dtype: OutputDtype | None = None,
    edit: str | None = None,
    edit_options: dict[str, Any] | None = None,
    of: str = "task_arithmetic",
    of_options: dict[str, Any] | None = None,
    task: str | None = None,
    data: str | None = None,
    samples: Count = 256,
    fisher_mode: FisherMode = "sampled_label",
    allow_missing: list[str] | None = None,
    exclude: list[str] | None = None,
    merge_classifier: bool = False,
    force: bool = False,
    overwrite: bool = False,
) -> int:
    """Merge checkpoints by a static method; peak memory is a few tensors.

    Args:
        method: Name of the method.
        options: Its options.
        base: The base: a folder in Hugging Face or open_clip layout, a safetensors file, or a hub id.
        experts: NAME=PATH of each expert, in the base's layout or as a PEFT LoRA folder.
        out: The file (where the base is a file) or folder to write, in the base's own layout.
        dtype: Dtype of the written floating-point tensors; default: the base's, tensor by tensor.
        edit: A task-vector edit to apply first, such as ties_trim or dare_drop.
        edit_options: The edit's options.
        of: The method whose result is corrected, for methods that correct one (lines, svc).
        of_options: That method's options.
        task: The task whose model is written, for methods that give one model per task (emr).
        data: A benchmark's YAML file whose unlabelled images the method measures the experts on.
        samples: Images per task.
        fisher_mode: How Fisher diagonals are estimated.
        allow_missing: Patterns of tensor names that experts may lack; the base's values stand.
        exclude: Patterns of tensor names that stay the base's, whatever the experts hold.
        merge_classifier: Merge last layers of classifiers although base and experts do not name the same
            classes in the same order: otherwise the base's stay, and the experts' lie beside the weights.
        force: Accept experts that look as if they came from another base, or whose settings differ from its.
        overwrite: Replace the output if it exists.
    """
    began, target, row = time.monotonic(), Path(out), _row(method)
    sources = Sources.find(base, experts, force=force)
    protect(target, sources.paths)
    more_of_opening: dict[str, bool] = {"merge_classifier": merge_classifier, "force": force}
    vectors = given = sources.open(allow_missing or (), exclude or (), **more_of_opening)
    refuse_existing(target, overwrite=overwrite)
    classifiers = Classifiers.of(sources, vectors.layers)
    asked = None if dtype is None else getattr(torch, dtype)
    recipe: dict[str, Any] = {"method": method, "options": dict(options), "dtype": dtype}
    if edit is None and edit_options:
        raise InputError(f"edit_options {edit_options} without an edit.", "Pass --edit NAME too.")
    if edit is not None:
        recipe["edit"] = {edit: edit_options or {}}
        vectors = edit_vectors(vectors, edit, **(edit_options or {}))
    if row.oracle:
        recipe["task"] = task
        tensors = _of_one_task(vectors, row, options, task, asked)
    else:
        more: dict[str, Any] = {}
        if "merged" in row.needs:
            more = {"of": of, "of_options": of_options or {}}
            recipe |= more
        if row.statistics and data is not None:
            from adamerge.commands.statistics import open_statistics  # brings the trainer along

            recipe |= {"data": data, "samples": samples, "fisher_mode": fisher_mode}
            beside = target.with_name(f"{target.name}.statistics")
            more["statistics"] = open_statistics(  # of the experts as they are, whatever is edited
                given, sources, data, samples=samples, fisher_mode=fisher_mode, cache=beside
            )
        tensors = merged_tensors(vectors, method, dtype=asked, **more, **options)
    digests = _in_background(vectors.origins.digests) if sources.base.is_dir() else dict
    save_stream(
        _checked(tensors, vectors),
        target,
        like=sources.base,
        dtype=asked,
        overwrite=overwrite,
        card=lambda: provenance.model_card(
            sources.given, digests(), recipe, heads=classifiers.are_written, notes=classifiers.notes
        ),
        companions=lambda folder: classifiers.write(folder, {"weights": digests()}),
        metadata={"adamerge": json.dumps(recipe)},
    )
    classifiers.tell()
    print_line(
        f"{method} of {len(vectors.tasks)} experts: {target} ({duration(time.monotonic() - began)}). "
        f"{loading_advice(target)}"
    )
    return 0


def _in_background(compute: Callable[[], dict[str, str]]) -> Callable[[], dict[str, str]]:
    """Begin to compute in a thread that no error or interrupt has to wait for; the result waits for it."""
    done: Future[dict[str, str]] = Future()

    def work() -> None:
        try:
            done.set_result(compute())
        except Exception as error:  # told where the result is asked for
            done.set_exception(error)

    Thread(target=work, daemon=True).start()
    return done.result


def _row(method: str) -> Method:
    rows = _rows()
    if method not in rows:
        raise InputError(f"method {method!r} is unknown.", nearest(method, rows))
    return rows[method]


def _rows() -> dict[str, Method]:
    """Give what can be merged by: methods, and edits that make one model per task."""
    return METHODS | {name: row for name, row in EDITS.items() if row.oracle}


def _of_one_task(
    vectors: TaskVectors, row: Method, options: Mapping[str, Any], task: str | None, dtype: torch.dtype | None
) -> Tensors:
    if task is None:
        known = ", ".join(vectors.tasks)
        raise InputError(f"{row.name} makes one model per task.", f"Pass --task NAME, one of: {known}.")
    return expert_tensors(edit_vectors(vectors, row.name, **options), task, dtype=dtype)


def _checked(tensors: Iterable[tuple[str, Tensor]], vectors: TaskVectors) -> Tensors:
    """Pass the tensors on; once all were read, refuse experts of another base before anything is visible."""
    yield from tensors
    vectors.origins.check()


def _print_methods() -> None:
    rows = _rows()
    width = max(map(len, rows))
    lines = [f"  {name:<{width}}  {row.title} ({row.source})" for name, row in sorted(rows.items())]
    usage = "usage: adamerge merge METHOD --base B --experts NAME=PATH ... --out DIR [--option VALUE ...]"
    tail = "adamerge merge METHOD --help tells a method's options."
    sys.stdout.write("\n".join([usage, "", *lines, "", tail, ""]))
