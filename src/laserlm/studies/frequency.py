"""The gain of a reduction against how often facts occur."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from laserlm.errors import AnalysisError
from laserlm.scoring.evaluate import compare
from laserlm.scoring.records import Evaluation
from laserlm.scoring.statistics import Interval
from laserlm.studies.estimates import FEW, Estimate
from laserlm.tasks import Example

__all__ = ["ExampleFrequency", "Frequency", "Part", "frequency", "popularity"]

RESAMPLES = 2000
INFINITE = Interval(-math.inf, math.inf)


@dataclass(frozen=True)
class ExampleFrequency:
    """One example, and how often its fact occurs.

    Args:
        id: the example's id.
        fact: what examples share that phrase one fact.
        frequency: how often it occurs.
        before: whether the unchanged model is right.
        after: whether the reduced model is.
        loss_before: log-loss of the answer in nats per token.
        loss_after: likewise.
    """

    id: str
    fact: str
    frequency: float
    before: bool
    after: bool
    loss_before: float
    loss_after: float


@dataclass(frozen=True)
class Part:
    """What happened to the examples whose facts occur so often.

    Args:
        low: the least frequency among them; NaN where there are none.
        high: the greatest.
        before: accuracy of the unchanged model.
        after: accuracy of the reduced model.
        gain: the second minus the first.
        loss: mean change of the log-loss, in nats per token; below 0 is better.
    """

    low: float
    high: float
    before: Estimate
    after: Estimate
    gain: Estimate
    loss: Estimate

    @property
    def n(self) -> int:
        """Number of examples."""
        return self.gain.n

    @property
    def few(self) -> bool:
        """Whether there are too few examples to say anything."""
        return self.gain.few

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON values."""
        estimates = {name: getattr(self, name).as_dict() for name in ("before", "after", "gain", "loss")}
        ends = (None if math.isnan(x) else x for x in (self.low, self.high))
        return dict(zip(("low", "high"), ends, strict=True)) | {"n": self.n, "few": self.few} | estimates


@dataclass(frozen=True)
class Frequency:
    """The gain of a reduction by how often facts occur.

    The intervals of the correlations and of the difference come of a bootstrap over facts, whose phrasings are not
    independent. They are infinite where fewer than five facts have another frequency, half or change than most, and where no
    resample differs from another. Those of the bins and of the halves are over examples.

    Args:
        bins: examples by frequency, the rarest first.
        cumulative: all examples whose facts occur at most as often as those of each bin.
        rare: the half of the examples whose facts occur least often.
        frequent: the other half.
        difference: gain of the rarer half minus that of the other.
        correctness: Spearman's rank correlation of the frequency with the change of correctness (after minus before).
        loss: likewise with the fall of the loss (before minus after); below 0, what is rare gains most, as above.
        facts: number of facts.
        without: number of examples whose frequency is not known.
        examples: those with one.
    """

    bins: tuple[Part, ...]
    cumulative: tuple[Part, ...]
    rare: Part
    frequent: Part
    difference: Estimate
    correctness: Estimate
    loss: Estimate
    facts: int
    without: int
    examples: tuple[ExampleFrequency, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON values."""
        return {
            "facts": self.facts,
            "without": self.without,
            "correctness": self.correctness.as_dict(),
            "loss": self.loss.as_dict(),
            "difference": self.difference.as_dict(),
            "rare": self.rare.as_dict(),
            "frequent": self.frequent.as_dict(),
            "bins": [part.as_dict() for part in self.bins],
            "cumulative": [part.as_dict() for part in self.cumulative],
            "examples": [asdict(e) for e in self.examples],
        }


def popularity(examples: Sequence[Example]) -> dict[str, float]:
    """Return how widely each fact is known, by the example's id, on the task's own scale.

    Raises:
        AnalysisError: if no example tells it.
    """
    found = {e.id: e.popularity for e in examples if e.popularity is not None}
    if not found:
        raise AnalysisError(
            "no example tells how widely its fact is known; count it in a text with --corpus, or give the field 'popularity' "
            "in your own questions (jsonl:FILE)"
        )
    return found


def frequency(
    base: Evaluation,
    edited: Evaluation,
    examples: Sequence[Example],
    how_often: Mapping[str, float],
    *,
    bins: int = 5,
    seed: int = 0,
) -> Frequency:
    """Set what a reduction gains against how often facts occur.

    Args:
        base: of the unchanged model.
        edited: of the reduced model, on the same examples.
        examples: those, in the order of the scores or more of them.
        how_often: by the example's id; those that are not in it, or not finite, are counted and left out.
        bins: number of bins with as equal numbers of examples as can be without parting equal frequencies, where there are so
            many; 0, where it is the least frequency, is a bin by itself besides.
        seed: of the bootstrap.

    Raises:
        ScoringError: if the two cannot be compared.
        AnalysisError: if an example is missing, no example has a frequency, or there is no bin.
    """
    compare(base, edited)
    if bins < 1:
        raise AnalysisError(f"{bins} bins hold nothing; write 1 or more")
    by_id = {e.id: e for e in examples}
    missing = [s.id for s in base.scores if s.id not in by_id]
    if missing:
        raise AnalysisError(f"the task has no example {missing[0]!r} that was scored; give the data and options of that search")
    found = tuple(
        ExampleFrequency(b.id, by_id[b.id].fact, float(how_often[b.id]), b.correct, e.correct, b.loss, e.loss)
        for b, e in zip(base.scores, edited.scores, strict=True)
        if math.isfinite(how_often.get(b.id, math.nan))
    )
    if not found:
        raise AnalysisError(f"none of the {base.n} examples that were scored has a frequency; give one by their ids")
    x = np.array([e.frequency for e in found])
    zero = x == 0 if x.min() == 0 else np.zeros(len(x), dtype=bool)
    places = np.zeros(len(x), dtype=int)
    places[~zero] = 1 + _quantiles(x[~zero], bins)
    parts = [_part([e for e, p in zip(found, places, strict=True) if p == place]) for place in np.unique(places)]
    rare = _quantiles(x, 2) == 0
    facts = np.unique([f"fact {e.fact}" if e.fact else f"example {e.id}" for e in found], return_inverse=True)[1]
    change = np.array([float(e.after) - float(e.before) for e in found])
    fall = np.array([e.loss_before - e.loss_after for e in found])
    ranked = [np.unique(values, return_inverse=True)[1] for values in (x, change, fall)]
    statistics: list[tuple[Callable[[Any], float], Any, Any]] = [
        (lambda weights: _spearman(ranked[0], ranked[1], weights), ranked[0], ranked[1]),
        (lambda weights: _spearman(ranked[0], ranked[2], weights), ranked[0], ranked[2]),
        (lambda weights: _mean(change, weights * rare) - _mean(change, weights * ~rare), rare.astype(int), ranked[1]),
    ]
    told = [min(_differing(values, facts) for values in of) >= FEW for _, *of in statistics]
    correctness, loss, difference = _estimates([statistic for statistic, *_ in statistics], told, facts, seed)
    return Frequency(
        bins=tuple(parts),
        cumulative=tuple(_part([e for e in found if e.frequency <= part.high]) for part in parts),
        rare=_part([e for e, of in zip(found, rare, strict=True) if of]),
        frequent=_part([e for e, of in zip(found, rare, strict=True) if not of]),
        difference=difference,
        correctness=correctness,
        loss=loss,
        facts=len(set(facts)),
        without=base.n - len(found),
        examples=found,
    )


def _quantiles(x: Any, n: int) -> Any:
    """Return which of n parts of equal numbers each value is in: the one that the middle of all that equal it falls in."""
    _, places, counts = np.unique(x, return_inverse=True, return_counts=True)
    doubled = 2 * np.cumsum(counts) - counts
    return (n * doubled // max(2 * len(x), 1))[places]


def _part(found: Sequence[ExampleFrequency]) -> Part:
    before, after = [e.before for e in found], [e.after for e in found]
    return Part(
        low=min((e.frequency for e in found), default=math.nan),
        high=max((e.frequency for e in found), default=math.nan),
        before=Estimate.share(sum(before), len(found)),
        after=Estimate.share(sum(after), len(found)),
        gain=Estimate.gain(before, after),
        loss=Estimate.mean([e.loss_after - e.loss_before for e in found]),
    )


def _differing(places: Any, facts: Any) -> int:
    """Return the number of facts with another value than the most frequent one."""
    return len(set(facts[places != np.bincount(places).argmax()]))


def _estimates(statistics: Sequence[Callable[[Any], float]], told: Sequence[bool], facts: Any, seed: int) -> list[Estimate]:
    """Return statistics of weighted examples, each with its 95 % interval over resampled facts where they tell one."""
    n = int(facts.max()) + 1
    source = np.random.default_rng(seed)
    again = []
    for _ in range(RESAMPLES if any(told) else 0):
        weights = np.bincount(source.integers(n, size=n), minlength=n)[facts].astype(float)
        again.append([statistic(weights) for statistic in statistics])
    columns = np.array(again).reshape(-1, len(statistics)).T
    values = [statistic(np.ones(len(facts))) for statistic in statistics]
    intervals = [_interval(column) if enough else INFINITE for column, enough in zip(columns, told, strict=True)]
    return [Estimate(value, interval, len(facts)) for value, interval in zip(values, intervals, strict=True)]


def _interval(again: Any) -> Interval:
    known = again[np.isfinite(again)]
    if not len(known) or np.ptp(known) == 0:
        return INFINITE
    low, high = np.quantile(known, [0.025, 0.975])
    return Interval(float(low), float(high))


def _mean(values: Any, weights: Any) -> float:
    total = float(weights.sum())
    return float(weights @ values) / total if total > 0 else math.nan


def _spearman(x: Any, y: Any, weights: Any) -> float:
    """Return the rank correlation of two lists of places, each pair as many times as it weighs; NaN where one is constant."""
    middle = (float(weights.sum()) + 1) / 2
    a, b = _ranks(x, weights) - middle, _ranks(y, weights) - middle
    norm = math.sqrt(float(weights @ (a * a)) * float(weights @ (b * b)))
    return float(weights @ (a * b)) / norm if norm > 0 else math.nan


def _ranks(places: Any, weights: Any) -> Any:
    """Return mean ranks, given each value's place among the different ones."""
    mass = np.bincount(places, weights)
    return (np.cumsum(mass) - (mass - 1) / 2)[places]
