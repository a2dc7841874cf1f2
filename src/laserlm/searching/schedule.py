"""Which process does which items of work, when: decided here, carried out by an executor.

Nothing here knows of processes, networks or clocks: who asks gets the next work, and reports its result.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from laserlm.searching.work import WorkItem

MAX_TRIES = 3
"""Processes that may end at an item before it is given up."""
UNITS_PER_WORKER = 2
"""A unit takes the work that is left, divided among so many units for each worker, at most; so the last ones are small."""
SLOWDOWN = 3.0
"""Times as long as others would have taken that nothing is heard of a worker until its items are also given to another."""
PATIENCE_SECONDS = 5.0
"""Seconds of silence that are never too long; in less it is not known yet whether a worker has ended."""
FIRST_PATIENCE_SECONDS = 600.0
"""Seconds that a first item of its kind may take, for all that is known."""
RECENT_ANSWERS = 64
"""Answers that the usual pace is taken from."""


@dataclass
class _Unit:
    """Items that a worker has, in the order in which it does them, without those it has answered."""

    items: deque[WorkItem]
    heard: float  # when it last answered, or began
    speculative: bool = False  # begun before it was wanted


class Schedule:
    """Items that are wanted, and who has them.

    A worker gets units of consecutive items with the same affinity and batch key. It keeps its affinity while there are such
    items; then it takes the affinity that the fewest workers have. When nothing is left to begin, it gets the items of a slow
    worker too, and after that what may be asked for next. The first answer counts.

    Args:
        workers: how many are at work, for the size of the units.
    """

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self._wanted: dict[WorkItem, None] = {}
        self._waiting: dict[Hashable, deque[WorkItem]] = {}  # by affinity
        self._load = 0.0  # work of all that waits
        self._units: dict[Hashable, _Unit] = {}
        self._affinities: dict[Hashable, Hashable] = {}
        self._answered: set[WorkItem] = set()
        self._held: dict[WorkItem, Any] = {}  # answers that nobody has asked for yet
        self._ends: Counter[WorkItem] = Counter()
        self._paces: dict[type[WorkItem], deque[float]] = defaultdict(lambda: deque(maxlen=RECENT_ANSWERS))

    @property
    def open(self) -> bool:
        """Whether answers to items that are wanted are still to come."""
        return bool(self._wanted)

    def want(self, items: Sequence[WorkItem]) -> list[tuple[WorkItem, Any]]:
        """Want these and nothing else from now on; return those whose answer is here already."""
        here = [(item, self._held.pop(item)) for item in items if item in self._held]
        self._held.clear()
        self._answered = {item for item, _ in here}
        self._wanted = {item: None for item in items if item not in self._answered}
        begun = self._begun()
        for unit in self._units.values():
            unit.speculative = False  # it was right or wrong by now
        self._waiting, self._load = {}, 0.0
        for item in self._wanted:
            if item not in begun:
                self._wait(item)
        return here

    def suspected(self, item: WorkItem) -> bool:
        """Return whether a worker may have ended at this item."""
        return self._ends[item] > 0

    def useless(self, worker: Hashable) -> bool:
        """Return whether nothing of what a worker has in hand is wanted, or will be for all that is known."""
        unit = self._units.get(worker)
        if unit is None or unit.speculative or not unit.items:
            return False
        return not any(item in self._wanted for item in unit.items)

    def take(
        self,
        worker: Hashable,
        now: float,
        is_cancelled: Callable[[Any], bool] = lambda _: False,
        speculate: Callable[[], Sequence[WorkItem]] | None = None,
    ) -> list[WorkItem]:
        """Give an idle worker a unit, and return it; nothing where there is nothing to do.

        Args:
            worker: who asks.
            now: time in seconds.
            is_cancelled: asked before an item is begun; it is left out where this is true.
            speculate: what may be asked for next, the likeliest first.
        """
        items = self._begin(worker, is_cancelled) or self._double(now)
        speculative = [] if items else self._guess(speculate)
        if items or speculative:
            self._units[worker] = _Unit(deque(items or speculative), now, speculative=bool(speculative))
            self._affinities[worker] = self._units[worker].items[0].affinity
        return items or speculative

    def answer(self, worker: Hashable, item: WorkItem, result: Any, now: float) -> bool:
        """Note an answer; return whether it is the first to an item that is wanted."""
        unit = self._units[worker]
        unit.items.remove(item)
        self._paces[type(item)].append((now - unit.heard) / (item.cost or 1))
        unit.heard = now
        if item in self._wanted:
            del self._wanted[item]
            self._answered.add(item)
            return True
        if item not in self._answered:
            self._held[item] = result
        return False

    def finish(self, worker: Hashable) -> None:
        """Note that a worker has done its unit, or left out what it had not begun; that is waited for again."""
        self._give_back(self._units.pop(worker))

    def lose(self, worker: Hashable, *, begun: bool = True) -> WorkItem | None:
        """Note that a worker has ended; return the item it was at where that is now given up.

        The item it was at is done by itself from then on; after ``MAX_TRIES`` such ends nobody gets it any more.

        Args:
            worker: who ended.
            begun: whether it is known to have begun its unit. Where it is not, the item is suspected at first, and then not
                blamed again: who gets a suspected item makes sure that its begin is known.
        """
        self._affinities.pop(worker, None)
        unit = self._units.pop(worker, None)
        if unit is None or not unit.items:
            return None
        suspect = unit.items[0]
        self._ends[suspect] += begun or not self._ends[suspect]
        gave_up = self._ends[suspect] >= MAX_TRIES
        if gave_up:
            unit.items.popleft()
        self._give_back(unit)
        if not gave_up or suspect not in self._wanted:
            return None
        del self._wanted[suspect]
        self._answered.add(suspect)
        return suspect

    def _begun(self) -> set[WorkItem]:
        return {item for unit in self._units.values() for item in unit.items}

    def _wait(self, item: WorkItem, *, first: bool = False) -> None:
        waiting = self._waiting.setdefault(item.affinity, deque())
        (waiting.appendleft if first else waiting.append)(item)
        self._load += item.cost

    def _give_back(self, unit: _Unit) -> None:
        begun = self._begun()
        for item in reversed(unit.items):
            if item in self._wanted and item not in begun:
                self._wait(item, first=True)

    def _begin(self, worker: Hashable, is_cancelled: Callable[[Any], bool]) -> list[WorkItem]:
        """Return the next items of an affinity, as many as make a unit."""
        unit: list[WorkItem] = []
        room = self._load / (UNITS_PER_WORKER * self.workers)
        while self._waiting:
            affinity = unit[0].affinity if unit else self._choose(worker)
            waiting = self._waiting.get(affinity, deque())
            if unit and not (waiting and self._fits(waiting[0], unit, room)):
                break
            item = waiting.popleft()
            self._load -= item.cost
            if not waiting:
                del self._waiting[affinity]
            if is_cancelled(item):
                self._wanted.pop(item, None)
                continue
            unit.append(item)
            room -= item.cost
        return unit

    def _choose(self, worker: Hashable) -> Hashable:
        """Return the affinity that a worker goes on with, or the one where the fewest are, of equals the first."""
        affinity = self._affinities.get(worker)
        if affinity in self._waiting:
            return affinity
        busy = Counter(self._affinities[other] for other in self._units)
        return min(self._waiting, key=lambda other: busy[other])

    def _fits(self, item: WorkItem, unit: Sequence[WorkItem], room: float) -> bool:
        """Return whether an item goes into a unit; one that ended a worker goes by itself."""
        return item.batch_key == unit[0].batch_key and item.cost <= room and not self._ends[item] and not self._ends[unit[0]]

    def _double(self, now: float) -> list[WorkItem]:
        """Return what only workers have in hand of whom nothing was heard for far longer than it should take."""
        silent = [unit for unit in self._units.values() if now - unit.heard > self._patience(unit)]
        if not silent:
            return []
        heard = {p for unit in self._units.values() if not any(unit is other for other in silent) for p in unit.items}
        for unit in silent:
            left = [item for item in unit.items if item in self._wanted and item not in heard]
            if left:
                return left
        return []

    def _patience(self, unit: _Unit) -> float:
        """Return the seconds that a worker may be silent."""
        if not unit.items:
            return math.inf
        item = unit.items[0]
        pace = self._paces[type(item)]
        return max(PATIENCE_SECONDS, SLOWDOWN * median(pace) * (item.cost or 1)) if pace else FIRST_PATIENCE_SECONDS

    def _guess(self, speculate: Callable[[], Sequence[WorkItem]] | None) -> list[WorkItem]:
        begun = self._begun() if speculate else set()
        for item in speculate() if speculate else ():
            if item not in begun and item not in self._held and not self._ends[item]:
                return [item]
        return []
