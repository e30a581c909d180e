"""Any published checkpoint to a lazy State, and a State back to the same layout."""

from adamerge.checkpoints.adapter import Adapter, adapter_digest, fitted_base, open_adapter
from adamerge.checkpoints.classes import class_names
from adamerge.checkpoints.companions import copy_companions
from adamerge.checkpoints.configs import require_same_configuration
from adamerge.checkpoints.hub import local_path, locate
from adamerge.checkpoints.layout import is_adapter
from adamerge.checkpoints.loading import loading_advice, loading_code
from adamerge.checkpoints.modules import read_modules, transformer_folder
from adamerge.checkpoints.reading import Checkpoint, open_checkpoint
from adamerge.checkpoints.spans import SpanReader
from adamerge.checkpoints.writing import save, save_stream, save_tensors, write_weights

__all__ = [
    "Adapter",
    "Checkpoint",
    "SpanReader",
    "adapter_digest",
    "class_names",
    "copy_companions",
    "fitted_base",
    "is_adapter",
    "loading_advice",
    "loading_code",
    "local_path",
    "locate",
    "open_adapter",
    "open_checkpoint",
    "read_modules",
    "require_same_configuration",
    "save",
    "save_stream",
    "save_tensors",
    "transformer_folder",
    "write_weights",
]
