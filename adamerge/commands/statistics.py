"""Statistics of the experts from the images that a benchmark file names."""

from pathlib import Path

from adamerge.benchmarks import expert_statistics, read_benchmark
from adamerge.commands.sources import Sources
from adamerge.data.module import MultiTaskData
from adamerge.errors import InputError, shortlist
from adamerge.models import Statistics, open_backbone, open_heads
from adamerge.models.fisher import FisherMode
from adamerge.models.opening import reads_classifiers
from adamerge.vectors import TaskVectors


def open_statistics(
    vectors: TaskVectors, sources: Sources, file: str, *, samples: int, fisher_mode: FisherMode, cache: Path
) -> Statistics:
    """Prepare statistics on unlabelled images; nothing is computed before a method asks.

    Args:
        vectors: The experts.
        sources: Where they come from.
        file: A benchmark's YAML file; its ``data`` part names every task's images and classes.
        samples: Images per task.
        fisher_mode: How Fisher diagonals are estimated.
        cache: Folder that keeps the statistics.

    Raises:
        InputError: The file is no benchmark, or lacks a task of the experts.
        DataError: Images are missing or damaged.
    """
    [given] = read_benchmark(Path(file), "data")
    rows = given.get("tasks", {})
    missing = [task for task in vectors.tasks if task not in rows]
    if missing:
        raise InputError(f"{file} has no images of {shortlist(missing)}.", f"It has: {shortlist(rows)}.")
    classifiers = reads_classifiers(sources.base, sources.experts, rows)
    backbone = open_backbone(sources.base, classifiers=classifiers)
    options = {"holdout": given.get("holdout", 0.0), "max_length": given.get("max_length")}
    data = MultiTaskData({task: rows[task] for task in vectors.tasks}, **options)
    data.use(backbone)
    return expert_statistics(
        vectors,
        backbone,
        open_heads(sources.base, data.tasks, sources.experts),
        data,
        vectors.origins.digests(),
        samples=samples,
        fisher_mode=fisher_mode,
        cache=cache,
    )
