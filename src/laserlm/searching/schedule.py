"""Which process does which pieces of work, when: decided here, carried out by an executor.

Nothing here knows of processes, networks or clocks: who asks is told what to do, and says what came of it.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from laserlm.searching.desk import WorkItem

__all__ = ["TRIES", "Schedule"]

TRIES = 3
"""Processes that may end at a piece before it is given up."""
SHARE = 2
"""A unit takes the work that is left, divided among so many units for each worker, at most; so the last ones are small."""
SLOW = 3.0
"""Times as long as others would have taken that nothing is heard of a worker until its pieces are also given to another."""
PATIENCE = 5.0
"""Seconds of silence that are never too long; in less it is not known yet whether a worker has ended."""
UNKNOWN = 600.0
"""Seconds that a first piece of its kind may take, for all that is known."""
RECENT = 64
"""Answers that the usual pace is taken from."""


@dataclass
class _Unit:
    """Pieces that a worker has, in the order in which it does them, without those it has answered."""

    pieces: deque[WorkItem]
    heard: float  # when it last answered, or began
    guessed: bool = False  # begun before it was wanted


class Schedule:
    """Pieces that are wanted, and who has them.

    A worker gets units of consecutive pieces with the same home and group. Where it has a home already, it stays there; else
    it goes where the fewest are. When no more is left to begin, it gets what a slow worker has in hand, too, and after that
    what may be asked for next; the first answer counts.

    Args:
        workers: how many are at work, for the size of the units.
    """

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self._wanted: dict[WorkItem, None] = {}
        self._waiting: dict[Hashable, deque[WorkItem]] = {}  # by home
        self._load = 0.0  # work of all that waits
        self._units: dict[Hashable, _Unit] = {}
        self._homes: dict[Hashable, Hashable] = {}
        self._answered: set[WorkItem] = set()
        self._held: dict[WorkItem, Any] = {}  # answers that nobody has asked for yet
        self._ends: Counter[WorkItem] = Counter()
        self._paces: dict[type[WorkItem], deque[float]] = defaultdict(lambda: deque(maxlen=RECENT))

    @property
    def open(self) -> bool:
        """Whether answers to pieces that are wanted are still to come."""
        return bool(self._wanted)

    def want(self, pieces: Sequence[WorkItem]) -> list[tuple[WorkItem, Any]]:
        """Want these and nothing else from now on; return those whose answer is here already."""
        here = [(piece, self._held.pop(piece)) for piece in pieces if piece in self._held]
        self._held.clear()
        self._answered = {piece for piece, _ in here}
        self._wanted = {piece: None for piece in pieces if piece not in self._answered}
        begun = self._begun()
        for unit in self._units.values():
            unit.guessed = False  # it was right or wrong by now
        self._waiting, self._load = {}, 0.0
        for piece in self._wanted:
            if piece not in begun:
                self._wait(piece)
        return here

    def idle(self, worker: Hashable) -> bool:
        """Return whether a worker has nothing to do."""
        return worker not in self._units

    def suspected(self, piece: WorkItem) -> bool:
        """Return whether a worker may have ended at this piece."""
        return self._ends[piece] > 0

    def useless(self, worker: Hashable) -> bool:
        """Return whether nothing of what a worker has in hand is wanted, or will be for all that is known."""
        unit = self._units.get(worker)
        if unit is None or unit.guessed or not unit.pieces:
            return False
        return not any(piece in self._wanted for piece in unit.pieces)

    def take(
        self,
        worker: Hashable,
        now: float,
        needless: Callable[[Any], bool] = lambda _: False,
        ahead: Callable[[], Sequence[WorkItem]] | None = None,
    ) -> list[WorkItem]:
        """Give an idle worker a unit, and return it; nothing where there is nothing to do.

        Args:
            worker: who asks.
            now: time in seconds.
            needless: asked before a piece is begun; it is left out where this is true.
            ahead: what may be asked for next, the likeliest first.
        """
        pieces = self._begin(worker, needless) or self._double(now)
        guessed = [] if pieces else self._guess(ahead)
        if pieces or guessed:
            self._units[worker] = _Unit(deque(pieces or guessed), now, guessed=bool(guessed))
            self._homes[worker] = self._units[worker].pieces[0].home
        return pieces or guessed

    def answer(self, worker: Hashable, piece: WorkItem, result: Any, now: float) -> bool:
        """Note an answer; return whether it is the first to a piece that is wanted."""
        unit = self._units[worker]
        unit.pieces.remove(piece)
        self._paces[type(piece)].append((now - unit.heard) / (piece.work or 1))
        unit.heard = now
        if piece in self._wanted:
            del self._wanted[piece]
            self._answered.add(piece)
            return True
        if piece not in self._answered:
            self._held[piece] = result
        return False

    def finish(self, worker: Hashable) -> None:
        """Note that a worker has done its unit, or left out what it had not begun; that is waited for again."""
        self._give_back(self._units.pop(worker))

    def lose(self, worker: Hashable, *, begun: bool = True) -> WorkItem | None:
        """Note that a worker has ended; return the piece it was at where that is now given up.

        The piece it was at is done by itself from then on; after ``TRIES`` such ends nobody gets it any more.

        Args:
            worker: who ended.
            begun: whether it is known to have begun its unit. Where it is not, the piece is suspected at first, and then not
                blamed again: who gets a suspected piece makes sure that its begin is known.
        """
        self._homes.pop(worker, None)
        unit = self._units.pop(worker, None)
        if unit is None or not unit.pieces:
            return None
        suspect = unit.pieces[0]
        self._ends[suspect] += begun or not self._ends[suspect]
        given_up = self._ends[suspect] >= TRIES
        if given_up:
            unit.pieces.popleft()
        self._give_back(unit)
        if not given_up or suspect not in self._wanted:
            return None
        del self._wanted[suspect]
        self._answered.add(suspect)
        return suspect

    def _begun(self) -> set[WorkItem]:
        return {piece for unit in self._units.values() for piece in unit.pieces}

    def _wait(self, piece: WorkItem, *, first: bool = False) -> None:
        waiting = self._waiting.setdefault(piece.home, deque())
        (waiting.appendleft if first else waiting.append)(piece)
        self._load += piece.work

    def _give_back(self, unit: _Unit) -> None:
        begun = self._begun()
        for piece in reversed(unit.pieces):
            if piece in self._wanted and piece not in begun:
                self._wait(piece, first=True)

    def _begin(self, worker: Hashable, needless: Callable[[Any], bool]) -> list[WorkItem]:
        """Return the next pieces of a home, as many as make a unit."""
        unit: list[WorkItem] = []
        room = self._load / (SHARE * self.workers)
        while self._waiting:
            home = unit[0].home if unit else self._choose(worker)
            waiting = self._waiting.get(home, deque())
            if unit and not (waiting and self._fits(waiting[0], unit, room)):
                break
            piece = waiting.popleft()
            self._load -= piece.work
            if not waiting:
                del self._waiting[home]
            if needless(piece):
                self._wanted.pop(piece, None)
                continue
            unit.append(piece)
            room -= piece.work
        return unit

    def _choose(self, worker: Hashable) -> Hashable:
        """Return the home that a worker goes on with, or the one where the fewest are, of equals the first."""
        home = self._homes.get(worker)
        if home in self._waiting:
            return home
        busy = Counter(self._homes[other] for other in self._units)
        return min(self._waiting, key=lambda other: busy[other])

    def _fits(self, piece: WorkItem, unit: Sequence[WorkItem], room: float) -> bool:
        """Return whether a piece goes into a unit; one that ended a worker goes by itself."""
        return piece.group == unit[0].group and piece.work <= room and not self._ends[piece] and not self._ends[unit[0]]

    def _double(self, now: float) -> list[WorkItem]:
        """Return what only workers have in hand of whom nothing was heard for far longer than it should take."""
        silent = [unit for unit in self._units.values() if now - unit.heard > self._patience(unit)]
        if not silent:
            return []
        heard = {p for unit in self._units.values() if not any(unit is other for other in silent) for p in unit.pieces}
        for unit in silent:
            left = [piece for piece in unit.pieces if piece in self._wanted and piece not in heard]
            if left:
                return left
        return []

    def _patience(self, unit: _Unit) -> float:
        """Return the seconds that a worker may be silent."""
        if not unit.pieces:
            return math.inf
        piece = unit.pieces[0]
        pace = self._paces[type(piece)]
        return max(PATIENCE, SLOW * median(pace) * (piece.work or 1)) if pace else UNKNOWN

    def _guess(self, ahead: Callable[[], Sequence[WorkItem]] | None) -> list[WorkItem]:
        begun = self._begun() if ahead else set()
        for piece in ahead() if ahead else ():
            if piece not in begun and piece not in self._held and not self._ends[piece]:
                return [piece]
        return []
