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

__all__ = ["CostModel", "Simulation", "simulate"]


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
    """

    work: float
    example: float = 0.0
    decompose: float = 0.0
    start: float = 0.0
    unit: float = 0.0
    answer: float = 0.0


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
    """Let the schedule hand out the items of one stage after the other, and tell how long it takes.

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
    draw = random.Random(seed)
    schedule = Schedule(workers)
    numbers = count()
    queue: list[tuple[float, int, Hashable, str, Any]] = []
    idle: list[Hashable] = []
    boundaries: dict[Hashable, dict[Hashable, float]] = {}  # how far up a worker is, in each affinity
    decomposed: set[str] = set()
    spent, driver, driver_free, lost, gave_up, units, now = 0.0, 0.0, 0.0, 0, 0, 0, 0.0

    def push(when: float, worker: Hashable, what: str, value: Any = None) -> None:
        heapq.heappush(queue, (when, next(numbers), worker, what, value))

    def hire(when: float) -> None:
        worker = next(numbers)
        boundaries[worker] = {}
        push(when + pace.start, worker, "ready")

    def begin(worker: Hashable, unit: Sequence[WorkItem], when: float) -> float:
        """Put the answers of a unit into the queue, or the worker's end; return the time it worked."""
        end = when + draw.expovariate(failures / 3600) if failures else math.inf
        at = when + pace.unit
        for item in unit:
            new = {matrix: n for matrix, n in decompositions(item).items() if matrix not in decomposed}
            at += _seconds(item, boundaries[worker], pace) + sum(new.values()) * pace.decompose
            if at > end:
                push(end, worker, "lost")
                return end - when
            decomposed.update(new)
            push(at, worker, "answer", item)
        push(at, worker, "done")
        return at - when

    for _ in range(workers):
        hire(0.0)
    ends: list[float] = []
    for stage, items in enumerate(stages):
        schedule.want(items)
        later = stages[stage + 1] if stage + 1 in early else ()
        waits = True
        while schedule.open:
            while waits and idle:
                unit = schedule.take(idle[-1], now, speculate=(lambda later=later: later) if later else None)  # type: ignore[misc]
                if not unit:
                    break
                units += 1
                spent += begin(idle.pop(), unit, max(now, driver_free))
            now, _, worker, what, item = heapq.heappop(queue)
            waits = what != "answer"  # an answer gives nobody anything new to do
            if what == "answer":
                records = pace.answer * (item.stop - item.start) if isinstance(item, ScoreTask) else 0.0
                driver_free = max(driver_free, now) + records
                driver += records
                schedule.answer(worker, item, None, now)
            elif what == "lost":
                lost += 1
                gave_up += schedule.lose(worker) is not None
                hire(now)
            else:
                if what == "done":
                    schedule.finish(worker)
                idle.append(worker)
        ends.append(max(now, driver_free))
    seconds = ends[-1] if ends else 0.0
    return Simulation(
        seconds=seconds,
        stages=tuple(b - a for a, b in zip([0.0, *ends], ends, strict=False)),
        busy=min(1.0, spent / (workers * seconds)) if seconds else 1.0,
        driver=driver / seconds if seconds else 0.0,
        lost=lost,
        gave_up=gave_up,
        units=units,
    )


def _seconds(item: WorkItem, walked: dict[Hashable, float], pace: CostModel) -> float:
    """Return how long a worker takes for the passes of a item, and note how far up it is then."""
    found = item.cost * pace.work
    if isinstance(item, ScoreTask):
        examples, below = item.stop - item.start, 1 - item.share
        at = walked.get(item.affinity, 0.0)
        found += examples * pace.example + max(0.0, below - at) * examples * pace.work
        walked[item.affinity] = max(at, below)
    return found
