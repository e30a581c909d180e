"""The vectors of a merge: a base and one stored difference per task and parameter."""

from adamerge.vectors.block import Block, Codec, PiecewiseBlock
from adamerge.vectors.dense import DenseBlock, DenseCodec
from adamerge.vectors.stacks import Stacks
from adamerge.vectors.staged import StepResult, staged_step
from adamerge.vectors.store import TaskVectors

__all__ = [
    "Block",
    "Codec",
    "DenseBlock",
    "DenseCodec",
    "PiecewiseBlock",
    "Stacks",
    "StepResult",
    "TaskVectors",
    "staged_step",
]
