"""`adamerge fit | validate | test | predict`: from files to a MergeTask, and a run with its folder."""

from adamerge.fitting.composing import (
    class_names,
    merge_task,
    model_settings,
    open_vectors,
    shared_file,
    shared_model,
    weight_digests,
)
from adamerge.fitting.placing import LAST, pending
from adamerge.fitting.running import RunCLI, run

__all__ = [
    "LAST",
    "RunCLI",
    "class_names",
    "merge_task",
    "model_settings",
    "open_vectors",
    "pending",
    "run",
    "shared_file",
    "shared_model",
    "weight_digests",
]
