"""Coefficient spaces finer than one number per task and tensor: of singular components, of entries."""

from adamerge.spaces.base import Space
from adamerge.spaces.components import Components
from adamerge.spaces.concrete import Concrete
from adamerge.spaces.elements import Elements

__all__ = ["Components", "Concrete", "Elements", "Space"]
