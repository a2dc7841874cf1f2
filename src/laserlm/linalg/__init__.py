"""Tensor functions that know no model: ranks, decompositions, truncation."""

from laserlm.linalg.decomposition import Decomposition, basis_of, decompose, reference_truncation
from laserlm.linalg.ranks import rank_at

__all__ = ["Decomposition", "basis_of", "decompose", "rank_at", "reference_truncation"]
