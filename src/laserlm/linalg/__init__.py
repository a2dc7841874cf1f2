"""Functions of tensors alone: ranks, decompositions, truncation."""

from laserlm.linalg.decomposition import Decomposition, basis_of, decompose, rank_at, reference_truncation

__all__ = ["Decomposition", "basis_of", "decompose", "rank_at", "reference_truncation"]
