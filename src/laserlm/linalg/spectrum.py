"""What singular values say of a matrix: how many directions it uses, and how many stand out from noise.

A matrix (m, n) of independent entries of standard deviation s has singular values up to about s (sqrt m + sqrt n), the
Marchenko-Pastur edge; the largest lies around it by the Tracy-Widom law. What stands out beyond that is structure.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from scipy import integrate, optimize
from torch import Tensor

__all__ = [
    "condition",
    "edge",
    "effective_rank",
    "energy_share",
    "gavish_donoho",
    "noise",
    "nuclear_share",
    "numerical_rank",
    "rank_beyond",
    "signal_to_noise",
    "stable_rank",
    "subspace_share",
]

TRACY_WIDOM_999 = 3.27
"""99.9 % quantile of the Tracy-Widom law of order 1 (Bejan, Largest eigenvalues and sample covariance matrices, 2005)."""


def effective_rank(S: Tensor) -> float:
    """Return the exponential of the entropy of the singular values (k,) as shares of their sum; 0 for a zero matrix.

    Source: Roy and Vetterli, The effective rank, EUSIPCO 2007.
    """
    S = S.double()
    if not S.sum() > 0:
        return 0.0
    p = S / S.sum()
    return math.exp(float(-torch.special.xlogy(p, p).sum()))


def stable_rank(S: Tensor) -> float:
    """Return the squared Frobenius norm over the squared largest singular value; 0 for a zero matrix."""
    S = S.double()
    return float(S.square().sum() / S.max().square()) if S.max() > 0 else 0.0


def numerical_rank(S: Tensor, shape: tuple[int, int]) -> int:
    """Return the number of singular values of a matrix (m, n) that float32 tells from zero, as numpy does."""
    return int((S.max() * max(shape) * torch.finfo(torch.float32).eps < S).sum())


def condition(S: Tensor) -> float:
    """Return the largest singular value over the smallest; infinite for a singular matrix."""
    least = float(S.min())
    return float(S.max()) / least if least > 0 else math.inf


def nuclear_share(S: Tensor, rank: int) -> float:
    """Return the share of the sum of the singular values that the ``rank`` largest have."""
    return float(S[:rank].sum() / S.sum()) if S.sum() > 0 else 0.0


def energy_share(S: Tensor, rank: int) -> float:
    """Return the share of the sum of the squared singular values that the ``rank`` largest have."""
    return nuclear_share(S.square(), rank)


def noise(S: Tensor, shape: tuple[int, int]) -> float:
    """Return the standard deviation of the entries that would give a matrix (m, n) of noise this median singular value.

    Structure of low rank hardly moves the median, so this estimates the noise that it lies in.

    Source: Gavish and Donoho, arXiv 1305.5870, section III.E.
    """
    small, large = sorted(shape)
    return float(S.double().quantile(0.5)) / math.sqrt(large * _median(small / large))


def edge(s: float, shape: tuple[int, int]) -> float:
    """Return the Marchenko-Pastur edge of a matrix (m, n) of entries of standard deviation s: s (sqrt m + sqrt n)."""
    m, n = shape
    return s * (math.sqrt(m) + math.sqrt(n))


def rank_beyond(S: Tensor, shape: tuple[int, int], s: float | None = None) -> int:
    """Return how many singular values lie beyond what noise explains, wrongly once in a thousand matrices of noise.

    The bound is the 99.9 % quantile of the largest singular value of noise: the Marchenko-Pastur edge and its Tracy-Widom
    fluctuation, without which noise would keep a value every other time.

    Args:
        S: (k,), falling.
        shape: (m, n) of the matrix.
        s: standard deviation of the noise; None estimates it.

    Source: Johnstone, Annals of Statistics 29 (2001), theorem 1.
    """
    s = noise(S, shape) if s is None else s
    a, b = (math.sqrt(x - 0.5) for x in shape)
    centre = (a + b) ** 2
    spread = (a + b) * (1 / a + 1 / b) ** (1 / 3)
    return int((S.double() > s * math.sqrt(centre + TRACY_WIDOM_999 * spread)).sum())


def gavish_donoho(S: Tensor, shape: tuple[int, int]) -> int:
    """Return the rank that the optimal hard threshold for singular values keeps, with the noise level unknown.

    Source: Gavish and Donoho, arXiv 1305.5870, equations 11 and 18.
    """
    small, large = sorted(shape)
    beta = small / large
    optimal = math.sqrt(2 * (beta + 1) + 8 * beta / ((beta + 1) + math.sqrt(beta**2 + 14 * beta + 1)))
    threshold = optimal / math.sqrt(_median(beta)) * float(S.double().quantile(0.5))
    return int((S.double() > threshold).sum())


def signal_to_noise(S: Tensor, rank: int) -> float:
    """Return the squared singular values of the ``rank`` largest over those of the rest; infinite without a rest."""
    rest = float(S[rank:].double().square().sum())
    return float(S[:rank].double().square().sum()) / rest if rest > 0 else math.inf


def subspace_share(first: Tensor, second: Tensor, threshold: float) -> float:
    """Return the rank of two layers' singular vectors side by side, over what it is where they share nothing.

    Entries smaller than the threshold in magnitude count as zero. 1 means that nothing is shared; for a complete basis of
    each it depends on the threshold alone, so that several belong beside one another.

    Args:
        first: singular vectors as columns, (n, k).
        second: those of the next layer, (n, k).
        threshold: magnitude below which an entry is zero.
    """
    kept = [torch.where(V.abs() < threshold, 0.0, V.double()) for V in (first, second)]
    together = torch.cat(kept, 1)  # (n, 2 k)
    # The Gram matrix of the shorter side has the same rank.
    gram = together @ together.T if together.shape[0] <= together.shape[1] else together.T @ together
    return int(torch.linalg.matrix_rank(gram, hermitian=True)) / min(together.shape)


@lru_cache(maxsize=256)
def _median(beta: float) -> float:
    """Return the median of the Marchenko-Pastur law of ratio beta, of variance 1."""
    low, high = (1 - math.sqrt(beta)) ** 2, (1 + math.sqrt(beta)) ** 2

    def mass(x: float) -> float:
        # With x = low + (high - low) sin^2 t the density has no infinite slope at either end.
        def density(t: float) -> float:
            at = low + (high - low) * math.sin(t) ** 2
            slope = (high - low) * math.sin(2 * t)
            return math.sqrt(max(0.0, (high - at) * (at - low))) / (2 * math.pi * beta * at) * slope if at > 0 else 0.0

        end = math.asin(math.sqrt((x - low) / (high - low)))
        return float(integrate.quad(density, 0, end, limit=200)[0])

    return float(optimize.brentq(lambda x: mass(x) - 0.5, low, high))
