"""Any published checkpoint to a lazy State, and a State back to the same layout."""

from adamerge.checkpoints.reading import Checkpoint, open_checkpoint
from adamerge.checkpoints.writing import save, save_tensors

__all__ = ["Checkpoint", "open_checkpoint", "save", "save_tensors"]
