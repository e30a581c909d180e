"""`adamerge predict --model FOLDER`: class, probability and routing weights of every image or text."""

import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from pyarrow import parquet

from adamerge.atomic import atomic_file, exclusive, refuse_existing
from adamerge.data.datasets import CORRUPT_CEILING, Chunk, ImageStream
from adamerge.data.decoding import Preprocess
from adamerge.data.streams import TextStream, open_stream
from adamerge.data.texts import EMPTY, preprocessing_of
from adamerge.errors import (
    AdamergeWarning,
    DataError,
    EnvironmentProblem,
    InputError,
    NumericError,
    shortlist,
)
from adamerge.mixture import Mixture, Predictions, load
from adamerge.progress import console, track

Stream = ImageStream | TextStream
_VERBS = {"image": "images can be decoded", "text": "texts can be read"}


def predict(
    model: str,
    data: str,
    out: str,
    *,
    task: str | None = None,
    batch_size: int = 256,
    device: str = "cpu",
    columns: list[str] | None = None,
    max_length: int | None = None,
    overwrite: bool = False,
) -> int:
    """Write class and probability of every image or text, and a routed model's weights, as parquet.

    One row per input, in the source's order: index, path (of texts: text, or text and text_pair), task
    (whose class it is), class, class_name, probability, weight_EXPERT for each expert of a routed model,
    problem. What cannot be read has a row too: its class is null and `problem` tells why. If these are more
    than 1 %, empty texts left aside, the exit code is 3.

    The tasks of a run of `adamerge fit` are predicted by its own configuration, instead, by:
    adamerge predict --config FILES --run_dir RUN --ckpt_path last

    Args:
        model: A model folder that adamerge wrote (RUN/merged), static or routed.
        data: A folder of images, a parquet file or folder, a `datasets` folder, or embedded:TASK/SPLIT. Of
            texts also .txt (one a line), .csv, .tsv, .jsonl or .json.
        out: The parquet file to write.
        task: Whose classes are meant; default: unknown, the class with the highest logit of all tasks.
        batch_size: Images or texts per forward pass.
        device: Where it runs: cpu, cuda, cuda:1, ...
        columns: Columns of the texts: one, or two of a pair; default: text, sentence, or a known pair.
        max_length: Tokens at which texts are cut; default: the model's own length.
        overwrite: Replace the output if it exists.
    """
    target = Path(out)
    if target.suffix != ".parquet":
        raise InputError(f"--out {out} does not end in .parquet.", "Predictions are written as parquet.")
    if batch_size < 1:
        raise InputError(f"batch_size={batch_size}.", "Use 1 or more.")
    refuse_existing(target, overwrite=overwrite, inputs={"the model": model, "the data": data})
    mixture = load(model).to(_device(device))
    modality = mixture.backbone.modality
    preprocess = preprocessing_of(mixture.backbone, max_length)[0]
    inputs = open_stream(data, "--data", modality, columns or ())
    steps = _chunks(preprocess, inputs, batch_size)
    problems = _write(target, mixture, inputs, steps, task)
    console.print(f"{out}: predictions of {len(inputs) - len(problems)} {modality}s.", soft_wrap=True)
    if isinstance(inputs, TextStream):
        inputs.cut.warn("--data", len(inputs), "--max_length")
    _warn_of(problems, len(inputs), target, modality)
    return 0


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"there is no device {name!r}.", "Use cpu, cuda or cuda:NUMBER.") from error
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise EnvironmentProblem(f"device {name!r} cannot be used: {reason}", "Use --device cpu.") from error
    return device


def _write(
    target: Path, mixture: Mixture, inputs: Stream, steps: Iterable[tuple[int, Chunk]], task: str | None
) -> list[str]:
    """Write the file, batch by batch; return the inputs that could not be read.

    Raises:
        DataError: No input could be read; nothing is written.
    """
    experts = () if mixture.routing is None else mixture.vectors.tasks
    schema = _schema(experts, inputs.names if isinstance(inputs, TextStream) else ("path",))
    problems: list[str] = []
    with exclusive(target), atomic_file(target) as file, parquet.ParquetWriter(file, schema) as writer:
        for start, chunk in steps:
            found = _predictions(mixture, chunk, task, start)
            columns = _columns(chunk, found, start, experts)
            writer.write_batch(pa.RecordBatch.from_pydict(columns, schema))
            names = zip(chunk.paths, chunk.problems, strict=True)
            problems += [f"{path or f'row {i}'} ({why})" for i, (path, why) in enumerate(names, start) if why]
        if len(problems) == len(inputs):
            raise DataError(
                f"none of {len(inputs)} {_VERBS[mixture.backbone.modality]}: {shortlist(problems, 3)}."
            )
    return problems


def _chunks(preprocess: Preprocess, inputs: Stream, size: int) -> Iterator[tuple[int, Chunk]]:
    """Return the inputs of each forward pass, and the place of the first, while a bar is shown."""
    starts = range(0, len(inputs), size)
    sizes = [min(size, len(inputs) - start) for start in starts]
    chunks = inputs.chunks(preprocess, size)
    return zip(starts, track(chunks, "Predicting", sizes), strict=True)


def _predictions(mixture: Mixture, chunk: Chunk, task: str | None, start: int) -> Predictions | None:
    if not chunk.images:
        return None
    found = mixture.predict(torch.stack(chunk.images), task)
    if not found.probability.isfinite().all():
        end = start + len(chunk.problems) - 1
        raise NumericError(
            f"of {mixture.backbone.modality}s {start} to {end}, the model gives probabilities that are not "
            "finite.",
            "Its weights are damaged, or too large for their dtype.",
        )
    return found


def _schema(experts: Sequence[str], sources: Sequence[str]) -> pa.Schema:
    before = {"index": pa.int64(), **dict.fromkeys(sources, pa.string())}
    before |= {"task": pa.string(), "class": pa.int64()}
    before |= {"class_name": pa.string(), "probability": pa.float32()}
    weights = {f"weight_{expert}": pa.float32() for expert in experts}
    return pa.schema(before | weights | {"problem": pa.string()})


def _columns(
    chunk: Chunk, found: Predictions | None, start: int, experts: Sequence[str]
) -> dict[str, list[Any]]:
    """Return the rows of a chunk by column: nulls where there was nothing to predict."""
    place = range(start, start + len(chunk.problems))
    columns: dict[str, list[Any]] = {"index": list(place), "problem": chunk.problems}
    columns |= chunk.texts or {"path": chunk.paths}
    names = ("task", "class", "class_name", "probability", *(f"weight_{expert}" for expert in experts))
    values: list[list[Any]] = [[] for _ in names]
    if found is not None:
        class_names = [name or None for name in found.class_name]
        weights = [] if found.weights is None else found.weights.T.tolist()
        values = [found.task, found.label.tolist(), class_names, found.probability.tolist(), *weights]
    for name, given in zip(names, values, strict=True):
        rest = iter(given)
        columns[name] = [next(rest) if why is None else None for why in chunk.problems]
    return columns


def _warn_of(problems: Sequence[str], n_inputs: int, target: Path, modality: str) -> None:
    """Name the inputs that could not be read: a few, and empty texts, in a warning, many in an error."""
    verb = _VERBS[modality].replace("can be", "cannot be")
    told = f"{len(problems)} of {n_inputs} {verb}: {shortlist(problems, 3)}."
    damaged = [problem for problem in problems if not problem.endswith(f"({EMPTY})")]
    if len(damaged) > CORRUPT_CEILING * n_inputs:
        raise DataError(told, f"{target} is complete: their rows have no class, and tell the problem.")
    if problems:
        warnings.warn(told, AdamergeWarning, stacklevel=2)
