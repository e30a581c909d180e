"""Models with another mixture of experts for every input: shared weights, experts, a router, heads."""

from adamerge.mixture.costs import latency, stored
from adamerge.mixture.exporting import export_classifier
from adamerge.mixture.folder import load, save_mixture, write_companions
from adamerge.mixture.gates import Gates
from adamerge.mixture.model import Mixture, Predictions
from adamerge.mixture.passes import joined_images, shared_passes, task_losses
from adamerge.mixture.training import RouterStep

__all__ = [
    "Gates",
    "Mixture",
    "Predictions",
    "RouterStep",
    "export_classifier",
    "joined_images",
    "latency",
    "load",
    "save_mixture",
    "shared_passes",
    "stored",
    "task_losses",
    "write_companions",
]
