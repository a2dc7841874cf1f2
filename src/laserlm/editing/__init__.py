"""Apply and undo interventions; keep decompositions."""

from laserlm.editing.applied import Edit, applied, complement, resolve
from laserlm.editing.cache import DecompositionCache

__all__ = ["DecompositionCache", "Edit", "applied", "complement", "resolve"]
