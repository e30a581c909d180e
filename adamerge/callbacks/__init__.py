"""What a run shows and leaves behind, and what chooses among its states."""

from adamerge.callbacks.checkpoint import AtomicCheckpointIO, LastCheckpoint
from adamerge.callbacks.curves import Curves, StepBar
from adamerge.callbacks.reports import CoefficientReport, MergedModel, write_coefficients
from adamerge.callbacks.selector import Selector
from adamerge.callbacks.signs import Signs, signs_of

__all__ = [
    "AtomicCheckpointIO",
    "CoefficientReport",
    "Curves",
    "LastCheckpoint",
    "MergedModel",
    "Selector",
    "Signs",
    "StepBar",
    "signs_of",
    "write_coefficients",
]
