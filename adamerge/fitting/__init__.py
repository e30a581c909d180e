"""`adamerge fit | validate | test | predict`: from files to a MergeTask, and a run with its folder."""

from adamerge.fitting.classes import own_classes
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
from adamerge.fitting.running import RunCLI, check, run

__all__ = [
    "LAST",
    "RunCLI",
    "check",
    "class_names",
    "merge_task",
    "model_settings",
    "open_vectors",
    "own_classes",
    "pending",
    "run",
    "shared_file",
    "shared_model",
    "weight_digests",
]
