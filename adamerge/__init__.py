"""Learns how to merge fine-tuned models on unlabelled data, and hands back a plain checkpoint."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from adamerge.checkpoints import open_checkpoint, save
    from adamerge.coefficients import Learned
    from adamerge.data.module import MultiTaskData
    from adamerge.data.tasks import TaskSpec
    from adamerge.errors import InputError
    from adamerge.models import Head, ModuleBackbone, OpenClipBackbone, Statistics, zero_shot_heads
    from adamerge.objectives import Entropy, KLTeacher, ReliableEntropy, SharpnessAware
    from adamerge.static import edit, merge
    from adamerge.task import MergeTask
    from adamerge.vectors import TaskVectors, staged_step

__version__ = "0.1.0"

# A name is imported when it is first used: `import adamerge` and `adamerge --help` stay instant.
_HOME = {
    "Entropy": "objectives",
    "Head": "models",
    "InputError": "errors",
    "KLTeacher": "objectives",
    "Learned": "coefficients",
    "MergeTask": "task",
    "ModuleBackbone": "models",
    "MultiTaskData": "data.module",
    "OpenClipBackbone": "models",
    "ReliableEntropy": "objectives",
    "SharpnessAware": "objectives",
    "Statistics": "models",
    "TaskSpec": "data.tasks",
    "TaskVectors": "vectors",
    "edit": "static",
    "merge": "static",
    "open_checkpoint": "checkpoints",
    "save": "checkpoints",
    "staged_step": "vectors",
    "zero_shot_heads": "models",
}

__all__ = [
    "Entropy",
    "Head",
    "InputError",
    "KLTeacher",
    "Learned",
    "MergeTask",
    "ModuleBackbone",
    "MultiTaskData",
    "OpenClipBackbone",
    "ReliableEntropy",
    "SharpnessAware",
    "Statistics",
    "TaskSpec",
    "TaskVectors",
    "edit",
    "merge",
    "open_checkpoint",
    "save",
    "staged_step",
    "zero_shot_heads",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'adamerge' has no attribute {name!r}")
    return getattr(import_module(f"adamerge.{_HOME[name]}"), name)
