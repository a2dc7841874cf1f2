"""Write a matrix of rank r as r of its rows, the pivots, and the coefficients of the other rows."""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt

import torch
from scipy.linalg import qr, solve_triangular
from torch import Tensor

from laserlm.linalg.decomposition import as_float64

PART_BYTES = 2**26
"""Memory of the part of a product that is in float64 at a time, with the part of the factor that it is made of."""


@dataclass(frozen=True)
class Pivoted:
    """A matrix (m, n) of rank r as r of its rows, the pivots, and the coefficients of the other rows.

    Args:
        order: (m,) the numbers of all rows, the pivots first.
        rows: (r, n) the pivots.
        coefficients: C (m - r, r); the other rows are C times the pivots.
    """

    order: Tensor
    rows: Tensor
    coefficients: Tensor

    @classmethod
    def of(cls, left: Tensor, right: Tensor, dtype: torch.dtype) -> Pivoted:
        """Return the product of two factors, (m, r) and (r, n), in a dtype: each number is rounded once.

        The product is made in parts of columns, for in float64 it takes up to four times as much memory as the result.
        """
        order, wide = pivot_rows(left)
        coefficients = wide.to(dtype)
        del wide
        r, n = right.shape
        pivots = as_float64(left[order[:r].to(left.device)])  # (r, r)
        rows = right.new_empty(r, n, dtype=dtype)
        columns = max(1, PART_BYTES // (2 * 8 * max(1, r)))
        for start in range(0, n, columns):
            part = slice(start, start + columns)
            rows[:, part] = pivots @ as_float64(right[:, part])
        return cls(order, rows, coefficients)


def parameters(shape: tuple[int, int], rank: int) -> int:
    """Return the number of parameters of a matrix (m, n) of rank r as pivots (r, n) and coefficients (m - r, r)."""
    m, n = shape
    return rank * (m + n - rank)


def rank_within(shape: tuple[int, int], budget: int) -> int:
    """Return the largest rank of a matrix (m, n) whose pivots and coefficients take at most ``budget`` parameters."""
    m, n = shape
    if budget >= m * n:
        return min(m, n)
    discriminant = (m + n) ** 2 - 4 * budget  # at least (m - n)^2 + 4, so that the root below is of a positive number
    return (m + n - isqrt(discriminant - 1) - 1) // 2


def pivot_rows(left: Tensor) -> tuple[Tensor, Tensor]:
    """Choose r rows of ``left`` (m, r), so that the others are combinations of them with small coefficients.

    The same rows and coefficients hold for every product of ``left`` with another matrix. The choice is that of a
    rank-revealing QR factorisation of the transpose. Rows beyond the rank of ``left`` have coefficients of zero.

    Args:
        left: (m, r) with m >= r. The scale of its columns does not matter.

    Returns:
        Tensor: (m,) the numbers of all rows, the r pivots first.
        Tensor: C (m - r, r) in float64, with ``left[order[r:]] = C left[order[:r]]``.

    Source: Zhao et al., PIFA, arXiv 2501.19090, section 3; Gu and Eisenstat, SIAM J. Sci. Comput. 17 (1996) 848.
    """
    wide = as_float64(left.cpu())
    m, r = wide.shape
    coefficients = torch.zeros(m - r, r, dtype=torch.float64)
    if r == 0:
        return torch.arange(m), coefficients
    norms = wide.norm(dim=0)  # columns of very different norms would lead to larger coefficients
    scaled = (wide / norms.where(norms > 0, 1)).T.numpy()  # (r, m), in the order of LAPACK, which writes over it
    del wide
    R, order = qr(scaled, mode="r", pivoting=True, overwrite_a=True, check_finite=False)  # R (r, m)
    del scaled
    diagonal = abs(R.diagonal())
    rank = int((diagonal > m * torch.finfo(torch.float64).eps * diagonal[0]).sum())
    solved = solve_triangular(R[:rank, :rank], R[:rank, r:], check_finite=False)  # (rank, m - r)
    coefficients[:, :rank] = torch.from_numpy(solved.T)
    return torch.from_numpy(order).long(), coefficients
