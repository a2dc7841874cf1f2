"""Intervals and paired tests."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, stats

from laserlm.errors import ScoringError

__all__ = [
    "Interval",
    "bootstrap",
    "dense_ranks",
    "mcnemar",
    "paired_difference",
    "paired_mean",
    "percentile_interval",
    "spearman",
    "wilson",
]


class Interval(NamedTuple):
    """Lower and upper end of a confidence interval."""

    low: float
    high: float


def wilson(successes: int, n: int, confidence: float = 0.95) -> Interval:
    """Return the Wilson score interval of a proportion ``successes / n``.

    Raises:
        ScoringError: if n is 0.

    Source: E. B. Wilson, JASA 22 (1927).
    """
    if n == 0:
        raise ScoringError("no interval over 0 examples; the split is empty")
    low, high = stats.binomtest(successes, n).proportion_ci(confidence, method="wilson")
    return Interval(float(low), float(high))


def mcnemar(corrected: int, broken: int) -> float:
    """Return the exact two-sided McNemar p-value: a fair coin over the ``corrected + broken`` discordant pairs."""
    n = corrected + broken
    return 1.0 if n == 0 else float(stats.binomtest(corrected, n).pvalue)


def paired_difference(corrected: int, broken: int, n: int, confidence: float = 0.95) -> Interval:
    """Return Tango's score interval of the gain ``(corrected - broken) / n`` over n pairs.

    The score statistic at difference d is (b - c - n d) / sqrt(n (2 q + d (1 - d))), where b is ``corrected``, c is
    ``broken`` and q, the nuisance probability, is its maximum-likelihood value under d. The interval holds every d
    whose statistic is within the normal quantile. It keeps its coverage for few discordant pairs, also for none.

    Raises:
        ScoringError: if n is 0.

    Source: T. Tango, Statistics in Medicine 17 (1998) 891-908.
    """
    if n == 0:
        raise ScoringError("no interval over 0 pairs; the split is empty")
    z = float(stats.norm.ppf(0.5 + confidence / 2))
    b, c = corrected, broken

    def score(d: float) -> float:
        linear = -b - c + (2 * n - b + c) * d
        q = (math.sqrt(max(linear**2 - 8 * n * (-c * d * (1 - d)), 0.0)) - linear) / (4 * n)
        variance = n * (2 * q + d * (1 - d))
        excess = b - c - n * d
        return excess / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, excess) if excess else 0.0

    observed, edge = (b - c) / n, 1 - 1e-12
    low = -1.0 if score(-edge) <= z else float(optimize.brentq(lambda d: score(d) - z, -edge, observed))
    high = 1.0 if score(edge) >= -z else float(optimize.brentq(lambda d: score(d) + z, observed, edge))
    return Interval(low, high)


def paired_mean(differences: Sequence[float], confidence: float = 0.95) -> Interval:
    """Return Student's interval of the mean of paired differences; infinite for a single pair."""
    n = len(differences)
    if n == 0:
        raise ScoringError("no interval over 0 pairs; the split is empty")
    mean = math.fsum(differences) / n
    if n == 1:
        return Interval(-math.inf, math.inf)
    error = math.sqrt(math.fsum((x - mean) ** 2 for x in differences) / (n - 1) / n)
    half = float(stats.t.ppf(0.5 + confidence / 2, n - 1)) * error
    return Interval(mean - half, mean + half)


def dense_ranks(values: ArrayLike) -> NDArray[np.intp]:
    """Return the index of each value among the distinct values in rising order, as ``spearman`` takes it."""
    ranks: NDArray[np.intp] = np.unique(np.asarray(values), return_inverse=True)[1]
    return ranks


def spearman(x: NDArray[np.intp], y: NDArray[np.intp], weights: ArrayLike | None = None) -> float:
    """Return Spearman's rank correlation; NaN where one side is constant.

    Args:
        x: dense ranks (n,).
        y: dense ranks (n,) of the same examples.
        weights: how many times each pair counts, as in a bootstrap; None counts each once.
    """
    w = np.ones(len(x)) if weights is None else np.asarray(weights, dtype=float)
    middle = (float(w.sum()) + 1) / 2
    a, b = _mean_ranks(x, w) - middle, _mean_ranks(y, w) - middle
    norm = math.sqrt(float(w @ (a * a)) * float(w @ (b * b)))
    return float(w @ (a * b)) / norm if norm > 0 else math.nan


def bootstrap(n: int, resamples: int, seed: int, *, at_once: int = 1) -> Iterator[NDArray[np.int32]]:
    """Yield the indices of resamples with replacement of n examples, (resamples, n) each, ``at_once`` resamples at a time."""
    generator = np.random.default_rng(seed)
    for done in range(0, resamples, at_once):
        yield generator.integers(n, size=(min(at_once, resamples - done), n), dtype=np.int32)


def percentile_interval(values: ArrayLike) -> Interval:
    """Return the 2.5 % and 97.5 % quantiles of a statistic over resamples, NaN aside."""
    low, high = np.nanquantile(np.asarray(values), [0.025, 0.975])
    return Interval(float(low), float(high))


def _mean_ranks(ranks: NDArray[np.intp], weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return ranks from 1 on, ties at their mean, from dense ranks and weights."""
    mass = np.bincount(ranks, weights)
    return (np.cumsum(mass) - (mass - 1) / 2)[ranks]
