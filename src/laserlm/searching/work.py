"""Work items: what any process that has the model can do for a search by itself."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from laserlm.models.matrices import Matrix
from laserlm.reductions import Intervention
from laserlm.scoring.records import Evaluation
from laserlm.searching.candidates import Candidate
from laserlm.searching.scorer import BlockOrder, Failure, PrefixScorer
from laserlm.searching.screen import Screening

SCREEN_PASSES = 3
"""Cost of a screen in forward passes: one pass, another one block by block, and the backward pass without weight gradients."""


class WorkItem(Protocol):
    """A part of the work of a search."""

    @property
    def affinity(self) -> Hashable:
        """A process that has done an item with this key does the next one faster."""

    @property
    def batch_key(self) -> Hashable:
        """Items with the same key share decompositions, and are handed out together."""

    @property
    def cost(self) -> float:
        """Passes of one example through the full model, about."""

    def execute(self, scorer: PrefixScorer) -> Any:
        """Return the result, or a ``Failure``."""


@dataclass(frozen=True)
class ScoreTask:
    """Score an intervention on consecutive examples.

    Args:
        split: name of the split.
        start: index of the first example.
        stop: index just past the last one.
        intervention: what is applied.
        share: part of the blocks of the model that a pass has to run.
    """

    split: str
    start: int
    stop: int
    intervention: Intervention
    share: float = field(default=1.0, compare=False)

    @property
    def affinity(self) -> Hashable:
        """The examples, whose activations are cached."""
        return self.split, self.start, self.stop

    @property
    def batch_key(self) -> Hashable:
        """The matrices, whose decompositions serve at every size."""
        return tuple((r.stack, r.layers, r.matrix) for r in self.intervention.reductions)

    @property
    def cost(self) -> float:
        """Examples, times the part of the blocks."""
        return self.share * (self.stop - self.start)

    def execute(self, scorer: PrefixScorer) -> Evaluation | Failure:
        """Return the scores, or why there are none."""
        return scorer.score(self.split, self.intervention, self.start, self.stop)


@dataclass(frozen=True, eq=False)
class ScreenTask:
    """Screen candidates. No two tasks are equal, for each is asked for once.

    Args:
        split: name of the split.
        first: index of the first example; the screen takes all from there on.
        candidates: single matrices at single ranks.
        between_choices: see ``screen``.
        cost: passes of one example, about.
        seconds: time after which candidates that are not done stay without a prediction.
    """

    split: str
    first: int
    candidates: tuple[Candidate, ...] = field(repr=False)
    between_choices: bool = False
    cost: float = 0.0
    seconds: float = math.inf

    @property
    def affinity(self) -> Hashable:
        """The examples."""
        return self.split, self.first

    @property
    def batch_key(self) -> Hashable:
        """The task itself: each is for another process."""
        return id(self)

    def execute(self, scorer: PrefixScorer) -> Screening:
        """Return the predictions."""
        return scorer.screen(
            self.split, self.first, self.candidates, between_choices=self.between_choices, seconds=self.seconds
        )


@dataclass(frozen=True)
class OrderTask:
    """Find the order in which the model runs its blocks.

    Args:
        split: name of the split.
    """

    split: str
    affinity: str = "order"
    batch_key: str = "order"
    cost: float = 0.0

    def execute(self, scorer: PrefixScorer) -> BlockOrder:
        """Return the order."""
        return list(scorer.block_order(self.split))


def screen_tasks(
    candidates: Sequence[Candidate],
    split: str,
    first: int,
    cost: float,
    workers: int,
    between_choices: bool = False,
    seconds: float = math.inf,
) -> list[ScreenTask]:
    """Return the screen as a task for each process: all compute the gradient, each decomposes its share of the matrices."""
    matrices = {m: number for number, m in enumerate(dict.fromkeys(c.matrix for c in candidates))}
    shares: list[list[Candidate]] = [[] for _ in range(min(workers, len(matrices)))]
    for candidate in candidates:
        shares[matrices[candidate.matrix] % len(shares)].append(candidate)
    return [ScreenTask(split, first, tuple(share), between_choices, cost, seconds) for share in shares]


@dataclass(frozen=True, eq=False)
class ContributionTask:
    """Take the derivatives of losses by the strengths of the components of some matrices.

    Args:
        split: name of the split.
        examples: their indices.
        intervention: what is applied; components are those of the unchanged matrices.
        matrices: of the components.
        squared: whether to sum the squares of the derivatives of single tokens over all examples.
        both: whether to return the derivatives too.
        between_choices: see ``screen``.
        cost: passes of one example, about.
    """

    split: str
    examples: tuple[int, ...] = field(repr=False)
    intervention: Intervention
    matrices: tuple[Matrix, ...] = field(repr=False)
    squared: bool = False
    both: bool = False
    between_choices: bool = False
    cost: float = 0.0

    @property
    def affinity(self) -> Hashable:
        """The examples."""
        return self.split, self.examples

    @property
    def batch_key(self) -> Hashable:
        """The task itself: each is for another process."""
        return id(self)

    def execute(self, scorer: PrefixScorer) -> dict[str, Tensor]:
        """Return derivatives (E, k), the sum of squares (1, k), or both (E + 1, k), by the matrix's id."""
        return scorer.contributions(
            self.split,
            self.examples,
            self.intervention,
            self.matrices,
            squared=self.squared,
            both=self.both,
            between_choices=self.between_choices,
        )


def contribution_tasks(
    split: str,
    examples: Sequence[int],
    intervention: Intervention,
    matrices: Sequence[Matrix],
    workers: int,
    *,
    squared: bool = False,
    both: bool = False,
    between_choices: bool = False,
) -> list[ContributionTask]:
    """Return a task for each process: all run the examples, each decomposes its share of the matrices."""
    n = min(workers, len(matrices))
    cost = SCREEN_PASSES * len(examples) / n
    return [
        ContributionTask(split, tuple(examples), intervention, tuple(matrices[i::n]), squared, both, between_choices, cost)
        for i in range(n)
    ]
