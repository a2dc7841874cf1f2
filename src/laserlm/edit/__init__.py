"""Apply and undo interventions, with dense matrices or with factors; cache decompositions."""

from laserlm.edit.apply import Edit, applied, removed_part, resolve
from laserlm.edit.decomposition_cache import DecompositionCache
from laserlm.edit.factors import StoredMatrix, factored

__all__ = ["DecompositionCache", "Edit", "StoredMatrix", "applied", "factored", "removed_part", "resolve"]
