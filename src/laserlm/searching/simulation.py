"""How long a search would take: the real schedule, with workers that only let time pass."""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

from laserlm.searching.schedule import Schedule
from laserlm.searching.work import ScoreTask, WorkItem

WRITING = "writing"
"""Name of the split of which items are texts that the model writes, and not scores."""


@dataclass(frozen=True)
class CostModel:
    """What things take, in seconds.

    Args:
        work: a pass of one example through all blocks.
        example: what else an example takes in a pass, such as the output layer.
        decompose: one floating-point operation of a decomposition.
        start: until a new worker has the model.
        unit: from the last answer of a unit to the next one's begin.
        answer: the driver's work for the scores of one example, its recording above all.
        write: the text that the model writes for one example; see ``WRITING``.
    """

    work: float
    example: float = 0.0
    decompose: float = 0.0
    start: float = 0.0
    unit: float = 0.0
    answer: float = 0.0
    write: float = 0.0


@dataclass(frozen=True)
class Simulation:
    """How a search went.

    Args:
        seconds: from the start to the last answer.
        stages: seconds of each stage.
        busy: share of the workers' time in which they did something, whether it was wanted or not.
        driver: share of the time in which the driver had answers to record.
        lost: workers that ended on the way.
        gave_up: items at which as many ended as may.
        units: units handed out.
    """

    seconds: float
    stages: tuple[float, ...]
    busy: float
    driver: float
    lost: int
    gave_up: int
    units: int


def simulate(
    stages: Sequence[Sequence[WorkItem]],
    workers: int,
    pace: CostModel,
    *,
    decompositions: Callable[[WorkItem], Mapping[str, float]] = lambda _: {},
    early: Collection[int] = (),
    failures: float = 0.0,
    seed: int = 0,
) -> Simulation:
    """Let the schedule hand out the items of one stage after the other, and return how long it takes.

    A worker that comes to an affinity runs the blocks below its first item once. A matrix is decomposed by the first worker
    that needs it, for all. Answers reach the driver one after the other.

    Args:
        stages: items, all of which are answered before the next stage begins.
        workers: how many there are.
        pace: what things take.
        decompositions: floating-point operations of each matrix, by its id, that a item needs decomposed.
        early: stages, by number, that idle workers begin while the one before them goes on; they guess right what it holds.
        failures: ends of a worker in an hour of its work, on average; another one starts in its place.
        seed: of the ends.
    """
    simulator = _Simulator(Schedule(workers), pace, decompositions, failures, random.Random(seed))
    for _ in range(workers):
        simulator.hire(0.0)
    ends = [simulator.run_stage(items, stages[stage + 1] if stage + 1 in early else ()) for stage, items in enumerate(stages)]
    seconds = ends[-1] if ends else 0.0
    return Simulation(
        seconds=seconds,
        stages=tuple(b - a for a, b in zip([0.0, *ends], ends, strict=False)),
        busy=min(1.0, simulator.spent / (workers * seconds)) if seconds else 1.0,
        driver=simulator.driver / seconds if seconds else 0.0,
        lost=simulator.lost,
        gave_up=simulator.gave_up,
        units=simulator.units,
    )


@dataclass
class _Simulator:
    """The workers, the driver, and the queue of what happens to them, in the order of time."""

    schedule: Schedule
    pace: CostModel
    decompositions: Callable[[WorkItem], Mapping[str, float]]
    failures: float
    draw: random.Random
    spent: float = 0.0
    driver: float = 0.0
    lost: int = 0
    gave_up: int = 0
    units: int = 0

    def __post_init__(self) -> None:
        self._numbers = count()
        self._queue: list[tuple[float, int, Hashable, str, Any]] = []
        self._idle: list[Hashable] = []
        self._boundaries: dict[Hashable, dict[Hashable, float]] = {}  # how far up a worker is, in each affinity
        self._decomposed: set[str] = set()
        self._now = self._driver_free = 0.0

    def hire(self, when: float) -> None:
        """Start a worker."""
        worker = next(self._numbers)
        self._boundaries[worker] = {}
        self._push(when + self.pace.start, worker, "ready")

    def run_stage(self, items: Sequence[WorkItem], later: Sequence[WorkItem]) -> float:
        """Have the items answered, and return the time at which they are; idle workers begin with those of later."""
        self.schedule.want(items)
        waits = True
        while self.schedule.open:
            if waits:
                self._hand_out(later)
            waits = self._happen() != "answer"  # an answer gives nobody anything new to do
        return max(self._now, self._driver_free)

    def _push(self, when: float, worker: Hashable, what: str, value: Any = None) -> None:
        heapq.heappush(self._queue, (when, next(self._numbers), worker, what, value))

    def _hand_out(self, later: Sequence[WorkItem]) -> None:
        """Give units to idle workers as long as there are both."""
        while self._idle:
            unit = self.schedule.take(self._idle[-1], self._now, speculate=(lambda: later) if later else None)
            if not unit:
                return
            self.units += 1
            self.spent += self._begin(self._idle.pop(), unit, max(self._now, self._driver_free))

    def _begin(self, worker: Hashable, unit: Sequence[WorkItem], when: float) -> float:
        """Put the answers of a unit into the queue, or the worker's end; return the time it worked."""
        end = when + self.draw.expovariate(self.failures / 3600) if self.failures else math.inf
        at = when + self.pace.unit
        for item in unit:
            new = {matrix: n for matrix, n in self.decompositions(item).items() if matrix not in self._decomposed}
            at += _seconds(item, self._boundaries[worker], self.pace) + sum(new.values()) * self.pace.decompose
            if at > end:
                self._push(end, worker, "lost")
                return end - when
            self._decomposed.update(new)
            self._push(at, worker, "answer", item)
        self._push(at, worker, "done")
        return at - when

    def _happen(self) -> str:
        """Let the next thing in the queue happen, and return what it is."""
        self._now, _, worker, what, item = heapq.heappop(self._queue)
        if what == "answer":
            records = self.pace.answer * (item.stop - item.start) if isinstance(item, ScoreTask) else 0.0
            self._driver_free = max(self._driver_free, self._now) + records
            self.driver += records
            self.schedule.answer(worker, item, None, self._now)
        elif what == "lost":
            self.lost += 1
            self.gave_up += self.schedule.lose(worker) is not None
            self.hire(self._now)
        else:
            if what == "done":
                self.schedule.finish(worker)
            self._idle.append(worker)
        return what


def _seconds(item: WorkItem, walked: dict[Hashable, float], pace: CostModel) -> float:
    """Return how long a worker takes for the passes of a item, and note how far up it is then."""
    if isinstance(item, ScoreTask) and item.split == WRITING:
        return (item.stop - item.start) * pace.write
    seconds = item.cost * pace.work
    if isinstance(item, ScoreTask):
        examples, below = item.stop - item.start, 1 - item.share
        at = walked.get(item.affinity, 0.0)
        seconds += examples * pace.example + max(0.0, below - at) * examples * pace.work
        walked[item.affinity] = max(at, below)
    return seconds
