"""Backbones that give features for any weights, and the frozen heads that read them."""

from adamerge.models.adapters import Surgery
from adamerge.models.base import Backbone, ModuleBackbone
from adamerge.models.evaluate import accuracy, predict_all, union_accuracy, walk
from adamerge.models.heads import Head, Residual, require_class_names
from adamerge.models.open_clip import OpenClipBackbone
from adamerge.models.opening import open_backbone, open_heads, zero_shot_heads
from adamerge.models.recalibration import recalibrate
from adamerge.models.statistics import Statistics

__all__ = [
    "Backbone",
    "Head",
    "ModuleBackbone",
    "OpenClipBackbone",
    "Residual",
    "Statistics",
    "Surgery",
    "accuracy",
    "open_backbone",
    "open_heads",
    "predict_all",
    "recalibrate",
    "require_class_names",
    "union_accuracy",
    "walk",
    "zero_shot_heads",
]
