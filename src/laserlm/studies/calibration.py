"""Whether a model is right as often as the probability that it gives to what it puts first, before and after."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from laserlm.errors import AnalysisError, ScoringError
from laserlm.models.language_model import LanguageModel
from laserlm.scoring.forward import Progress, TokenScores, run_rows
from laserlm.scoring.statistics import Interval
from laserlm.scoring.tokenize import TokenSequence, encode
from laserlm.studies.estimates import Estimate
from laserlm.tasks import Example, Split

__all__ = ["Bin", "Calibration", "Confidence", "Measures", "calibration", "check_scorer", "confidences"]

Confidence = tuple[float, bool]
"""The probability that a model gives to what it puts first on an example, and whether that is right."""
FEWEST = 5
"""Examples of a bin at least."""
SURE = 2.0
"""Standard errors beyond which a bin's confidence is surely too high, or too low."""
RESAMPLES = 2000
"""Sets of examples that the bootstrap draws."""
DRAWN = 2_000_000
"""Examples that it draws at once, which bounds the memory."""


@dataclass(frozen=True)
class Measures:
    """How well one model is calibrated, or how much larger each measure is after than before, pair by pair.

    Args:
        ece: expected calibration error.
        brier: mean of the squared difference between the confidence and 1 where it is right, 0 where it is wrong.
        confidence: mean confidence.
        accuracy: share of examples on which what the model puts first is right.
    """

    ece: Estimate
    brier: Estimate
    confidence: Estimate
    accuracy: Estimate

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON values."""
        return {name: getattr(self, name).as_dict() for name in ("ece", "brier", "confidence", "accuracy")}


@dataclass(frozen=True)
class Bin:
    """Examples of similar confidence: a point of the reliability curve.

    Args:
        confidence: their mean confidence.
        accuracy: share of them on which the model is right.
    """

    confidence: float
    accuracy: Estimate

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON values."""
        return {"confidence": self.confidence, "accuracy": self.accuracy.as_dict()}


@dataclass(frozen=True)
class Calibration:
    """How well the unchanged and the reduced model are calibrated on the same examples.

    Args:
        before: of the unchanged model.
        after: of the reduced one.
        change: from the one to the other.
        curve_before: bins of the unchanged model, the least confident first.
        curve_after: likewise of the reduced one.
    """

    before: Measures
    after: Measures
    change: Measures
    curve_before: tuple[Bin, ...]
    curve_after: tuple[Bin, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON values."""
        return {
            "before": self.before.as_dict(),
            "after": self.after.as_dict(),
            "change": self.change.as_dict(),
            "curve_before": [b.as_dict() for b in self.curve_before],
            "curve_after": [b.as_dict() for b in self.curve_after],
        }


def check_scorer(scorer: str) -> None:
    """Raise an error for a scorer that reads neither choices nor the answer that should follow.

    Raises:
        AnalysisError: for ``perplexity``, ``lm_eval``, ``lm_eval_text``, ``program`` and ``rollout``.
    """
    if scorer in ("perplexity", "lm_eval", "lm_eval_text", "program", "rollout"):
        raise AnalysisError(
            f"calibration is of a choice or of an answer's first token, and {scorer} reads neither; give a model, "
            "--reduce SPEC and --scorer choice or first_token, on a task with choices or short answers such as worldfacts"
        )


def confidences(lm: LanguageModel, split: Split, batch_size: int = 32, on_progress: Progress | None = None) -> list[Confidence]:
    """Return for each example the probability that a model gives to what it puts first, and whether that is right.

    With scorer ``choice`` that is the likeliest choice: its probability is the softmax over the choices of their
    log-probabilities, each summed over its tokens, and a tie is wrong. With any other scorer it is the likeliest token where
    the answer begins, which is right if it is the answer's first, as scorer ``first_token`` has it.

    Args:
        lm: the model, under whatever intervention is applied at the moment.
        split: the examples, with their scorer.
        batch_size: sequences in one forward pass.
        on_progress: called with the number of sequences done and their total.

    Raises:
        AnalysisError: for a scorer that reads neither choices nor the answer that should follow.
        ScoringError: if the model takes no such sequences, or a probability is not a number.
        TokenizationError: if an answer's tokens cannot be told from its prompt's.
    """
    check_scorer(split.scorer)
    if not len(split):
        return []
    choosing = split.scorer == "choice"
    rows = encode(lm, split.examples, "choice" if choosing else "first_token")
    ran = zip(rows, run_rows(lm, rows, batch_size, on_progress), strict=True)
    found = []
    for i, of in groupby(ran, key=lambda pair: pair[0].example):
        e, pairs = split.examples[i], list(of)
        confidence, right = _choice(e, [outcome for _, outcome in pairs]) if choosing else _token(*pairs[0])
        if not math.isfinite(confidence):
            raise ScoringError(
                f"{lm.intervention or 'the unchanged model'} gives a probability of {confidence} on example {e.id!r}; "
                "the model overflows its dtype: load it with dtype float32 or bfloat16"
            )
        found.append((confidence, right))
    return found


def _choice(e: Example, outcomes: Sequence[TokenScores]) -> Confidence:
    """Return the confidence in the likeliest choice; choices of one token are read off one row, others have one each."""
    totals = torch.tensor(outcomes[0].options or [math.fsum(o.logprobs) for o in outcomes], dtype=torch.float64)
    at_least = totals >= totals[e.choices.index(e.answer)]
    return float(totals.softmax(0).max()), int(at_least.sum()) == 1


def _token(row: TokenSequence, outcome: TokenScores) -> Confidence:
    return math.exp(outcome.best[0]), outcome.argmax[0] == row.targets[0]


def calibration(before: Sequence[Confidence], after: Sequence[Confidence], *, bins: int = 10, seed: int = 0) -> Calibration:
    """Measure how well two models are calibrated on the same examples, taken as independent, and the change.

    The expected calibration error (ECE) is the mean over bins, weighted by their examples, of the distance between mean
    confidence and accuracy. Every bin of a model holds as many examples, up to one, in the order of its confidence; equal
    ones are in the order of the examples.

    Noise alone makes an ECE larger: that of a perfectly calibrated model is above 0 on any finite number of examples, and
    a resample's is larger once more, so that no quantiles of resampled ECEs give an interval that holds its level. Here
    the interval is of what noise can have added. With g the gap of a bin and h its error, the bin's part g + h counts as

        |g| + sign(g) h  <=  |g + h|  <=  |g| + |h|,

    so the sums over the bins of the two ends bound the error of the ECE. The interval takes the 2.5 % quantile of the
    lower and the 97.5 % quantile of the upper sum, with the h of a paired bootstrap over examples; for a bin whose gap is
    beyond two standard errors the lower end stands for both. In simulations it covers 93 % or more from 100 examples on,
    also for a perfectly calibrated model; with fewer, less where the model is hardly ever right. Where most bins are nearly
    calibrated, that of the change covers almost always and is wide: the change of the Brier score tells more.

    Args:
        before: confidences of the unchanged model.
        after: of the reduced one, on the same examples in the same order.
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
    if not before or len(before) != len(after):
        raise AnalysisError(
            f"{len(before)} examples before and {len(after)} after are no pairs; give the same ones, at least one"
        )
    first, second = sides = [_Side.of(given, bins) for given in (before, after)]
    drawn = _resampled(sides, seed)
    (least_before, most_before), (least_after, most_after) = map(_bounds, sides, drawn)
    change = Measures(
        ece=_estimate(second.ece - first.ece, least_after - most_before, most_after - least_before, len(before)),
        brier=Estimate.mean((second.squares - first.squares).tolist()),
        confidence=Estimate.mean((second.confidence - first.confidence).tolist()),
        accuracy=Estimate.gain(first.right.tolist(), second.right.tolist()),
    )
    return Calibration(
        before=_measures(first, least_before, most_before),
        after=_measures(second, least_after, most_after),
        change=change,
        curve_before=_curve(first),
        curve_after=_curve(second),
    )


@dataclass(frozen=True)
class _Side:
    """The confidences of one model.

    Args:
        confidence: (n,) by example.
        right: (n,) likewise.
        order: (n,) indices of the examples, the least confident first.
        starts: (bins,) where each bin starts in that order.
    """

    confidence: NDArray[np.float64]
    right: NDArray[np.bool_]
    order: NDArray[np.intp]
    starts: NDArray[np.intp]

    @classmethod
    def of(cls, given: Sequence[Confidence], bins: int) -> _Side:
        confidence, right = np.array([c for c, _ in given], dtype=np.float64), np.array([r for _, r in given], dtype=np.bool_)
        sizes = [len(part) for part in np.array_split(right, max(1, min(bins, len(given) // FEWEST)))]
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
    """Return the gaps of each model on resamples of the examples, the same for both; (resamples, bins) each."""
    n = len(sides[0].order)
    generator = np.random.default_rng(seed)
    places = [np.argsort(side.order).astype(np.int32) for side in sides]  # of the examples, in the order of confidence
    ordered = [(side.confidence - side.right)[side.order] for side in sides]
    found: list[list[NDArray[np.float64]]] = [[] for _ in sides]
    at_once = max(1, DRAWN // n)
    for first in range(0, RESAMPLES, at_once):
        drawn = generator.integers(n, size=(min(at_once, RESAMPLES - first), n), dtype=np.int32)
        for side, place, gaps, of in zip(sides, places, ordered, found, strict=True):
            of.append(np.add.reduceat(gaps[np.sort(place[drawn], axis=1)], side.starts, axis=1) / n)
    return [np.concatenate(of) for of in found]


def _bounds(side: _Side, drawn: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return what noise adds to the ECE on each resample, at least and at most."""
    errors = drawn - side.gaps
    least = np.where(side.gaps < 0, -errors, errors)
    sure = np.abs(side.gaps) > SURE * errors.std(axis=0)
    return least.sum(axis=1), np.where(sure, least, np.abs(errors)).sum(axis=1)


def _estimate(value: float, least: NDArray[np.float64], most: NDArray[np.float64], n: int) -> Estimate:
    """Return a value with the interval that noise between two bounds leaves."""
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
