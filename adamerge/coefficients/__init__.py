"""Coefficients: numbers, or later a small network that gives numbers."""

from adamerge.coefficients.base import Coefficients
from adamerge.coefficients.grouping import GROUPINGS, group_of
from adamerge.coefficients.learned import Learned

__all__ = ["GROUPINGS", "Coefficients", "Learned", "group_of"]
