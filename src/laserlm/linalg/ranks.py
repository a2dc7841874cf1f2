"""Exact rank arithmetic."""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction

from laserlm.reductions import Size

__all__ = ["rank_at", "rank_of"]


def rank_at(rho: Decimal, max_rank: int) -> int:
    """Return floor(rho * max_rank), computed exactly.

    Binary floats lose a rank at some widths: 0.01 * 1600 computed as ``(1 - 0.99) * 1600`` is 15.99..., not 16.
    """
    return int(Fraction(rho) * max_rank)


def rank_of(size: Size, max_rank: int) -> int:
    """Return the rank that a size means for a matrix with ``max_rank`` singular values; never more than those."""
    if size.rho is not None:
        return rank_at(size.rho, max_rank)
    if size.rank is None:
        raise AssertionError("a size is a fraction or a rank")
    return min(size.rank, max_rank)
