"""Optimizers of coefficients beyond torch's own: they read more than one gradient, or none."""

from adamerge.optimizers.base import CoefficientOptimizer, Reads
from adamerge.optimizers.bilevel import BiLevel
from adamerge.optimizers.evolution import CMAES, RandomSearch
from adamerge.optimizers.frank_wolfe import FrankWolfe
from adamerge.optimizers.natural import NaturalGradient

__all__ = [
    "CMAES",
    "BiLevel",
    "CoefficientOptimizer",
    "FrankWolfe",
    "NaturalGradient",
    "RandomSearch",
    "Reads",
]
