"""What a base and its experts look like before they are merged."""

from adamerge.inspection.report import Report
from adamerge.inspection.survey import inspect

__all__ = ["Report", "inspect"]
