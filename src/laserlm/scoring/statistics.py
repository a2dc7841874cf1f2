"""Intervals and paired tests, for independent questions and for questions that share facts."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, special  # not scipy.stats, whose import takes long

from laserlm.errors import ScoringError


class Interval(NamedTuple):
    """Lower and upper end of a confidence interval."""

    low: float
    high: float


def in_points(gain: float, interval: Sequence[float]) -> str:
    """Return a difference of two shares in percentage points, such as ``+4.6 points [+3.0, +6.5]``."""
    low, high = interval
    return f"{100 * gain:+.1f} points [{100 * low:+.1f}, {100 * high:+.1f}]"


class Clustering(NamedTuple):
    """How much less questions say that share facts than as many independent ones.

    Args:
        design_effect: variance of their mean over that of independent questions, at least 1; n questions say as much as
            ``n / design_effect`` independent ones.
        df: degrees of freedom with which that variance is known.
    """

    design_effect: float
    df: float

    def quantile(self, confidence: float) -> float:
        """Return Student's two-sided quantile; infinite for a single fact."""
        return float(special.stdtrit(self.df, 0.5 + confidence / 2)) if self.df > 0 else math.inf


def clustering_of(values: ArrayLike, facts: Sequence[Hashable]) -> Clustering | None:
    """Return how facts that questions share widen the interval of a mean; None if every fact has one question.

    The design effect is v(facts) / v(questions), but at least 1. Both are variances of the mean by the jackknife, which
    leaves out one part after another: v = (J - 1) / J * sum over the J parts of (e / (n - m))^2, where m is the number of
    questions of the part and e the sum of their deviations from the mean. If all values are equal, they do not say how alike
    the questions of a fact are. The design effect is then that of complete likeness, (sum of m^2) / n.

    The degrees of freedom are n^2 / (sum of m^2) - 1: for facts of equal size their number minus 1.

    Args:
        values: (n,) one value for each question.
        facts: the fact of each question.

    Source: L. Kish, Survey Sampling (1965), sections 5.4 and 8.2; J. N. K. Rao and A. J. Scott, Biometrics 48 (1992) 577-585,
    for counts divided by the design effect.
    """
    index = {fact: i for i, fact in enumerate(dict.fromkeys(facts))}
    n = len(facts)
    if len(index) == n:
        return None
    x = np.asarray(values, dtype=float)
    fact_of = np.array([index[fact] for fact in facts])
    sizes = np.bincount(fact_of)
    kish = float((sizes**2).sum()) / n
    if len(index) == 1 or not np.ptp(x):
        return Clustering(kish, n / kish - 1)
    deviations = x - x.mean()
    between_questions = float((deviations**2).sum()) / (n * (n - 1))
    jackknife = float(((np.bincount(fact_of, deviations) / (n - sizes)) ** 2).sum())
    between_facts = (len(index) - 1) / len(index) * jackknife
    return Clustering(max(1.0, between_facts / between_questions), n / kish - 1)


def wilson(successes: int, n: int, confidence: float = 0.95, *, clustering: Clustering | None = None) -> Interval:
    """Return the Wilson score interval of a proportion ``successes / n``.

    Args:
        successes: questions that have something.
        n: all questions.
        confidence: of the interval.
        clustering: of the successes by fact, where questions share facts. Both numbers are divided by the design effect.

    Raises:
        ScoringError: if n is 0.

    Source: E. B. Wilson, JASA 22 (1927).
    """
    if n == 0:
        raise ScoringError("no interval over 0 examples; the split is empty")
    z, k, size = _effective(confidence, clustering, successes, n)
    if math.isinf(z**2):
        return Interval(0.0, 1.0)
    middle, half = k + z**2 / 2, z * math.sqrt(k * (size - k) / size + z**2 / 4)
    share = successes / n
    low, high = (middle - half) / (size + z**2), (middle + half) / (size + z**2)
    return Interval(min(max(low, 0.0), share), max(min(high, 1.0), share))


def mcnemar(corrected: int, broken: int) -> float:
    """Return the exact two-sided McNemar p-value: a fair coin over the ``corrected + broken`` discordant pairs."""
    n = corrected + broken
    return min(1.0, 2 * float(special.bdtr(min(corrected, broken), n, 0.5)))


def sign_flip_test(differences: Sequence[int], facts: Sequence[Hashable], *, one_sided: bool = False) -> float:
    """Return the exact p-value of the sum of paired differences, under a fair coin for the sign of each fact's sum.

    If every fact has one question, this is the exact McNemar test.

    Args:
        differences: 1 for a corrected question, -1 for a broken one, else 0.
        facts: the fact of each question. Only facts are taken as independent.
        one_sided: whether only sums as large as this one count, and not those as small.
    """
    sums: Counter[Hashable] = Counter()
    for fact, difference in zip(facts, differences, strict=True):
        sums[fact] += difference
    total, sizes = sum(sums.values()), Counter(abs(s) for s in sums.values() if s)
    distribution = np.ones(1)  # of the sum over the facts so far, from its lowest value on in steps of 2
    for size, count in sizes.items():
        of_size = np.zeros(size * count + 1)
        of_size[::size] = _fair_coin(count)
        distribution = np.convolve(distribution, of_size)
    reached = 2 * np.arange(len(distribution)) - (len(distribution) - 1)
    extreme = reached >= total if one_sided else np.abs(reached) >= abs(total)
    return 1.0 if extreme.all() else min(1.0, float(distribution[extreme].sum()))


def _fair_coin(n: int) -> NDArray[np.float64]:
    """Return the probabilities (n + 1,) of 0 to n heads in n throws."""
    heads = np.arange(n + 1)
    logs = special.gammaln(n + 1) - special.gammaln(heads + 1) - special.gammaln(n - heads + 1) - n * math.log(2)
    probabilities: NDArray[np.float64] = np.exp(logs)
    return probabilities


def paired_difference(
    corrected: int, broken: int, n: int, confidence: float = 0.95, *, clustering: Clustering | None = None
) -> Interval:
    """Return Tango's score interval of the gain ``(corrected - broken) / n`` over n pairs.

    The score statistic at difference d is (b - c - n d) / sqrt(n (2 q + d (1 - d))), where b is ``corrected``, c is
    ``broken`` and q, the nuisance probability, is its maximum-likelihood value under d. The interval holds every d
    whose statistic is within the normal quantile. It keeps its coverage for few discordant pairs, also for none.

    Args:
        corrected: pairs that only the second model has right.
        broken: pairs that only the first model has right.
        n: all pairs.
        confidence: of the interval.
        clustering: of the differences by fact, where questions share facts. The three numbers are then divided by the
            design effect, and the quantile is Student's.

    Raises:
        ScoringError: if n is 0.

    Source: T. Tango, Statistics in Medicine 17 (1998) 891-908.
    """
    if n == 0:
        raise ScoringError("no interval over 0 pairs; the split is empty")
    z, b, c, size = _effective(confidence, clustering, corrected, broken, n)
    observed, edge = (corrected - broken) / n, 1 - 1e-12

    def score(d: float) -> float:
        linear = -b - c + (2 * size - b + c) * d
        q = (math.sqrt(max(linear**2 - 8 * size * (-c * d * (1 - d)), 0.0)) - linear) / (4 * size)
        variance = size * (2 * q + d * (1 - d))
        excess = size * (observed - d)
        return excess / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, excess) if excess else 0.0

    low = -1.0 if score(-edge) <= z else float(optimize.brentq(lambda d: score(d) - z, -edge, observed))
    high = 1.0 if score(edge) >= -z else float(optimize.brentq(lambda d: score(d) + z, observed, edge))
    return Interval(low, high)


def paired_mean(differences: Sequence[float], confidence: float = 0.95, *, facts: Sequence[Hashable] | None = None) -> Interval:
    """Return Student's interval of the mean of paired differences; infinite for a single pair or fact.

    Args:
        differences: of the pairs.
        confidence: of the interval.
        facts: the fact of each pair, where pairs share facts; see ``clustering_of``.
    """
    mean, error, df = _mean_and_error(differences, facts)
    if df <= 0:
        return Interval(-math.inf, math.inf)
    half = float(special.stdtrit(df, 0.5 + confidence / 2)) * error if error else 0.0
    return Interval(mean - half, mean + half)


def mean_test(differences: Sequence[float], facts: Sequence[Hashable]) -> float:
    """Return the one-sided p-value of Student's paired test that the mean is above 0; 1 for a single pair or fact."""
    mean, error, df = _mean_and_error(differences, facts)
    if df <= 0:
        return 1.0
    return float(special.stdtr(df, -mean / error)) if error else float(mean <= 0)


def _mean_and_error(differences: Sequence[float], facts: Sequence[Hashable] | None) -> tuple[float, float, float]:
    """Return the mean of paired differences, its standard error, and the degrees of freedom of that error."""
    n = len(differences)
    if n == 0:
        raise ScoringError("no interval over 0 pairs; the split is empty")
    mean = math.fsum(differences) / n
    if n == 1:
        return mean, math.inf, 0
    error = math.sqrt(math.fsum((x - mean) ** 2 for x in differences) / (n - 1) / n)
    clustered = None if facts is None else clustering_of(differences, facts)
    return (mean, error, n - 1) if clustered is None else (mean, error * math.sqrt(clustered[0]), clustered[1])


def _effective(confidence: float, clustering: Clustering | None, *counts: int) -> tuple[float, ...]:
    """Return the quantile of a score interval, and the numbers of independent questions that say as much as these."""
    if clustering is None:
        return (float(special.ndtri(0.5 + confidence / 2)), *counts)
    return (clustering.quantile(confidence), *(count / clustering.design_effect for count in counts))


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
