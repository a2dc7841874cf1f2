"""The gain of a reduction against how often facts occur."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from laserlm.errors import AnalysisError
from laserlm.jsonable import fields_to_json
from laserlm.scoring.evaluate import compare
from laserlm.scoring.records import Evaluation
from laserlm.scoring.statistics import Interval, bootstrap, dense_ranks, percentile_interval, spearman
from laserlm.studies.estimates import MIN_EXAMPLES, Estimate, examples_of
from laserlm.tasks import Example

RESAMPLES = 2000
INFINITE = Interval(-math.inf, math.inf)


@dataclass(frozen=True)
class ExampleFrequency:
    """One example and the frequency of its fact.

    Args:
        id: the example's id.
        fact: key that the phrasings of one fact share.
        frequency: how often the fact occurs.
        base_correct: whether the unchanged model is right.
        edited_correct: whether the reduced model is.
        base_loss: log-loss of the answer under the unchanged model, in nats per token.
        edited_loss: log-loss of the answer under the reduced model.
    """

    id: str
    fact: str
    frequency: float
    base_correct: bool = field(metadata={"json": "before"})
    edited_correct: bool = field(metadata={"json": "after"})
    base_loss: float = field(metadata={"json": "loss_before"})
    edited_loss: float = field(metadata={"json": "loss_after"})


@dataclass(frozen=True)
class FrequencyBin:
    """The examples whose facts occur with similar frequency.

    Args:
        low: the lowest frequency; NaN if there are no examples.
        high: the highest frequency.
        base: accuracy of the unchanged model.
        edited: accuracy of the reduced model.
        gain: edited minus base.
        loss: mean change of the log-loss, in nats per token; below 0 is better.
    """

    low: float
    high: float
    base: Estimate = field(metadata={"json": "before"})
    edited: Estimate = field(metadata={"json": "after"})
    gain: Estimate
    loss: Estimate

    @property
    def n(self) -> int:
        """Number of examples."""
        return self.gain.n

    @property
    def is_small(self) -> bool:
        """Whether there are too few examples to say anything."""
        return self.gain.is_small

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON values."""
        return fields_to_json(self) | {"n": self.n, "few": self.is_small}


@dataclass(frozen=True)
class Frequency:
    """The gain of a reduction by the frequency of facts.

    The intervals of the correlations and of the difference come from a bootstrap over facts, because the phrasings of one
    fact are not independent. Such an interval is infinite if fewer than five facts have another value than the most frequent
    one (of frequency, half or change), or if all resamples agree. The intervals of the bins and halves take
    the variance between facts.

    Args:
        bins: examples by frequency, the rarest first.
        cumulative: for each bin, all examples up to its highest frequency.
        rare: the half of the examples whose facts occur least often.
        frequent: the other half.
        difference: gain of the rare half minus gain of the frequent half.
        correctness: Spearman's correlation of the frequency with the change of correctness (after minus before). Below 0, rare
            facts gain most.
        loss: Spearman's correlation of the frequency with the fall of the loss (before minus after).
        facts: number of facts.
        without: number of examples of unknown frequency.
        examples: the examples of known frequency.
    """

    bins: tuple[FrequencyBin, ...]
    cumulative: tuple[FrequencyBin, ...]
    rare: FrequencyBin
    frequent: FrequencyBin
    difference: Estimate
    correctness: Estimate
    loss: Estimate
    facts: int
    without: int
    examples: tuple[ExampleFrequency, ...]


def popularity(examples: Sequence[Example]) -> dict[str, float]:
    """Return the popularity of each fact on the scale of the task, by the id of the example.

    Raises:
        AnalysisError: if no example has a popularity.
    """
    known = {e.id: e.popularity for e in examples if e.popularity is not None}
    if not known:
        raise AnalysisError(
            "no example has a popularity. Count mentions in a text with --corpus, or give the field 'popularity' in your own "
            "questions (jsonl:FILE)."
        )
    return known


def frequency(
    base: Evaluation,
    edited: Evaluation,
    examples: Sequence[Example],
    how_often: Mapping[str, float],
    *,
    bins: int = 5,
    seed: int = 0,
) -> Frequency:
    """Compare the gain of a reduction with the frequency of facts.

    Args:
        base: scores of the unchanged model.
        edited: scores of the reduced model on the same examples.
        examples: the scored examples, or more of them.
        how_often: frequency by the id of the example. Examples without a finite one are counted and left out.
        bins: number of quantile bins. Examples of equal frequency stay in one bin. Frequency 0 gets an extra bin.
        seed: of the bootstrap.

    Raises:
        ScoringError: if the two cannot be compared.
        AnalysisError: if an example is missing, no example has a frequency, or there is no bin.
    """
    if bins < 1:
        raise AnalysisError(f"cannot make {bins} bins; write 1 or more")
    rows = _join(base, edited, examples, how_often)
    x = np.array([row.frequency for row in rows])
    bin_of = np.zeros(len(x), dtype=int)
    occurs = x > 0 if x.min() == 0 else np.ones(len(x), dtype=bool)
    bin_of[occurs] = 1 + _quantiles(x[occurs], bins)
    parts = [_bin([row for row, b in zip(rows, bin_of, strict=True) if b == index]) for index in np.unique(bin_of)]
    is_rare = _quantiles(x, 2) == 0
    correctness, loss, difference, facts = _dependence(rows, x, is_rare, seed)
    return Frequency(
        bins=tuple(parts),
        cumulative=tuple(_bin([row for row in rows if row.frequency <= part.high]) for part in parts),
        rare=_bin([row for row, rare in zip(rows, is_rare, strict=True) if rare]),
        frequent=_bin([row for row, rare in zip(rows, is_rare, strict=True) if not rare]),
        difference=difference,
        correctness=correctness,
        loss=loss,
        facts=facts,
        without=base.n - len(rows),
        examples=rows,
    )


def _join(
    base: Evaluation, edited: Evaluation, examples: Sequence[Example], how_often: Mapping[str, float]
) -> tuple[ExampleFrequency, ...]:
    """Return the scored examples that have a frequency, each with its frequency and both scores."""
    compare(base, edited)
    by_id = examples_of(base, examples)
    rows = tuple(
        ExampleFrequency(b.id, by_id[b.id].fact, float(how_often[b.id]), b.correct, e.correct, b.loss, e.loss)
        for b, e in zip(base.scores, edited.scores, strict=True)
        if math.isfinite(how_often.get(b.id, math.nan))
    )
    if not rows:
        raise AnalysisError(f"none of the {base.n} examples that were scored has a frequency; give one by their ids")
    return rows


def _dependence(rows: Sequence[ExampleFrequency], x: Any, is_rare: Any, seed: int) -> tuple[Estimate, Estimate, Estimate, int]:
    """Return the correlations with correctness and with loss, the gain of the rare half over the other, and the facts."""
    facts = dense_ranks([f"fact {row.fact}" if row.fact else f"example {row.id}" for row in rows])
    change = np.array([float(row.edited_correct) - float(row.base_correct) for row in rows])
    fall = np.array([row.base_loss - row.edited_loss for row in rows])
    ranks, change_ranks, fall_ranks = (dense_ranks(values) for values in (x, change, fall))
    statistics: list[tuple[Callable[[Any], float], Any, Any]] = [
        (lambda weights: spearman(ranks, change_ranks, weights), ranks, change_ranks),
        (lambda weights: spearman(ranks, fall_ranks, weights), ranks, fall_ranks),
        (
            lambda weights: _mean(change, weights * is_rare) - _mean(change, weights * ~is_rare),
            is_rare.astype(int),
            change_ranks,
        ),
    ]
    has_enough = [min(_differing(values, facts) for values in of) >= MIN_EXAMPLES for _, *of in statistics]
    correctness, loss, difference = _estimates([statistic for statistic, *_ in statistics], has_enough, facts, seed)
    return correctness, loss, difference, len(set(facts))


def _quantiles(x: Any, n: int) -> Any:
    """Return the quantile (of n) of each value. Equal values share the quantile of their middle."""
    _, ranks, counts = np.unique(x, return_inverse=True, return_counts=True)
    doubled = 2 * np.cumsum(counts) - counts
    return (n * doubled // max(2 * len(x), 1))[ranks]


def _bin(rows: Sequence[ExampleFrequency]) -> FrequencyBin:
    base, edited = [e.base_correct for e in rows], [e.edited_correct for e in rows]
    facts = [e.fact or e.id for e in rows]
    return FrequencyBin(
        low=min((e.frequency for e in rows), default=math.nan),
        high=max((e.frequency for e in rows), default=math.nan),
        base=Estimate.share_by_fact(base, facts),
        edited=Estimate.share_by_fact(edited, facts),
        gain=Estimate.gain(base, edited, facts),
        loss=Estimate.mean([e.edited_loss - e.base_loss for e in rows], facts),
    )


def _differing(ranks: Any, facts: Any) -> int:
    """Return the number of facts with another value than the most frequent one."""
    return len(set(facts[ranks != np.bincount(ranks).argmax()]))


def _estimates(
    statistics: Sequence[Callable[[Any], float]], has_enough: Sequence[bool], facts: Any, seed: int
) -> list[Estimate]:
    """Return statistics of weighted examples, each with its 95 % interval over resampled facts where they give one."""
    n = int(facts.max()) + 1
    again = []
    for (drawn,) in bootstrap(n, RESAMPLES if any(has_enough) else 0, seed):
        weights = np.bincount(drawn, minlength=n)[facts].astype(float)
        again.append([statistic(weights) for statistic in statistics])
    columns = np.array(again).reshape(-1, len(statistics)).T
    values = [statistic(np.ones(len(facts))) for statistic in statistics]
    intervals = [_interval(column) if enough else INFINITE for column, enough in zip(columns, has_enough, strict=True)]
    return [Estimate(value, interval, len(facts)) for value, interval in zip(values, intervals, strict=True)]


def _interval(statistics: Any) -> Interval:
    known = statistics[np.isfinite(statistics)]
    return percentile_interval(known) if len(known) and np.ptp(known) > 0 else INFINITE


def _mean(values: Any, weights: Any) -> float:
    total = float(weights.sum())
    return float(weights @ values) / total if total > 0 else math.nan
