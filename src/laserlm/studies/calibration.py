"""Calibration: compare the confidence of a model with its accuracy, unchanged and reduced."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby

import numpy as np
import torch
from numpy.typing import NDArray

from laserlm.errors import AnalysisError, ScoringError
from laserlm.models.finite import overflow
from laserlm.models.language_model import LanguageModel
from laserlm.scoring.forward import Progress, run_rows
from laserlm.scoring.records import TokenScores, TokenSequence
from laserlm.scoring.scorers import SCORERS
from laserlm.scoring.statistics import Interval, bootstrap
from laserlm.scoring.tokenize import encode
from laserlm.studies.estimates import Estimate
from laserlm.tasks import Example, Split

Confidence = tuple[float, bool]
"""Probability of the likeliest answer of an example, and whether that answer is right."""
MIN_BIN_EXAMPLES = 5
"""Minimum number of examples in a bin."""
SURE_STANDARD_ERRORS = 2.0
"""Distance from calibration, in standard errors, at which a bin counts as surely over- or underconfident."""
RESAMPLES = 2000
"""Number of bootstrap resamples."""
EXAMPLES_AT_ONCE = 2_000_000
"""Examples that the bootstrap draws at once. It bounds the memory."""


@dataclass(frozen=True)
class Measures:
    """Calibration of one model, or the paired change from the unchanged to the reduced model.

    Args:
        ece: expected calibration error.
        brier: mean squared difference between the confidence and 1 (right) or 0 (wrong).
        confidence: mean confidence.
        accuracy: share of examples whose likeliest answer is right.
    """

    ece: Estimate
    brier: Estimate
    confidence: Estimate
    accuracy: Estimate


@dataclass(frozen=True)
class Bin:
    """Examples of similar confidence: a point of the reliability curve.

    Args:
        confidence: mean confidence of the examples.
        accuracy: share of the examples on which the model is right.
    """

    confidence: float
    accuracy: Estimate


@dataclass(frozen=True)
class Calibration:
    """Calibration of the unchanged and of the reduced model on the same examples.

    Args:
        base: measures of the unchanged model.
        edited: measures of the reduced model.
        change: edited minus base.
        curve_base: bins of the unchanged model, the least confident first.
        curve_edited: bins of the reduced model.
    """

    base: Measures = field(metadata={"json": "before"})
    edited: Measures = field(metadata={"json": "after"})
    change: Measures
    curve_base: tuple[Bin, ...] = field(metadata={"json": "curve_before"})
    curve_edited: tuple[Bin, ...] = field(metadata={"json": "curve_after"})


def check_scorer(scorer: str) -> None:
    """Raise an error if a scorer reads neither choices nor the first token of the answer.

    Raises:
        AnalysisError: for ``perplexity``, ``lm_eval``, ``lm_eval_text``, ``program`` and ``rollout``.
    """
    if not SCORERS[scorer].is_short_answer:
        raise AnalysisError(
            f"calibration needs a choice or the first token of an answer, and scorer {scorer} reads neither. Give a model, "
            "--reduce SPEC and --scorer choice or first_token, on a task with choices or short answers such as worldfacts."
        )


def confidences(lm: LanguageModel, split: Split, batch_size: int = 32, on_progress: Progress | None = None) -> list[Confidence]:
    """Return the probability of the likeliest answer of each example, and whether that answer is right.

    Scorer ``choice``: the likeliest choice. Its probability is the softmax over the choices of their log-probabilities,
    each summed over its tokens. A tie is wrong. Any other scorer: the likeliest token at the start of the answer. It is
    right if it is the first token of the answer.

    Args:
        lm: the model, with the intervention that is applied to it at the moment.
        split: the examples, with their scorer.
        batch_size: sequences in one forward pass.
        on_progress: called with the number of sequences done and their total.

    Raises:
        AnalysisError: for a scorer that reads neither choices nor the answer that should follow.
        ScoringError: if the model takes no such sequences, or a probability is not a number.
        TokenizationError: if the tokens of an answer cannot be separated from the tokens of its prompt.
    """
    check_scorer(split.scorer)
    if not len(split):
        return []
    choosing = split.scorer == "choice"
    rows = encode(lm, split.examples, "choice" if choosing else "first_token")
    ran = zip(rows, run_rows(lm, rows, batch_size, on_progress), strict=True)
    results = []
    for i, of in groupby(ran, key=lambda pair: pair[0].example):
        e, pairs = split.examples[i], list(of)
        confidence, right = _choice(e, [outcome for _, outcome in pairs]) if choosing else _token(*pairs[0])
        if not math.isfinite(confidence):
            raise ScoringError(
                f"{lm.intervention or 'the unchanged model'} gives a probability of {confidence} on example {e.id!r}: "
                f"{overflow(lm.model, lm.dtype)}"
            )
        results.append((confidence, right))
    return results


def _choice(e: Example, outcomes: Sequence[TokenScores]) -> Confidence:
    """Return the confidence in the likeliest choice. Choices of one token share one row, longer choices have one row each."""
    totals = torch.tensor(outcomes[0].choice_logprobs or [math.fsum(o.logprobs) for o in outcomes], dtype=torch.float64)
    at_least = totals >= totals[e.choices.index(e.answer)]
    return float(totals.softmax(0).max()), int(at_least.sum()) == 1


def _token(row: TokenSequence, outcome: TokenScores) -> Confidence:
    return math.exp(outcome.best[0]), outcome.argmax[0] == row.targets[0]


def calibration(base: Sequence[Confidence], edited: Sequence[Confidence], *, bins: int = 10, seed: int = 0) -> Calibration:
    """Measure how well two models are calibrated on the same examples, taken as independent, and the change.

    The expected calibration error (ECE) is the mean over bins, weighted by their examples, of the distance between mean
    confidence and accuracy. The bins hold equal numbers of examples (within one), sorted by confidence.

    Even a perfectly calibrated model has an ECE above 0, because of sampling noise. Bootstrapping adds more noise, so plain
    bootstrap quantiles give intervals that are too high. This interval bounds what noise can have added. With g the gap of
    a bin and h its error, the bin contributes |g + h|, and

        |g| + sign(g) h  <=  |g + h|  <=  |g| + |h|,

    so the sums of both ends over the bins bound the error of the ECE. The interval takes the 2.5 % quantile of the lower sum
    and the 97.5 % quantile of the upper sum, with h from a paired bootstrap over examples. A bin whose gap is beyond two
    standard errors uses the lower end for both. In simulations the interval covers 93 % or more from 100 examples on, also
    for a perfectly calibrated model. It covers less with fewer examples if the model is hardly ever right. The interval of
    the change is wide if most bins are nearly calibrated. The change of the Brier score then says more.

    Args:
        base: confidences of the unchanged model.
        edited: confidences of the reduced model on the same examples in the same order.
        bins: number of bins; fewer where one would hold fewer than 5 examples.
        seed: of the bootstrap.

    Raises:
        AnalysisError: if there are no bins or no examples, or not as many after as before.

    Source: Naeini, Cooper and Hauskrecht, AAAI 2015 (ECE); Nguyen and O'Connor, EMNLP 2015, and Roelofs et al., AISTATS
    2022 (bins of equal mass); Brier, Monthly Weather Review 78 (1950); Fang and Santos, Review of Economic Studies 86
    (2019) (why to resample the gaps rather than their distances).
    """
    if bins < 1:
        raise AnalysisError(f"cannot put examples into {bins} bins; write 1 or more")
    if not base or len(base) != len(edited):
        raise AnalysisError(
            f"{len(base)} examples before and {len(edited)} after are no pairs; give the same ones, at least one"
        )
    first, second = sides = [_Side.of(pairs, bins) for pairs in (base, edited)]
    drawn = _resampled(sides, seed)
    (least_before, most_before), (least_after, most_after) = map(_bounds, sides, drawn)
    change = Measures(
        ece=_estimate(second.ece - first.ece, least_after - most_before, most_after - least_before, len(base)),
        brier=Estimate.mean((second.squares - first.squares).tolist()),
        confidence=Estimate.mean((second.confidence - first.confidence).tolist()),
        accuracy=Estimate.gain(first.right.tolist(), second.right.tolist()),
    )
    return Calibration(
        base=_measures(first, least_before, most_before),
        edited=_measures(second, least_after, most_after),
        change=change,
        curve_base=_curve(first),
        curve_edited=_curve(second),
    )


@dataclass(frozen=True)
class _Side:
    """The confidences of one model.

    Args:
        confidence: (n,) by example.
        right: (n,) by example.
        order: (n,) indices of the examples, the least confident first.
        starts: (bins,) index in ``order`` at which each bin starts.
    """

    confidence: NDArray[np.float64]
    right: NDArray[np.bool_]
    order: NDArray[np.intp]
    starts: NDArray[np.intp]

    @classmethod
    def of(cls, pairs: Sequence[Confidence], bins: int) -> _Side:
        confidence, right = np.array([c for c, _ in pairs], dtype=np.float64), np.array([r for _, r in pairs], dtype=np.bool_)
        sizes = [len(part) for part in np.array_split(right, max(1, min(bins, len(pairs) // MIN_BIN_EXAMPLES)))]
        return cls(confidence, right, np.argsort(confidence, kind="stable"), np.cumsum([0, *sizes[:-1]]))

    @property
    def squares(self) -> NDArray[np.float64]:
        """(n,) squared differences, by example."""
        return (self.confidence - self.right) ** 2

    @property
    def gaps(self) -> NDArray[np.float64]:
        """(bins,) mean confidence minus accuracy, times the bin's share of the examples."""
        return np.add.reduceat((self.confidence - self.right)[self.order], self.starts) / len(self.order)

    @property
    def ece(self) -> float:
        return float(np.abs(self.gaps).sum())


def _resampled(sides: Sequence[_Side], seed: int) -> list[NDArray[np.float64]]:
    """Return the gaps of each model on the same resamples of the examples, (resamples, bins) for each model."""
    n = len(sides[0].order)
    positions = [np.argsort(side.order).astype(np.int32) for side in sides]  # of the examples, by confidence
    ordered = [(side.confidence - side.right)[side.order] for side in sides]
    results: list[list[NDArray[np.float64]]] = [[] for _ in sides]
    for drawn in bootstrap(n, RESAMPLES, seed, at_once=max(1, EXAMPLES_AT_ONCE // n)):
        for side, position, gaps, resampled in zip(sides, positions, ordered, results, strict=True):
            resampled.append(np.add.reduceat(gaps[np.sort(position[drawn], axis=1)], side.starts, axis=1) / n)
    return [np.concatenate(of) for of in results]


def _bounds(side: _Side, drawn: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return lower and upper bounds of what noise adds to the ECE on each resample."""
    errors = drawn - side.gaps
    least = np.where(side.gaps < 0, -errors, errors)
    sure = np.abs(side.gaps) > SURE_STANDARD_ERRORS * errors.std(axis=0)
    return least.sum(axis=1), np.where(sure, least, np.abs(errors)).sum(axis=1)


def _estimate(value: float, least: NDArray[np.float64], most: NDArray[np.float64], n: int) -> Estimate:
    """Return a value with its interval from bounds of its noise."""
    if n == 1:
        return Estimate(value, Interval(-math.inf, math.inf), n)
    return Estimate(value, Interval(value - float(np.quantile(most, 0.975)), value - float(np.quantile(least, 0.025))), n)


def _measures(side: _Side, least: NDArray[np.float64], most: NDArray[np.float64]) -> Measures:
    n = len(side.order)
    ece = _estimate(side.ece, least, most, n)
    return Measures(
        ece=Estimate(ece.value, Interval(max(0.0, ece.interval.low), min(1.0, ece.interval.high)), n),
        brier=Estimate.mean(side.squares.tolist()),
        confidence=Estimate.mean(side.confidence.tolist()),
        accuracy=Estimate.share(int(side.right.sum()), n),
    )


def _curve(side: _Side) -> tuple[Bin, ...]:
    return tuple(
        Bin(float(side.confidence[of].mean()), Estimate.share(int(side.right[of].sum()), len(of)))
        for of in np.split(side.order, side.starts[1:])
    )
