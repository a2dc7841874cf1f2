"""Apply and undo interventions, as single matrices or as two factors; keep decompositions."""

from laserlm.editing.applied import Edit, applied, complement, resolve
from laserlm.editing.cache import DecompositionCache
from laserlm.editing.factored import Holding, factored

__all__ = ["DecompositionCache", "Edit", "Holding", "applied", "complement", "factored", "resolve"]
