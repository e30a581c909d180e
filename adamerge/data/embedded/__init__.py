"""Eight small image tasks whose pixels come out of PyPI wheels: the CLIP protocol in 28 px."""

from adamerge.data.embedded.rows import EMBEDDED_TASKS, SPLITS, EmbeddedTask
from adamerge.data.embedded.splits import load_split

__all__ = ["EMBEDDED_TASKS", "SPLITS", "EmbeddedTask", "load_split"]
