"""Functions of tensors alone: ranks, decompositions, truncation."""

from laserlm.linalg.decomposition import Decomposition, basis_of, decompose, rank_at, reference_truncation
from laserlm.linalg.precision import full_precision

__all__ = ["Decomposition", "basis_of", "decompose", "full_precision", "rank_at", "reference_truncation"]
