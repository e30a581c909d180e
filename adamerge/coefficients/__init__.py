"""Coefficients: numbers, or a small network that gives numbers for each input."""

from adamerge.coefficients.base import Coefficients, Routing
from adamerge.coefficients.grouping import GROUPINGS, group_of
from adamerge.coefficients.learned import Learned
from adamerge.coefficients.oracle import Oracle, Subspace, Uniform
from adamerge.coefficients.router import Router
from adamerge.coefficients.selection import spread

__all__ = [
    "GROUPINGS",
    "Coefficients",
    "Learned",
    "Oracle",
    "Router",
    "Routing",
    "Subspace",
    "Uniform",
    "group_of",
    "spread",
]
