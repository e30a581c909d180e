"""Objectives: what makes coefficients better, without labels."""

from adamerge.objectives.base import Objective, entropy_of
from adamerge.objectives.entropy import Entropy
from adamerge.objectives.matching import KLTeacher
from adamerge.objectives.mixed import Mixed
from adamerge.objectives.reliable import ReliableEntropy
from adamerge.objectives.routing import RoutingEntropy, TaskIdentity
from adamerge.objectives.sharpness import SharpnessAware

__all__ = [
    "Entropy",
    "KLTeacher",
    "Mixed",
    "Objective",
    "ReliableEntropy",
    "RoutingEntropy",
    "SharpnessAware",
    "TaskIdentity",
    "entropy_of",
]
