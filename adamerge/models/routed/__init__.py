"""Per-input merging in one batched pass: a tensor type for parameters that differ per sample."""

from adamerge.models.routed import elements, matrices  # they register what torch functions do
from adamerge.models.routed.parameter import Mixable, Mixing, PerSample, RoutedParameter

__all__ = ["Mixable", "Mixing", "PerSample", "RoutedParameter", "elements", "matrices"]
