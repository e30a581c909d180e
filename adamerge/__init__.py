"""Learns how to merge fine-tuned models on unlabelled data, and hands back a plain checkpoint."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from adamerge.checkpoints import open_checkpoint, save
    from adamerge.coefficients import Learned, Oracle, Router, Subspace, Uniform
    from adamerge.data.module import MultiTaskData
    from adamerge.data.tasks import TaskSpec
    from adamerge.errors import InputError
    from adamerge.mixture import Mixture, load, save_mixture
    from adamerge.models import (
        Head,
        ModuleBackbone,
        OpenClipBackbone,
        Statistics,
        Surgery,
        open_backbone,
        open_heads,
        recalibrate,
        zero_shot_heads,
    )
    from adamerge.objectives import (
        Balanced,
        Consistency,
        Entropy,
        FeatureMatching,
        KLTeacher,
        Mixed,
        Perturbed,
        Prior,
        ReliableEntropy,
        RoutingEntropy,
        SharpnessAware,
        Supervised,
        TaskIdentity,
    )
    from adamerge.optimizers import CMAES, BiLevel, FrankWolfe, NaturalGradient, RandomSearch
    from adamerge.spaces import Components, Concrete, Elements
    from adamerge.static import edit, merge
    from adamerge.task import MergeTask
    from adamerge.vectors import LowRankCodec, TaskVectors, rebase, staged_step

__version__ = "0.1.0"

# A name is imported when it is first used: `import adamerge` and `adamerge --help` stay instant.
_HOME = {
    "Balanced": "objectives",
    "BiLevel": "optimizers",
    "CMAES": "optimizers",
    "Components": "spaces",
    "Concrete": "spaces",
    "Consistency": "objectives",
    "Elements": "spaces",
    "Entropy": "objectives",
    "FeatureMatching": "objectives",
    "FrankWolfe": "optimizers",
    "Head": "models",
    "InputError": "errors",
    "KLTeacher": "objectives",
    "Learned": "coefficients",
    "LowRankCodec": "vectors",
    "MergeTask": "task",
    "Mixed": "objectives",
    "Mixture": "mixture",
    "ModuleBackbone": "models",
    "MultiTaskData": "data.module",
    "NaturalGradient": "optimizers",
    "OpenClipBackbone": "models",
    "Oracle": "coefficients",
    "Perturbed": "objectives",
    "Prior": "objectives",
    "RandomSearch": "optimizers",
    "ReliableEntropy": "objectives",
    "Router": "coefficients",
    "RoutingEntropy": "objectives",
    "SharpnessAware": "objectives",
    "Statistics": "models",
    "Subspace": "coefficients",
    "Supervised": "objectives",
    "Surgery": "models",
    "TaskIdentity": "objectives",
    "TaskSpec": "data.tasks",
    "TaskVectors": "vectors",
    "Uniform": "coefficients",
    "edit": "static",
    "load": "mixture",
    "merge": "static",
    "open_backbone": "models",
    "open_checkpoint": "checkpoints",
    "open_heads": "models",
    "rebase": "vectors",
    "recalibrate": "models",
    "save": "checkpoints",
    "save_mixture": "mixture",
    "staged_step": "vectors",
    "zero_shot_heads": "models",
}

__all__ = [
    "CMAES",
    "Balanced",
    "BiLevel",
    "Components",
    "Concrete",
    "Consistency",
    "Elements",
    "Entropy",
    "FeatureMatching",
    "FrankWolfe",
    "Head",
    "InputError",
    "KLTeacher",
    "Learned",
    "LowRankCodec",
    "MergeTask",
    "Mixed",
    "Mixture",
    "ModuleBackbone",
    "MultiTaskData",
    "NaturalGradient",
    "OpenClipBackbone",
    "Oracle",
    "Perturbed",
    "Prior",
    "RandomSearch",
    "ReliableEntropy",
    "Router",
    "RoutingEntropy",
    "SharpnessAware",
    "Statistics",
    "Subspace",
    "Supervised",
    "Surgery",
    "TaskIdentity",
    "TaskSpec",
    "TaskVectors",
    "Uniform",
    "edit",
    "load",
    "merge",
    "open_backbone",
    "open_checkpoint",
    "open_heads",
    "rebase",
    "recalibrate",
    "save",
    "save_mixture",
    "staged_step",
    "zero_shot_heads",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'adamerge' has no attribute {name!r}")
    return getattr(import_module(f"adamerge.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    """List the public names, which are imported only when they are used."""
    return sorted([*__all__, "__version__"])
