"""Published static methods: one pure function each, and the registry that lists them."""

from adamerge.static import average, task_arithmetic, ties
from adamerge.static.registry import EDITS, METHODS, Method
from adamerge.static.run import edit, merge

__all__ = ["EDITS", "METHODS", "Method", "average", "edit", "merge", "task_arithmetic", "ties"]
