"""An estimate with its interval and the number of examples it is over: what every study gives."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from laserlm.scoring.evaluate import compare
from laserlm.scoring.records import Evaluation
from laserlm.scoring.statistics import Interval, paired_difference, paired_mean, wilson

__all__ = ["FEW", "Estimate", "paired_estimates"]

FEW = 5
"""Examples below which an estimate says nothing by itself."""


@dataclass(frozen=True)
class Estimate:
    """A share, a mean or a difference.

    Args:
        value: the estimate; NaN over no examples.
        interval: its 95 % interval; infinite over a single one, where it is a mean.
        n: number of examples.
    """

    value: float
    interval: Interval
    n: int

    @classmethod
    def share(cls, count: int, n: int) -> Estimate:
        """Return ``count / n`` with its Wilson interval."""
        return cls(count / n, wilson(count, n), n) if n else cls.none()

    @classmethod
    def mean(cls, values: Sequence[float]) -> Estimate:
        """Return a mean, or a mean of paired differences, with Student's interval."""
        return cls(math.fsum(values) / len(values), paired_mean(values), len(values)) if values else cls.none()

    @classmethod
    def gain(cls, before: Sequence[bool], after: Sequence[bool]) -> Estimate:
        """Return how much larger the share of the second is, with Tango's paired interval."""
        corrected = sum(a > b for b, a in zip(before, after, strict=True))
        broken = sum(a < b for b, a in zip(before, after, strict=True))
        n = len(before)
        return cls((corrected - broken) / n, paired_difference(corrected, broken, n), n) if n else cls.none()

    @classmethod
    def none(cls) -> Estimate:
        """Return an estimate over no examples."""
        return cls(math.nan, Interval(-math.inf, math.inf), 0)

    @property
    def few(self) -> bool:
        """Whether it is over too few examples to say anything."""
        return self.n < FEW

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON values; what is not a number is None."""
        ends = list(self.interval) if all(map(math.isfinite, self.interval)) else None
        return {"value": self.value if math.isfinite(self.value) else None, "interval": ends, "n": self.n}

    def as_row(self, name: str) -> dict[str, Any]:
        """Return the columns of a table: the value under a name, the ends of its interval and n beside it."""
        values = self.as_dict()
        low, high = values["interval"] or (None, None)
        return {name: values["value"], f"{name} low": low, f"{name} high": high, f"{name} n": self.n}

    def __str__(self) -> str:
        if not self.n:
            return ""
        if math.isinf(self.interval.low):
            return f"{self.value:.3g} (few)"
        return f"{self.value:.3g} [{self.interval.low:.3g}, {self.interval.high:.3g}]" + (" (few)" if self.few else "")

    def percent(self) -> str:
        """Return the share and its interval as text, in per cent."""
        if not self.n:
            return "unknown (no examples)"
        few = ", few" if self.few else ""
        return f"{self.value:.1%} [{self.interval.low:.1%}, {self.interval.high:.1%}] (n {self.n}{few})"


def paired_estimates(base: Evaluation, found: Evaluation) -> tuple[Estimate, Estimate]:
    """Return the gain in accuracy and the change of loss (nats per answer token) from one evaluation to another, paired.

    Raises:
        ScoringError: if the two cannot be compared.
    """
    c = compare(base, found)
    return Estimate(c.gain, c.interval, c.n), Estimate(c.edited_loss - c.base_loss, c.loss_interval, c.n)
