"""The records of scoring: token sequences and their scores, example scores, and an evaluation of all of them."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from laserlm.errors import ScoringError
from laserlm.reductions import short_form
from laserlm.scoring.statistics import Interval, clustering_of, dense_ranks, spearman, wilson


@dataclass(frozen=True)
class TokenSequence:
    """A sequence to run through the model, and the tokens to score.

    Args:
        example: index of its example.
        ids: all input tokens; for an encoder-decoder, the encoder's.
        targets: tokens whose log-probabilities are read.
        positions: positions in ``ids`` whose logits predict the targets; for an encoder-decoder, positions in ``decoder``.
        decoder: input tokens of the decoder; empty for other models.
        choice_tokens: one token for each choice, read at the first position; empty if a choice has several tokens.
        ranked: whether the ranks of the targets are read.
        top: number of most likely tokens to read at the first position.
        type_ids: for two texts in one sequence, which of them a token is of; empty if the model does not ask for it.
    """

    example: int
    ids: tuple[int, ...]
    targets: tuple[int, ...]
    positions: tuple[int, ...]
    decoder: tuple[int, ...] = ()
    choice_tokens: tuple[int, ...] = ()
    ranked: bool = False
    top: int = 0
    type_ids: tuple[int, ...] = ()

    def end(self, most: int) -> TokenSequence:
        """Return the last ``most`` tokens of a causal model's sequence, and of its targets those that are predicted there.

        The whole sequence is returned where it is not longer, or where nothing would be left to score.
        """
        left_out = len(self.ids) - most
        kept = [(t, p - left_out) for t, p in zip(self.targets, self.positions, strict=True) if p >= left_out]
        if left_out <= 0 or not kept:
            return self
        targets, positions = zip(*kept, strict=True)
        return replace(self, ids=self.ids[left_out:], targets=targets, positions=positions)


@dataclass(frozen=True)
class TokenScores:
    """The model's scores at the positions of one sequence.

    Args:
        logprobs: log-probability of each target, in nats.
        argmax: most likely token at each position.
        tied: whether another token is exactly as likely as the most likely one, at each position.
        best: log-probability of the most likely token at each position, in nats.
        choice_logprobs: log-probabilities of the choice tokens at the first position, in nats.
        ranks: number of tokens that are more likely than the target, at each position; empty unless the sequence is ranked.
        last_ranks: number of other tokens that are at least as likely as the target; empty unless the sequence is ranked.
        top: the most likely tokens at the first position, in descending order.
    """

    logprobs: list[float]
    argmax: list[int]
    tied: list[bool]
    best: list[float]
    choice_logprobs: list[float]
    ranks: list[int]
    last_ranks: list[int]
    top: list[int]


@dataclass(frozen=True)
class ExampleScore:
    """The score of one example.

    Args:
        id: the example's id.
        correct: whether the scorer counts the prediction as correct.
        logprob: log-probability of the answer, in nats, summed over its tokens.
        tokens: number of answer tokens in the sum.
        predicted: the model's most likely tokens or choice, or the generated text, stripped.
        answer: the right answer, stripped unless it is a text or a program.
        group: the example's group (relation or class), or empty.
        figures: further metrics of the scorer, by name.
        tied: whether the prediction was chosen among exactly equal scores; None if that is unknown, as for a generated text
            and for stored scores.
        fact: the example's fact; empty if it is not known.
    """

    id: str
    correct: bool
    logprob: float
    tokens: int
    predicted: str
    answer: str
    group: str = ""
    figures: dict[str, float] = field(default_factory=dict, hash=False)
    tied: bool | None = field(default=None, compare=False)
    fact: str = ""

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
        scorer: name of the scorer; see ``laserlm.scoring.scorers``.
        intervention: canonical text of the intervention, empty for the unchanged model.
        scores: one score for each example, in the order of the split.
        seconds: wall time of the forward passes, without decompositions.
        classes: the choices if all examples share them, else empty.
        skipped: number of examples that were left out because they cannot be scored.
    """

    model: str
    task: str
    split: str
    scorer: str
    intervention: str
    scores: tuple[ExampleScore, ...] = field(repr=False)
    seconds: float
    classes: tuple[str, ...] = ()
    skipped: int = field(default=0, compare=False)

    def __post_init__(self) -> None:
        if not self.scores:
            raise ScoringError(f"an evaluation of {self.task}/{self.split} is empty. Score at least one example.")

    @property
    def n(self) -> int:
        """Number of examples."""
        return len(self.scores)

    @cached_property
    def facts(self) -> tuple[str, ...]:
        """The fact of each example; an example without one is a fact of its own."""
        return tuple(s.fact or s.id for s in self.scores)

    @cached_property
    def accuracy(self) -> float:
        """Share of examples that are correct."""
        return sum(s.correct for s in self.scores) / self.n

    @cached_property
    def accuracy_interval(self) -> Interval:
        """95 % Wilson interval of the accuracy, by the variance between facts where examples share them."""
        correct = [s.correct for s in self.scores]
        return wilson(sum(correct), self.n, clustering=clustering_of(correct, self.facts))

    @cached_property
    def loss(self) -> float:
        """Mean over examples of the log-loss in nats per answer token."""
        return sum(s.loss for s in self.scores) / self.n

    @cached_property
    def perplexity(self) -> float:
        """Exponential of the mean log-loss over all answer tokens."""
        return math.exp(-math.fsum(s.logprob for s in self.scores) / self.tokens)

    @cached_property
    def tokens(self) -> int:
        """Number of answer tokens."""
        return sum(s.tokens for s in self.scores)

    @cached_property
    def words(self) -> int:
        """Number of words of the answers, separated by white space."""
        return sum(len(s.answer.split()) for s in self.scores)

    @cached_property
    def figures(self) -> dict[str, float]:
        """Means over examples of the scorer's further metrics, by name."""
        values = {name: [s.figures[name] for s in self.scores if name in s.figures] for name in self.scores[0].figures}
        return {name: sum(v) / len(v) for name, v in values.items()}

    @cached_property
    def ties(self) -> int | None:
        """Number of examples whose prediction was chosen among exactly equal scores; None if that is unknown."""
        tied = [s.tied for s in self.scores if s.tied is not None]
        return sum(tied) if len(tied) == self.n else None

    @cached_property
    def spearman(self) -> float | None:
        """Spearman's rank correlation of cosines and scores; None for other scorers, and where all of either are equal."""
        if self.scorer != "similarity":
            return None
        cosines, scores = (
            [float(text) for text in texts] for texts in zip(*((s.predicted, s.answer) for s in self.scores), strict=True)
        )
        if len({*cosines}) < 2 or len({*scores}) < 2:
            return None
        return spearman(dense_ranks(cosines), dense_ranks(scores))

    @cached_property
    def majority_rate(self) -> float:
        """Accuracy of a constant guess, the most frequent answer of these examples."""
        return Counter(s.answer.lower() for s in self.scores).most_common(1)[0][1] / self.n

    @cached_property
    def balanced_accuracy(self) -> float | None:
        """Mean over the classes that occur of the accuracy within each class; None if the task has no classes."""
        if not self.classes:
            return None
        within: dict[str, list[bool]] = defaultdict(list)
        for s in self.scores:
            within[s.answer.lower()].append(s.correct)
        return sum(sum(v) / len(v) for v in within.values()) / len(within)

    def as_dict(self) -> dict[str, Any]:
        """Return the metrics, without the scores of single examples, as plain JSON values."""
        is_perplexity = self.scorer == "perplexity"
        return {
            "model": self.model,
            "task": self.task,
            "split": self.split,
            "scorer": self.scorer,
            "intervention": self.intervention,
            "n": self.n,
            **({"skipped": self.skipped} if self.skipped else {}),
            "accuracy": self.accuracy,
            "accuracy_interval": list(self.accuracy_interval),
            "loss": self.loss,
            "ties": self.ties,
            "majority_rate": self.majority_rate,
            "balanced_accuracy": self.balanced_accuracy,
            **self.figures,
            **({"spearman": self.spearman} if self.scorer == "similarity" else {}),
            **({"perplexity": self.perplexity, "tokens": self.tokens, "words": self.words} if is_perplexity else {}),
            "seconds": self.seconds,
        }

    def __str__(self) -> str:
        low, high = self.accuracy_interval
        if self.scorer == "perplexity":
            return (
                f"{self.task}/{self.split} {short_form(self.intervention) or 'base'}: perplexity {self.perplexity:.3f} over "
                f"{self.tokens} tokens ({self.words} words), loss {self.loss:.3f} nats/token, {self.n} passages"
            )
        if self.scorer == "similarity":
            rho = "not defined" if self.spearman is None else f"{self.spearman:.3f}"
            return (
                f"{self.task}/{self.split} {short_form(self.intervention) or 'base'}: Spearman {rho}, loss {self.loss:.3f}, "
                f"within 0.1 of the score {self.accuracy:.1%}, {self.n} pairs"
            )
        return (
            f"{self.task}/{self.split} {short_form(self.intervention) or 'base'}: accuracy {self.accuracy:.1%} "
            f"[{low:.1%}, {high:.1%}], loss {self.loss:.3f} nats/token, n {self.n}"
            f"{f', {self.ties} exact ties' if self.ties else ''}"
        )
