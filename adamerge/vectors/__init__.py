"""The vectors of a merge: a base and one stored difference per task and parameter."""

from adamerge.vectors.block import Block, Codec, PiecewiseBlock
from adamerge.vectors.dense import DenseBlock, DenseCodec
from adamerge.vectors.low_rank import LowRankBlock, LowRankCodec
from adamerge.vectors.rebased import Size, rebase, storage
from adamerge.vectors.sparse import BernoulliCodec, MagnitudeCodec, SparseBlock
from adamerge.vectors.stacks import Stacks
from adamerge.vectors.staged import StepResult, leaf_step, staged_step
from adamerge.vectors.store import STREAM, TaskVectors, make_codec

__all__ = [
    "STREAM",
    "BernoulliCodec",
    "Block",
    "Codec",
    "DenseBlock",
    "DenseCodec",
    "LowRankBlock",
    "LowRankCodec",
    "MagnitudeCodec",
    "PiecewiseBlock",
    "Size",
    "SparseBlock",
    "Stacks",
    "StepResult",
    "TaskVectors",
    "leaf_step",
    "make_codec",
    "rebase",
    "staged_step",
    "storage",
]
