"""Objectives: what makes coefficients better, without labels."""

from adamerge.objectives.base import Objective, entropy_of
from adamerge.objectives.entropy import Entropy
from adamerge.objectives.matching import KLTeacher
from adamerge.objectives.reliable import ReliableEntropy
from adamerge.objectives.sharpness import SharpnessAware

__all__ = [
    "Entropy",
    "KLTeacher",
    "Objective",
    "ReliableEntropy",
    "SharpnessAware",
    "entropy_of",
]
