"""What an evaluation returns: one score for each example, and the figures over all of them."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from laserlm.errors import ScoringError
from laserlm.scoring.statistics import Interval, wilson

__all__ = ["Evaluation", "ExampleScore"]


@dataclass(frozen=True)
class ExampleScore:
    """How the model did on one example.

    Args:
        id: the example's id.
        correct: whether the prediction is right under the scorer.
        logprob: log-probability of the answer, in nats, summed over its tokens.
        tokens: number of answer tokens the sum is over.
        predicted: what the model puts first (a token, or a choice), stripped.
        answer: the right answer, stripped unless it is a text or a program.
        group: the example's group (relation or class), or empty.
        figures: what else its scorer measures, by name.
    """

    id: str
    correct: bool
    logprob: float
    tokens: int
    predicted: str
    answer: str
    group: str = ""
    figures: dict[str, float] = field(default_factory=dict, hash=False)

    @property
    def loss(self) -> float:
        """Negative log-probability of the answer in nats per answer token."""
        return -self.logprob / self.tokens


@dataclass(frozen=True)
class Evaluation:
    """The scores of one model under one intervention on one set of examples.

    Args:
        model: the model's name.
        task: the task's name.
        split: ``validation``, ``test`` or ``all``.
        scorer: how an example is scored; see ``laserlm.scoring.evaluate``.
        intervention: canonical text of what was applied, empty for the unchanged model.
        scores: one for each example, in the order of the split.
        seconds: wall time of the forward passes, decompositions not included.
        classes: the answers to choose from where all examples share them, else empty.
    """

    model: str
    task: str
    split: str
    scorer: str
    intervention: str
    scores: tuple[ExampleScore, ...] = field(repr=False)
    seconds: float
    classes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.scores:
            raise ScoringError(f"an evaluation of {self.task}/{self.split} is empty; score one example at least")

    @property
    def n(self) -> int:
        """Number of examples."""
        return len(self.scores)

    @cached_property
    def accuracy(self) -> float:
        """Share of examples that are correct."""
        return sum(s.correct for s in self.scores) / self.n

    @cached_property
    def accuracy_interval(self) -> Interval:
        """95 % Wilson interval of the accuracy."""
        return wilson(sum(s.correct for s in self.scores), self.n)

    @cached_property
    def loss(self) -> float:
        """Mean over examples of the log-loss in nats per answer token."""
        return sum(s.loss for s in self.scores) / self.n

    @cached_property
    def perplexity(self) -> float:
        """Exponential of the log-loss per answer token, over all answer tokens alike."""
        return math.exp(-math.fsum(s.logprob for s in self.scores) / self.tokens)

    @cached_property
    def tokens(self) -> int:
        """Number of answer tokens."""
        return sum(s.tokens for s in self.scores)

    @cached_property
    def words(self) -> int:
        """Number of words, with white space between them, of the answers."""
        return sum(len(s.answer.split()) for s in self.scores)

    @cached_property
    def figures(self) -> dict[str, float]:
        """Means over examples of what else the scorer measures, by name."""
        known = {name: [s.figures[name] for s in self.scores if name in s.figures] for name in self.scores[0].figures}
        return {name: sum(values) / len(values) for name, values in known.items()}

    @cached_property
    def majority_rate(self) -> float:
        """Accuracy of giving the most frequent answer of these examples every time."""
        return Counter(s.answer.lower() for s in self.scores).most_common(1)[0][1] / self.n

    @cached_property
    def balanced_accuracy(self) -> float | None:
        """Mean over the classes present of the accuracy within each; None where the task has no classes."""
        if not self.classes:
            return None
        within: dict[str, list[bool]] = defaultdict(list)
        for s in self.scores:
            within[s.answer.lower()].append(s.correct)
        return sum(sum(v) / len(v) for v in within.values()) / len(within)

    def as_dict(self) -> dict[str, Any]:
        """Return the figures (not the per-example scores) as plain JSON values."""
        of_text = self.scorer == "perplexity"
        return {
            "model": self.model,
            "task": self.task,
            "split": self.split,
            "scorer": self.scorer,
            "intervention": self.intervention,
            "n": self.n,
            "accuracy": self.accuracy,
            "accuracy_interval": list(self.accuracy_interval),
            "loss": self.loss,
            "majority_rate": self.majority_rate,
            "balanced_accuracy": self.balanced_accuracy,
            **self.figures,
            **({"perplexity": self.perplexity, "tokens": self.tokens, "words": self.words} if of_text else {}),
            "seconds": self.seconds,
        }

    def __str__(self) -> str:
        low, high = self.accuracy_interval
        if self.scorer == "perplexity":
            return (
                f"{self.task}/{self.split} {self.intervention or 'base'}: perplexity {self.perplexity:.3f} over {self.tokens} "
                f"tokens ({self.words} words), loss {self.loss:.3f} nats/token, {self.n} passages"
            )
        return (
            f"{self.task}/{self.split} {self.intervention or 'base'}: accuracy {self.accuracy:.1%} "
            f"[{low:.1%}, {high:.1%}], loss {self.loss:.3f} nats/token, n {self.n}"
        )
