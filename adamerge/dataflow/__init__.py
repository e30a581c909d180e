"""Evolutionary merging in data-flow space: weights stay, and which blocks run, how often, is searched."""

from adamerge.dataflow.blocks import find_blocks
from adamerge.dataflow.fitness import Fitness
from adamerge.dataflow.flow import Flow, FlowBackbone, Step, flow_weights
from adamerge.dataflow.genome import Genome
from adamerge.dataflow.searching import Found, search

__all__ = [
    "Fitness",
    "Flow",
    "FlowBackbone",
    "Found",
    "Genome",
    "Step",
    "find_blocks",
    "flow_weights",
    "search",
]
