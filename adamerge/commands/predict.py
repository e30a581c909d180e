"""`adamerge predict --model FOLDER`: class, probability and routing weights of every image, as parquet."""

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from pyarrow import parquet

from adamerge.atomic import atomic_file, refuse_existing
from adamerge.data.datasets import CORRUPT_CEILING, Chunk, ImageStream
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


def predict(
    model: str,
    data: str,
    out: str,
    *,
    task: str | None = None,
    batch_size: int = 256,
    device: str = "cpu",
    overwrite: bool = False,
) -> int:
    """Write class and probability of every image, and a routed model's weights, as parquet.

    One row per image, in the source's order: index, path, task (whose class it is), class, class_name,
    probability, weight_EXPERT for each expert of a routed model, problem. An image that cannot be decoded
    has a row too: its class is null and `problem` tells why. If these are more than 1 %, the exit code is 3.

    The tasks of a run of `adamerge fit` are predicted by its configuration instead:
    adamerge predict --config FILES --run_dir RUN --ckpt_path last

    Args:
        model: A model folder that adamerge wrote (RUN/merged), static or routed.
        data: A folder of images, a parquet file or folder, a `datasets` folder, or embedded:TASK/SPLIT.
        out: The parquet file to write.
        task: Whose classes are meant; default: unknown, the class with the highest logit of all tasks.
        batch_size: Images per forward pass.
        device: Where it runs: cpu, cuda, cuda:1, ...
        overwrite: Replace the output if it exists.
    """
    target = Path(out)
    if target.suffix != ".parquet":
        raise InputError(f"--out {out} does not end in .parquet.", "Predictions are written as parquet.")
    if batch_size < 1:
        raise InputError(f"batch_size={batch_size}.", "Use 1 or more.")
    refuse_existing(target, overwrite=overwrite)
    images = ImageStream(data, "--data")
    mixture = load(model).to(_device(device))
    problems = _write(target, mixture, images, task, batch_size)
    console.print(f"{out}: predictions of {len(images) - len(problems)} images.", soft_wrap=True)
    _tell(problems, len(images), target)
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
    target: Path, mixture: Mixture, images: ImageStream, task: str | None, batch_size: int
) -> list[str]:
    """Write the file, batch by batch; give the images that could not be decoded.

    Raises:
        DataError: No image could be decoded; nothing is written.
    """
    experts = () if mixture.routing is None else mixture.vectors.tasks
    schema = _schema(experts)
    problems: list[str] = []
    with atomic_file(target) as file, parquet.ParquetWriter(file, schema) as writer:
        for start, chunk in _chunks(mixture, images, batch_size):
            found = _predictions(mixture, chunk, task, start)
            columns = _columns(chunk, found, start, experts)
            writer.write_batch(pa.RecordBatch.from_pydict(columns, schema))
            names = zip(chunk.paths, chunk.problems, strict=True)
            problems += [f"{path or f'row {i}'} ({why})" for i, (path, why) in enumerate(names, start) if why]
        if len(problems) == len(images):
            raise DataError(f"none of {len(images)} images can be decoded: {shortlist(problems, 3)}.")
    return problems


def _chunks(mixture: Mixture, images: ImageStream, size: int) -> Iterator[tuple[int, Chunk]]:
    """Give the images of each forward pass, and the place of the first, while a bar is shown."""
    starts = range(0, len(images), size)
    sizes = [min(size, len(images) - start) for start in starts]
    chunks = images.chunks(mixture.backbone.preprocess, size)
    return zip(starts, track(chunks, "Predicting", sizes), strict=True)


def _predictions(mixture: Mixture, chunk: Chunk, task: str | None, start: int) -> Predictions | None:
    if not chunk.images:
        return None
    found = mixture.predict(torch.stack(chunk.images), task)
    if not found.probability.isfinite().all():
        end = start + len(chunk.problems) - 1
        raise NumericError(
            f"of images {start} to {end}, the model gives probabilities that are not finite.",
            "Its weights are damaged, or too large for their dtype.",
        )
    return found


def _schema(experts: Sequence[str]) -> pa.Schema:
    before = {"index": pa.int64(), "path": pa.string(), "task": pa.string(), "class": pa.int64()}
    before |= {"class_name": pa.string(), "probability": pa.float32()}
    weights = {f"weight_{expert}": pa.float32() for expert in experts}
    return pa.schema(before | weights | {"problem": pa.string()})


def _columns(
    chunk: Chunk, found: Predictions | None, start: int, experts: Sequence[str]
) -> dict[str, list[Any]]:
    """Give the rows of a chunk by column: nulls where there was no image to predict."""
    place = range(start, start + len(chunk.problems))
    columns: dict[str, list[Any]] = {"index": list(place), "path": chunk.paths, "problem": chunk.problems}
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


def _tell(problems: Sequence[str], n_images: int, target: Path) -> None:
    """Name the images that could not be decoded: a few in a warning, many in an error."""
    told = f"{len(problems)} of {n_images} images cannot be decoded: {shortlist(problems, 3)}."
    if len(problems) > CORRUPT_CEILING * n_images:
        raise DataError(told, f"{target} is complete: their rows have no class, and tell the problem.")
    if problems:
        warnings.warn(told, AdamergeWarning, stacklevel=2)
