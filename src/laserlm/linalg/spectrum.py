"""Statistics of singular values: effective ranks, shares of the spectrum, and the number of values above noise.

A matrix (m, n) of independent entries with standard deviation s has singular values up to about s (sqrt m + sqrt n), the
Marchenko-Pastur edge. The largest singular value follows the Tracy-Widom law around this edge. Larger singular values are
structure.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from scipy import integrate, optimize
from torch import Tensor

from laserlm.linalg.decomposition import as_float64

TRACY_WIDOM_999 = 3.27
"""99.9 % quantile of the Tracy-Widom law of order 1 (Bejan, Largest eigenvalues and sample covariance matrices, 2005)."""


def effective_rank(S: Tensor) -> float:
    """Return exp(entropy) of the normalised singular values (k,); 0 for a zero matrix.

    Source: Roy and Vetterli, The effective rank, EUSIPCO 2007.
    """
    S = as_float64(S)
    if not S.sum() > 0:
        return 0.0
    p = S / S.sum()
    return math.exp(float(-torch.special.xlogy(p, p).sum()))


def stable_rank(S: Tensor) -> float:
    """Return the squared Frobenius norm divided by the squared largest singular value; 0 for a zero matrix."""
    S = as_float64(S)
    return float(S.square().sum() / S.max().square()) if S.max() > 0 else 0.0


def numerical_rank(S: Tensor, shape: tuple[int, int]) -> int:
    """Return the number of singular values of a matrix (m, n) above float32 rounding, with numpy's threshold."""
    return int((S.max() * max(shape) * torch.finfo(torch.float32).eps < S).sum())


def condition(S: Tensor) -> float:
    """Return the largest singular value divided by the smallest; infinite for a singular matrix."""
    smallest = float(S.min())
    return float(S.max()) / smallest if smallest > 0 else math.inf


def nuclear_share(S: Tensor, rank: int) -> float:
    """Return the share of the ``rank`` largest singular values in the sum of all."""
    return float(S[:rank].sum() / S.sum()) if S.sum() > 0 else 0.0


def energy_share(S: Tensor, rank: int) -> float:
    """Return the share of the ``rank`` largest singular values in the sum of squares of all."""
    return nuclear_share(S.square(), rank)


def noise(S: Tensor, shape: tuple[int, int]) -> float:
    """Return the standard deviation of a matrix (m, n) of noise with the same median singular value.

    Low-rank structure hardly changes the median, so that this estimates the noise in a matrix with such structure.

    Source: Gavish and Donoho, arXiv 1305.5870, section III.E.
    """
    small, large = sorted(shape)
    return float(as_float64(S).quantile(0.5)) / math.sqrt(large * _median(small / large))


def edge(s: float, shape: tuple[int, int]) -> float:
    """Return the Marchenko-Pastur edge of a matrix (m, n) of entries of standard deviation s: s (sqrt m + sqrt n)."""
    m, n = shape
    return s * (math.sqrt(m) + math.sqrt(n))


def rank_beyond(S: Tensor, shape: tuple[int, int], s: float | None = None) -> int:
    """Return the number of singular values above the 99.9 % quantile of the largest singular value of noise.

    The quantile is the Marchenko-Pastur edge plus a Tracy-Widom fluctuation. With the edge alone, every second matrix of
    noise would have a value above the bound.

    Args:
        S: (k,) singular values, decreasing.
        shape: (m, n) of the matrix.
        s: standard deviation of the noise; None estimates it.

    Source: Johnstone, Annals of Statistics 29 (2001), theorem 1.
    """
    s = noise(S, shape) if s is None else s
    a, b = (math.sqrt(x - 0.5) for x in shape)
    centre = (a + b) ** 2
    spread = (a + b) * (1 / a + 1 / b) ** (1 / 3)
    return int((as_float64(S) > s * math.sqrt(centre + TRACY_WIDOM_999 * spread)).sum())


def gavish_donoho(S: Tensor, shape: tuple[int, int]) -> int:
    """Return the number of singular values above the optimal hard threshold for an unknown noise level.

    Source: Gavish and Donoho, arXiv 1305.5870, equations 11 and 18.
    """
    small, large = sorted(shape)
    beta = small / large
    optimal = math.sqrt(2 * (beta + 1) + 8 * beta / ((beta + 1) + math.sqrt(beta**2 + 14 * beta + 1)))
    threshold = optimal / math.sqrt(_median(beta)) * float(as_float64(S).quantile(0.5))
    return int((as_float64(S) > threshold).sum())


def signal_to_noise(S: Tensor, rank: int) -> float:
    """Return the ratio of the squared ``rank`` largest singular values to the squared others; infinite if these are 0."""
    energies = as_float64(S).square()
    rest = float(energies[rank:].sum())
    return float(energies[:rank].sum()) / rest if rest > 0 else math.inf


def subspace_share(first: Tensor, second: Tensor, threshold: float) -> float:
    """Return the rank of the concatenated singular vectors of two layers, divided by its maximum.

    Entries with a magnitude below the threshold count as zero. 1 means that the layers share no direction. For complete
    bases the value depends on the threshold alone, so compare several thresholds.

    Args:
        first: singular vectors as columns, (n, k).
        second: singular vectors of the next layer, (n, k).
        threshold: magnitude below which an entry counts as zero.
    """
    columns = torch.cat([as_float64(V.masked_fill(V.abs() < threshold, 0)) for V in (first, second)], 1)  # (n, 2 k)
    # The Gram matrix of the shorter side has the same rank.
    gram = columns @ columns.T if columns.shape[0] <= columns.shape[1] else columns.T @ columns
    return int(torch.linalg.matrix_rank(gram, hermitian=True)) / min(columns.shape)


@lru_cache(maxsize=256)
def _median(beta: float) -> float:
    """Return the median of the Marchenko-Pastur law with ratio beta and variance 1."""
    low, high = (1 - math.sqrt(beta)) ** 2, (1 + math.sqrt(beta)) ** 2

    def mass(x: float) -> float:
        # With x = low + (high - low) sin^2 t the density is finite at both ends.
        def density(t: float) -> float:
            value = low + (high - low) * math.sin(t) ** 2
            slope = (high - low) * math.sin(2 * t)
            numerator = math.sqrt(max(0.0, (high - value) * (value - low)))
            return numerator / (2 * math.pi * beta * value) * slope if value > 0 else 0.0

        end = math.asin(math.sqrt((x - low) / (high - low)))
        return float(integrate.quad(density, 0, end, limit=200)[0])

    return float(optimize.brentq(lambda x: mass(x) - 0.5, low, high))
