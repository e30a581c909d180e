"""Objectives: what makes coefficients better, without labels."""

from adamerge.objectives.balanced import Balanced
from adamerge.objectives.base import Objective, entropy_of
from adamerge.objectives.consistency import Consistency
from adamerge.objectives.entropy import Entropy
from adamerge.objectives.matching import FeatureMatching, KLTeacher
from adamerge.objectives.mixed import Mixed
from adamerge.objectives.perturbed import Perturbed
from adamerge.objectives.prior import Prior
from adamerge.objectives.reliable import ReliableEntropy
from adamerge.objectives.routing import RoutingEntropy, TaskIdentity
from adamerge.objectives.sharpness import SharpnessAware
from adamerge.objectives.supervised import Supervised

__all__ = [
    "Balanced",
    "Consistency",
    "Entropy",
    "FeatureMatching",
    "KLTeacher",
    "Mixed",
    "Objective",
    "Perturbed",
    "Prior",
    "ReliableEntropy",
    "RoutingEntropy",
    "SharpnessAware",
    "Supervised",
    "TaskIdentity",
    "entropy_of",
]
