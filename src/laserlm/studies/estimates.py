"""An estimate with its 95 % interval and its number of examples."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from laserlm.errors import AnalysisError
from laserlm.jsonable import to_json
from laserlm.scoring.evaluate import compare
from laserlm.scoring.records import Evaluation
from laserlm.scoring.statistics import Interval, clustering_of, paired_difference, paired_mean, wilson
from laserlm.tasks import Example

ROUNDING_ERROR = 1e-12
"""Size below which an estimate of scores is zero up to rounding."""
MIN_EXAMPLES = 5
"""Number of examples below which an estimate is marked as having too few."""


@dataclass(frozen=True)
class Estimate:
    """A share, a mean or a difference.

    Args:
        value: the estimate; NaN over no examples.
        interval: 95 % interval; infinite for a mean over a single example.
        n: number of examples.
    """

    value: float
    interval: Interval
    n: int

    @classmethod
    def share(cls, count: int, n: int) -> Estimate:
        """Return ``count / n`` with its Wilson interval."""
        return cls(count / n, wilson(count, n), n) if n else cls.empty()

    @classmethod
    def share_by_fact(cls, flags: Sequence[bool], facts: Sequence[Hashable]) -> Estimate:
        """Return the share of questions that have something, with Wilson's interval by the variance between their facts."""
        if not flags:
            return cls.empty()
        count, n = sum(flags), len(flags)
        return cls(count / n, wilson(count, n, clustering=clustering_of(flags, facts)), n)

    @classmethod
    def mean(cls, values: Sequence[float], facts: Sequence[Hashable] | None = None) -> Estimate:
        """Return a mean, or a mean of paired differences, with Student's interval, between facts if there are any."""
        return cls(math.fsum(values) / len(values), paired_mean(values, facts=facts), len(values)) if values else cls.empty()

    @classmethod
    def gain(cls, base: Sequence[bool], edited: Sequence[bool], facts: Sequence[Hashable] | None = None) -> Estimate:
        """Return the paired gain in the share of the second, with Tango's interval, between facts if there are any."""
        differences = [e - b for b, e in zip(base, edited, strict=True)]
        corrected, broken, n = differences.count(1), differences.count(-1), len(differences)
        if not n:
            return cls.empty()
        clustering = None if facts is None else clustering_of(differences, facts)
        return cls((corrected - broken) / n, paired_difference(corrected, broken, n, clustering=clustering), n)

    @classmethod
    def empty(cls) -> Estimate:
        """Return an estimate over no examples."""
        return cls(math.nan, Interval(-math.inf, math.inf), 0)

    @property
    def is_small(self) -> bool:
        """Whether there are too few examples to say anything."""
        return self.n < MIN_EXAMPLES

    def as_row(self, name: str) -> dict[str, Any]:
        """Return the columns of a table: the value, both ends of the interval, and n."""
        values = to_json(self)
        low, high = values["interval"] or (None, None)
        return {name: values["value"], f"{name} low": low, f"{name} high": high, f"{name} n": self.n}

    def __str__(self) -> str:
        if not self.n:
            return ""
        if math.isinf(self.interval.low):
            return f"{short(self.value)} (few)"
        few = " (few)" if self.is_small else ""
        return f"{short(self.value)} [{short(self.interval.low)}, {short(self.interval.high)}]{few}"

    def percent(self) -> str:
        """Return the share and its interval in per cent, as text."""
        if not self.n:
            return "unknown (no examples)"
        few = ", few" if self.is_small else ""
        return f"{self.value:.1%} [{self.interval.low:.1%}, {self.interval.high:.1%}] (n {self.n}{few})"


def short(value: float) -> str:
    """Return a figure with three digits; what is zero up to rounding is 0."""
    return f"{0.0 if abs(value) < ROUNDING_ERROR else value:.3g}"


def paired_estimates(base: Evaluation, edited: Evaluation) -> tuple[Estimate, Estimate]:
    """Return the gain in accuracy and the change of loss (nats per answer token) from one evaluation to another, paired.

    Raises:
        ScoringError: if the two cannot be compared.
    """
    c = compare(base, edited)
    return Estimate(c.gain, c.interval, c.n), Estimate(c.edited_loss - c.base_loss, c.loss_interval, c.n)


def examples_of(scored: Evaluation, examples: Sequence[Example]) -> dict[str, Example]:
    """Return examples by id.

    Raises:
        AnalysisError: if an example that was scored is missing.
    """
    by_id = {e.id: e for e in examples}
    missing = [score.id for score in scored.scores if score.id not in by_id]
    if missing:
        raise AnalysisError(f"the task has no example {missing[0]!r} that was scored; give the data and options of that search")
    return by_id
