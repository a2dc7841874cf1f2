"""Who does the work of a search: this process, or others."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from laserlm.searching.hardware import hardware_of
from laserlm.searching.scorer import BlockOrder, PrefixScorer
from laserlm.searching.work import WorkItem


class OutOfTimeError(Exception):
    """Ends a search whose time is used up; it is caught within the search."""


IsCancelled = Callable[[Any], bool]
"""Returns whether a work item need not be done any more."""
Speculate = Callable[[], Sequence[WorkItem]]
"""Returns the items that are likely to be asked for next, the likeliest first, for idle workers."""


class Executor(Protocol):
    """Does work items; each result is the same whoever computes it."""

    @property
    def workers(self) -> int:
        """Number of processes that work at the same time."""

    @property
    def batch_size(self) -> int:
        """Sequences in one forward pass; halved where memory ran out."""

    @property
    def hardware(self) -> dict[str, Any]:
        """What computes the results; see ``hardware_of``."""

    @property
    def activation_bytes(self) -> int:
        """Most bytes of cached activations in one process."""

    @property
    def decomposition_bytes(self) -> int:
        """Most bytes of decompositions in one process."""

    def block_order(self, split: str) -> BlockOrder:
        """Return the blocks in the order in which the model runs them."""

    def run(
        self,
        items: Sequence[WorkItem],
        *,
        is_cancelled: IsCancelled,
        deadline: float = math.inf,
        speculate: Speculate | None = None,
    ) -> Iterator[tuple[Any, Any]]:
        """Yield each item with its result or ``Failure``, as soon as there is one and in any order.

        Args:
            items: in the order in which they are best begun.
            is_cancelled: asked before an item is begun.
            deadline: value of ``time.monotonic`` after which no more is begun.
            speculate: asked when a worker is idle.

        Raises:
            OutOfTimeError: at the deadline. Items that other processes have begun are not waited for.
        """

    def free(self, split: str) -> None:
        """Free the cached activations of a split that is not asked for again soon."""


class LocalExecutor:
    """Does the work in this process, one item after the other."""

    workers = 1

    def __init__(self, scorer: PrefixScorer) -> None:
        self._scorer = scorer
        self.hardware = hardware_of(scorer.lm)
        self.block_order = scorer.block_order
        self.free = scorer.free

    @property
    def batch_size(self) -> int:
        return self._scorer.batch_size

    @property
    def activation_bytes(self) -> int:
        return self._scorer.peak_bytes

    @property
    def decomposition_bytes(self) -> int:
        return self._scorer.decompositions.peak

    def run(
        self,
        items: Sequence[WorkItem],
        *,
        is_cancelled: IsCancelled,
        deadline: float = math.inf,
        speculate: Speculate | None = None,
    ) -> Iterator[tuple[Any, Any]]:
        for item in items:
            if is_cancelled(item):
                continue
            if time.monotonic() > deadline:
                raise OutOfTimeError
            yield item, item.execute(self._scorer)
