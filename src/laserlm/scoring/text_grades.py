"""Grades of models that give one output for a text: labels, rewards and embeddings, and the slopes of their losses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from laserlm.scoring.records import ExampleScore, TokenScores
from laserlm.tasks.example import Example

if TYPE_CHECKING:
    from laserlm.scoring.scorers import ScoredExample

DEVIATION = 0.1
"""Standard deviation of the scores around the cosine: the loss is (cosine - score)^2 / (2 DEVIATION^2)."""
Slopes = tuple[float, list[float]]
"""Derivatives of an example's loss by a row's first output, and by its list of outputs."""


def grade_label(x: ScoredExample) -> ExampleScore:
    """Return whether the most likely label is the example's. The loss is its cross entropy."""
    (row,), (outcome,) = x.rows, x.outcomes
    score = x.score(outcome.argmax[0] == row.targets[0], x.decode(outcome.argmax[:1]), tied=outcome.tied[0])
    return replace(score, answer=x.decode(list(row.targets)))


def grade_preference(x: ScoredExample) -> ExampleScore:
    """Return whether the chosen text has the largest reward. The loss is that of a softmax over the rewards."""
    rewards = [outcome.logprobs[0] for outcome in x.outcomes]
    gold, best = x.example.choices.index(x.example.answer), max(rewards)
    predicted = x.example.choices[rewards.index(best)]
    score = x.score(rewards.index(best) == gold and rewards.count(best) == 1, predicted, tied=rewards.count(best) > 1)
    others = torch.tensor(rewards, dtype=torch.float64)
    return replace(score, logprob=float(others[gold] - others.logsumexp(0)), tokens=1)


def grade_similarity(x: ScoredExample) -> ExampleScore:
    """Return whether the cosine is near the score. The loss is the squared error in units of its deviation."""
    cosine, gold = _cosine(x.outcomes), float(x.example.answer)
    score = x.score(abs(cosine - gold) <= DEVIATION, f"{cosine:.6f}", tied=False)
    return replace(score, logprob=-((cosine - gold) ** 2) / (2 * DEVIATION**2), tokens=1)


def preference_slopes(e: Example, outcomes: Sequence[TokenScores], expected: bool = False) -> list[Slopes]:
    """Return the slopes of the loss by the reward of each choice, or with ``expected`` the roots of their mean squares."""
    shares = torch.tensor([outcome.logprobs[0] for outcome in outcomes], dtype=torch.float64).softmax(0).tolist()
    if expected:
        return [(math.sqrt(share * (1 - share)), []) for share in shares]
    gold = e.choices.index(e.answer)
    return [(share - (i == gold), []) for i, share in enumerate(shares)]


def similarity_slopes(e: Example, outcomes: Sequence[TokenScores], expected: bool = False) -> list[Slopes]:
    """Return the slopes of the loss by the two vectors, which have length 1, or the roots of their mean squares."""
    slope = 1 / DEVIATION if expected else (_cosine(outcomes) - float(e.answer)) / DEVIATION**2
    return [(0.0, [slope * value for value in outcomes[other].choice_logprobs]) for other in (1, 0)]


def _cosine(outcomes: Sequence[TokenScores]) -> float:
    first, second = (outcome.choice_logprobs for outcome in outcomes)
    return math.fsum(a * b for a, b in zip(first, second, strict=True))
