"""Intervals and paired tests, against independent computations."""

from __future__ import annotations

import math
import runpy
from fractions import Fraction
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import optimize, stats

from laserlm.errors import LaserError, ScoringError
from laserlm.scoring.statistics import (
    Clustering,
    Interval,
    clustering_of,
    mcnemar,
    mean_test,
    paired_difference,
    paired_mean,
    sign_flip_test,
    wilson,
)

Z95 = 1.959963984540054


def wilson_by_roots(successes: float, n: float, z: float) -> tuple[float, float]:
    """Return the proportions whose score statistic is exactly z away, by root finding."""
    share, edge = successes / n, 1e-12

    def distance(p: float) -> float:
        return abs(share - p) - z * math.sqrt(p * (1 - p) / n)

    low = 0.0 if successes == 0 else float(optimize.brentq(distance, edge, min(share, 1 - edge), xtol=1e-15))
    high = 1.0 if successes == n else float(optimize.brentq(distance, max(share, edge), 1 - edge, xtol=1e-15))
    return low, high


@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.999])
@pytest.mark.parametrize(("successes", "n"), [(0, 1), (1, 1), (0, 20), (1, 20), (7, 20), (19, 20), (20, 20), (4321, 13151)])
def test_wilson_holds_the_proportions_within_the_normal_quantile(successes: int, n: int, confidence: float) -> None:
    interval = wilson(successes, n, confidence)
    expected = wilson_by_roots(successes, n, float(stats.norm.isf((1 - confidence) / 2)))
    assert interval == pytest.approx(expected, abs=1e-10)
    assert interval.low <= successes / n <= interval.high


def test_wilson_of_no_success_reaches_up_to_z_squared_over_n_plus_z_squared() -> None:
    assert wilson(0, 10) == pytest.approx((0, Z95**2 / (10 + Z95**2)))


def mcnemar_by_enumeration(corrected: int, broken: int) -> Fraction:
    """Return the share of all coin sequences that are at least as uneven as this one."""
    n = corrected + broken
    heads = [sum(flips) for flips in product((0, 1), repeat=n)]
    return Fraction(sum(abs(2 * h - n) >= abs(corrected - broken) for h in heads), len(heads))


@pytest.mark.parametrize("n", range(1, 13))
def test_mcnemar_is_the_share_of_coin_sequences_at_least_as_uneven(n: int) -> None:
    for corrected in range(n + 1):
        expected = mcnemar_by_enumeration(corrected, n - corrected)
        assert mcnemar(corrected, n - corrected) == pytest.approx(float(expected), rel=1e-12)


@pytest.mark.parametrize(
    ("corrected", "broken", "p"),
    [(0, 0, 1.0), (0, 1, 1.0), (3, 3, 1.0), (5, 0, 2 / 32), (0, 5, 2 / 32), (9, 1, 22 / 1024), (1, 9, 22 / 1024)],
)
def test_mcnemar_worked_out_by_hand(corrected: int, broken: int, p: float) -> None:
    assert mcnemar(corrected, broken) == pytest.approx(p, rel=1e-12)


def test_mcnemar_of_many_pairs_nears_the_chi_square_with_continuity_correction() -> None:
    corrected, broken = 540, 460
    corrected_square = (abs(corrected - broken) - 1) ** 2 / (corrected + broken)
    assert mcnemar(corrected, broken) == pytest.approx(float(stats.chi2.sf(corrected_square, df=1)), rel=0.01)


def score_statistic(corrected: float, broken: float, n: float, d: float) -> float:
    """Return the score statistic of the difference d, with the nuisance probability by numerical maximum likelihood.

    The pairs are trinomial. With t the smaller of the two discordant probabilities, the larger is t + |d| and the
    concordant one 1 - |d| - 2 t.
    """
    larger, smaller = (corrected, broken) if d >= 0 else (broken, corrected)
    most = (1 - abs(d)) / 2

    def slope(t: float) -> float:
        terms = ((larger, t + abs(d), 1), (smaller, t, 1), (n - corrected - broken, 2 * (most - t), -2))
        return sum(sign * count / share for count, share, sign in terms if count)

    # The log-likelihood is concave in t: its maximum is where the slope changes sign, or an end.
    inset = 1e-13 * most
    if slope(inset) <= 0:
        t = 0.0
    elif slope(most - inset) >= 0:
        t = most
    else:
        t = float(optimize.brentq(slope, inset, most - inset, xtol=1e-16, rtol=1e-14))
    variance = (2 * t + abs(d) - d**2) / n
    return ((corrected - broken) / n - d) / math.sqrt(variance) if variance > 0 else 0.0


def tango_by_likelihood(corrected: float, broken: float, n: float, z: float) -> tuple[float, float]:
    """Return the differences whose score statistic is exactly z away, by root finding."""
    observed, inset = (corrected - broken) / n, 1e-9
    low = high = observed
    if observed > -1:
        low = optimize.brentq(lambda d: score_statistic(corrected, broken, n, d) - z, -1 + inset, observed - inset, xtol=1e-14)
    if observed < 1:
        high = optimize.brentq(lambda d: score_statistic(corrected, broken, n, d) + z, observed + inset, 1 - inset, xtol=1e-14)
    return float(low), float(high)


@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.999])
@pytest.mark.parametrize(
    ("corrected", "broken", "n"),
    [
        (1, 0, 10),
        (0, 1, 10),
        (3, 1, 10),
        (9, 1, 10),
        (5, 5, 10),
        (12, 4, 50),
        (0, 7, 50),
        (1, 0, 400),
        (30, 12, 400),
        (12, 30, 400),
        (200, 150, 400),
        (2500, 1100, 13151),
    ],
)
def test_tangos_interval_is_the_one_of_a_numerical_constrained_maximum_likelihood(
    corrected: int, broken: int, n: int, confidence: float
) -> None:
    z = float(stats.norm.isf((1 - confidence) / 2))
    interval = paired_difference(corrected, broken, n, confidence)
    assert interval == pytest.approx(tango_by_likelihood(corrected, broken, n, z), abs=1e-7)


@pytest.mark.parametrize("n", [1, 2, 30, 5000])
def test_without_discordant_pairs_the_interval_is_z_squared_over_n_plus_z_squared_on_both_sides(n: int) -> None:
    half = Z95**2 / (n + Z95**2)
    assert paired_difference(0, 0, n) == pytest.approx((-half, half), abs=1e-9)


@pytest.mark.parametrize(("corrected", "broken"), [(1, 0), (0, 1), (10, 0), (0, 10), (7, 3), (50, 50), (380, 20)])
def test_with_only_discordant_pairs_the_interval_is_wilsons_stretched_from_minus_one_to_one(
    corrected: int, broken: int
) -> None:
    n = corrected + broken
    low, high = stats.binomtest(corrected, n).proportion_ci(0.95, method="wilson")
    assert paired_difference(corrected, broken, n) == pytest.approx((2 * low - 1, 2 * high - 1), abs=1e-9)


@pytest.mark.parametrize(("corrected", "broken", "n"), [(3, 1, 10), (0, 7, 50), (30, 12, 400)])
def test_exchanging_the_two_models_turns_the_interval_around(corrected: int, broken: int, n: int) -> None:
    low, high = paired_difference(corrected, broken, n)
    assert paired_difference(broken, corrected, n) == pytest.approx((-high, -low), abs=1e-9)


def test_many_pairs_give_the_normal_interval_of_the_difference() -> None:
    corrected, broken, n = 13_000, 10_000, 100_000
    gain = (corrected - broken) / n
    half = Z95 * math.sqrt(((corrected + broken) / n - gain**2) / n)
    assert paired_difference(corrected, broken, n) == pytest.approx((gain - half, gain + half), abs=2e-5)


def test_every_outcome_of_few_pairs_has_an_interval_around_its_gain() -> None:
    n = 7
    for corrected in range(n + 1):
        for broken in range(n + 1 - corrected):
            low, high = paired_difference(corrected, broken, n)
            assert -1 <= low <= (corrected - broken) / n <= high <= 1
            assert low < high


@pytest.mark.parametrize(("corrects", "breaks"), [(0.02, 0.02), (0.1, 0.0), (0.1, 0.05), (0.3, 0.2)])
def test_the_interval_covers_the_true_gain_nearly_as_often_as_it_says(corrects: float, breaks: float) -> None:
    n, covered = 30, 0.0
    pairs = stats.multinomial(n, [corrects, breaks, 1 - corrects - breaks])
    for corrected in range(n + 1):
        for broken in range(n + 1 - corrected):
            probability = float(pairs.pmf([corrected, broken, n - corrected - broken]))
            if probability > 1e-7:
                low, high = paired_difference(corrected, broken, n)
                covered += probability * (low <= corrects - breaks <= high)
    assert covered >= 0.93


@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.99])
@pytest.mark.parametrize("n", [2, 3, 50])
def test_the_paired_mean_has_scipys_students_interval(n: int, confidence: float) -> None:
    first, second = np.random.default_rng(n).normal(size=(2, n))
    low, high = stats.ttest_rel(first, second).confidence_interval(confidence)
    assert paired_mean([float(x) for x in first - second], confidence) == pytest.approx((low, high), rel=1e-9)


def test_the_paired_mean_worked_out_by_hand() -> None:
    # Mean 2, variance 1, standard error 1 / sqrt(3). With 2 degrees of freedom Student's distribution function is
    # 1/2 + t / (2 sqrt(2 + t^2)), so the quantile of 0.975 is 0.95 sqrt(2 / (1 - 0.95^2)) = 4.30265.
    half = 0.95 * math.sqrt(2 / (1 - 0.95**2)) / math.sqrt(3)
    assert paired_mean([1.0, 2.0, 3.0]) == pytest.approx((2 - half, 2 + half), rel=1e-12)


def test_equal_differences_have_an_interval_of_no_width() -> None:
    assert paired_mean([0.25] * 8) == Interval(0.25, 0.25)


def test_a_single_pair_says_nothing_of_the_mean() -> None:
    assert paired_mean([0.3]) == Interval(-math.inf, math.inf)


def test_more_confidence_takes_a_wider_interval() -> None:
    confidences = (0.5, 0.8, 0.95, 0.99)
    for intervals in (
        [wilson(7, 20, c) for c in confidences],
        [paired_difference(7, 3, 20, c) for c in confidences],
        [paired_mean([1.0, 2.0, 4.0], c) for c in confidences],
    ):
        for narrow, wide in pairwise(intervals):
            assert wide.low < narrow.low < narrow.high < wide.high


def test_no_examples_have_no_interval() -> None:
    message = r"no interval over 0 (examples|pairs); the split is empty"
    with pytest.raises(ScoringError, match=message):
        wilson(0, 0)
    with pytest.raises(ScoringError, match=message):
        paired_difference(0, 0, 0)
    with pytest.raises(ScoringError, match=message):
        paired_mean([])
    assert issubclass(ScoringError, LaserError)


def test_facts_of_one_question_change_nothing() -> None:
    differences, facts = [1, 0, -1, 1, 1, 0], list("abcdef")
    assert clustering_of(differences, facts) is None
    assert sign_flip_test(differences, facts) == pytest.approx(mcnemar(3, 1), rel=1e-12)
    assert paired_mean(differences, facts=facts) == paired_mean(differences)


def test_the_design_effect_worked_out_by_hand() -> None:
    # Mean 1/4. Deviations summed by fact: 3/2, -1/4, -5/4; questions outside of it: 2, 3, 3. The variance between facts is
    # 2/3 (9/16 + 1/144 + 25/144) = 107/216, that between questions (11/4) / 12 = 11/48. The sum of squared sizes is 6.
    clustering = clustering_of([1, 1, 0, -1], ["a", "a", "b", "c"])
    assert clustering == pytest.approx((107 / 216 / (11 / 48), 16 / 6 - 1), rel=1e-12)


def test_the_variance_between_facts_is_that_of_leaving_out_one_fact() -> None:
    generator = np.random.default_rng(0)
    facts = generator.integers(8, size=40).tolist()
    values = generator.normal(size=40) + np.array(facts)
    names = sorted(set(facts))
    without = np.array([values[[f != name for f in facts]].mean() for name in names])
    between_facts = (len(names) - 1) / len(names) * ((without - values.mean()) ** 2).sum()
    clustering = clustering_of(values, facts)
    assert clustering is not None
    assert clustering.design_effect == pytest.approx(between_facts / (values.var(ddof=1) / 40))


def test_repeated_questions_tell_the_mean_as_well_as_one_of_each() -> None:
    values = [0.3, -0.2, 0.5, 0.1, 0.9]
    facts = [f for f in "abcde" for _ in range(4)]
    repeated = [x for x in values for _ in range(4)]
    assert paired_mean(repeated, facts=facts) == pytest.approx(paired_mean(values))
    assert paired_mean(repeated).high < paired_mean(values).high
    assert mean_test(repeated, facts) == pytest.approx(float(stats.ttest_1samp(values, 0, alternative="greater").pvalue))


def test_the_design_effect_is_never_below_one() -> None:
    clustering = clustering_of([1, -1, 1, -1, 1, -1], ["a", "a", "b", "b", "c", "c"])
    assert clustering == Clustering(1.0, pytest.approx(2.0))


@pytest.mark.parametrize("value", [0, 1])
def test_equal_values_count_as_one_of_each_fact(value: int) -> None:
    assert clustering_of([value] * 7, list("aaabbcd")) == pytest.approx(((9 + 4 + 1 + 1) / 7, 49 / 15 - 1))


@pytest.mark.parametrize("count", [2, 30])
def test_a_single_fact_says_nothing(count: int) -> None:
    values = [float(i % 2) for i in range(count)]
    clustering = clustering_of(values, ["a"] * count)
    assert paired_mean(values, facts=["a"] * count) == Interval(-math.inf, math.inf)
    assert mean_test(values, ["a"] * count) == 1
    assert paired_difference(count // 2, 0, count, clustering=clustering) == Interval(-1, 1)
    assert wilson(count // 2, count, clustering=clustering) == Interval(0, 1)
    assert sign_flip_test([1] * count, ["a"] * count) == 1


@pytest.mark.parametrize("confidence", [0.8, 0.95])
@pytest.mark.parametrize(("corrected", "broken", "n"), [(0, 0, 30), (6, 0, 30), (12, 3, 90), (3, 12, 90), (30, 0, 30)])
def test_intervals_by_fact_are_those_of_fewer_questions_and_students_quantile(
    corrected: int, broken: int, n: int, confidence: float
) -> None:
    clustering = Clustering(2.5, 9.0)
    t = float(stats.t.isf((1 - confidence) / 2, 9))
    size = n / 2.5
    gain = paired_difference(corrected, broken, n, confidence, clustering=clustering)
    assert gain == pytest.approx(tango_by_likelihood(corrected / 2.5, broken / 2.5, size, t), abs=1e-7)
    share = wilson(corrected, n, confidence, clustering=clustering)
    assert share == pytest.approx(wilson_by_roots(corrected / 2.5, size, t), abs=1e-9)


def sign_flips(sums: list[int]) -> list[int]:
    """Return the total of the sums under every choice of their signs."""
    return [sum(s * sign for s, sign in zip(sums, signs, strict=True)) for signs in product((1, -1), repeat=len(sums))]


@pytest.mark.parametrize("sums", [[3, -1, 2], [1, 1, 1, -1, 2, 3, 3], [0, 0], [5], [2, 2, -2, -2], [4, 1, 1, 1, 1, 1]])
def test_the_sign_flip_test_counts_the_signs_of_facts_that_go_as_far(sums: list[int]) -> None:
    differences = [int(math.copysign(1, s)) for s in sums for _ in range(abs(s))] + [0, 1, -1]
    facts = [f"f{i}" for i, s in enumerate(sums) for _ in range(abs(s))] + ["right", "even", "even"]
    totals, total = sign_flips(sums), sum(sums)
    two_sided = sum(abs(t) >= abs(total) for t in totals) / len(totals)
    assert sign_flip_test(differences, facts) == pytest.approx(two_sided, rel=1e-12)
    one_sided = sum(t >= total for t in totals) / len(totals)
    assert sign_flip_test(differences, facts, one_sided=True) == pytest.approx(one_sided, rel=1e-12)


@pytest.mark.parametrize(("corrected", "broken"), [(0, 0), (3, 3), (9, 1), (1, 9), (62, 7), (540, 460)])
def test_the_sign_flip_test_of_single_questions_is_mcnemars(corrected: int, broken: int) -> None:
    differences = [1] * corrected + [-1] * broken + [0] * 5
    p = sign_flip_test(differences, range(len(differences)))
    assert p == pytest.approx(mcnemar(corrected, broken), rel=1e-10)
    thrice = sign_flip_test(differences * 3, [*range(len(differences))] * 3)
    assert thrice == pytest.approx(p, rel=1e-10)


def coverage(*arguments: Any, **options: Any) -> float:
    """Return what ``scripts/interval_coverage.py`` simulates."""
    script = runpy.run_path(str(Path(__file__).parents[2] / "scripts" / "interval_coverage.py"))
    return float(script["coverage"](*arguments, **options))


@pytest.mark.parametrize("metric", ["accuracy", "loss"])
def test_intervals_of_questions_that_share_facts_hold_their_level(metric: str) -> None:
    assert coverage(metric, [3] * 50, 1.0, 300) >= 0.91
    assert coverage(metric, [3] * 50, 1.0, 300, by_fact=False) <= 0.85  # three equal questions taken as independent ones


@pytest.mark.slow
@pytest.mark.parametrize("metric", ["accuracy", "loss"])
@pytest.mark.parametrize("correlation", [0.0, 0.3, 0.6, 1.0])
@pytest.mark.parametrize("facts", [100, 400])
def test_the_simulated_coverage_is_95_per_cent(metric: str, correlation: float, facts: int) -> None:
    runs = 3000
    noise = 3 * math.sqrt(0.95 * 0.05 / runs)
    assert 0.94 - noise <= coverage(metric, [3] * facts, correlation, runs) <= 0.96 + noise


@pytest.mark.slow
@pytest.mark.parametrize("metric", ["accuracy", "loss"])
@pytest.mark.parametrize("correlation", [0.0, 0.3, 0.6, 1.0])
@pytest.mark.parametrize("sizes", [[3] * 10, [3] * 30, [1, 1, 2, 3, 8] * 4, [1, 1, 2, 3, 8] * 20])
def test_few_facts_and_facts_of_unequal_size_have_no_narrow_intervals(
    metric: str, correlation: float, sizes: list[int]
) -> None:
    runs = 1500
    assert coverage(metric, sizes, correlation, runs) >= 0.94 - 3 * math.sqrt(0.95 * 0.05 / runs)
