"""Who does the work of a search: this process, unless it is given to others."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from laserlm.searching.desk import BlockOrder, WorkerState, WorkItem

__all__ = ["Executor", "IsCancelled", "LocalExecutor", "OutOfTimeError", "Speculate", "WorkFailure"]


class OutOfTimeError(Exception):
    """Ends a search whose time is used up; it is caught within the search."""


class WorkFailure(str):
    """Why a piece has no result that may have one elsewhere: it ended the processes that were at it."""


IsCancelled = Callable[[Any], bool]
"""Tells of a piece that it need not be done any more."""
Speculate = Callable[[], Sequence[WorkItem]]
"""Returns what is likely to be asked for next, the likeliest first, for those who would stand idle."""


class Executor(Protocol):
    """Does pieces of work; each result is the same whoever does it."""

    @property
    def workers(self) -> int:
        """Number of processes that work at the same time."""

    @property
    def batch(self) -> int:
        """Sequences in one pass, as far as memory let it be so far."""

    @property
    def boundary(self) -> int:
        """Most bytes that boundaries took in one process."""

    @property
    def decompositions(self) -> int:
        """Most bytes that decompositions took in one process."""

    def order(self, material: str) -> BlockOrder:
        """Return the blocks in the order in which they run."""

    def run(
        self,
        pieces: Sequence[WorkItem],
        *,
        needless: IsCancelled,
        deadline: float = math.inf,
        ahead: Speculate | None = None,
    ) -> Iterator[tuple[Any, Any]]:
        """Yield each piece with its result, as soon as it is there and in any order; a text says why there is none.

        Args:
            pieces: what has to be done, in the order in which it is best begun.
            needless: asked before a piece is begun; it is left out where this is true.
            deadline: value of ``time.monotonic`` after which no more is begun.
            ahead: what may be asked for next.

        Raises:
            OutOfTimeError: at the deadline; what other processes are at then is not waited for.
        """

    def release(self, material: str) -> None:
        """Free the boundaries of a material, which is not asked for again soon."""


class LocalExecutor:
    """Does the work in this process, one piece after the other."""

    workers = 1

    def __init__(self, desk: WorkerState) -> None:
        self._desk = desk

    @property
    def batch(self) -> int:
        """See ``Executor``."""
        return self._desk.batch

    @property
    def boundary(self) -> int:
        """See ``Executor``."""
        return self._desk.boundary

    @property
    def decompositions(self) -> int:
        """See ``Executor``."""
        return self._desk.cache.peak

    def order(self, material: str) -> BlockOrder:
        """See ``Executor``."""
        return self._desk.bench(material).order

    def run(
        self,
        pieces: Sequence[WorkItem],
        *,
        needless: IsCancelled,
        deadline: float = math.inf,
        ahead: Speculate | None = None,
    ) -> Iterator[tuple[Any, Any]]:
        """See ``Executor``."""
        for piece in pieces:
            if needless(piece):
                continue
            if time.monotonic() > deadline:
                raise OutOfTimeError
            yield piece, piece.do(self._desk)

    def release(self, material: str) -> None:
        """See ``Executor``."""
        self._desk.bench(material).release()
