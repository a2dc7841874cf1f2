"""The schedule by itself: workers are names, time is a number."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import pytest

from laserlm.searching.schedule import FIRST_PATIENCE_SECONDS, MAX_TRIES, PATIENCE_SECONDS, Schedule
from laserlm.searching.scorer import PrefixScorer


@dataclass(frozen=True)
class Job:
    """A work item that is nothing but its name."""

    name: str
    affinity: str = "all"
    batch_key: str = "all"
    cost: float = 1.0

    def execute(self, scorer: PrefixScorer) -> Any:
        raise AssertionError


def jobs(n: int, **options: Any) -> list[Job]:
    return [Job(str(i), **options) for i in range(n)]


def names(items: list[Any]) -> list[str]:
    return [item.name for item in items]


def test_units_grow_small_towards_the_end() -> None:
    schedule = Schedule(2)
    schedule.want(jobs(16))
    sizes = []
    while unit := schedule.take("a", 0):
        sizes.append(len(unit))
        for item in unit:
            assert schedule.answer("a", item, None, 0)
        schedule.finish("a")
    assert sizes == [4, 3, 2, 1, 1, 1, 1, 1, 1, 1]
    assert not schedule.open


def test_a_unit_has_one_affinity_and_one_batch_key() -> None:
    schedule = Schedule(1)
    schedule.want([Job("0"), Job("1"), Job("2", batch_key="other"), Job("3", affinity="far"), Job("4", affinity="far")])
    assert names(schedule.take("a", 0)) == ["0", "1"]
    assert names(schedule.take("b", 0)) == ["3"]


def test_a_worker_stays_where_it_is_and_others_go_where_nobody_is() -> None:
    schedule = Schedule(9)
    schedule.want([Job(f"{home}{i}", affinity=home, batch_key=str(i)) for home in "xyz" for i in range(4)])
    durations = {worker: schedule.take(worker, 0)[0].name for worker in "abcd"}
    assert durations == {"a": "x0", "b": "y0", "c": "z0", "d": "x1"}
    for worker in "ab":
        schedule.finish(worker)  # nothing was answered: it waits again, before the others
    assert names(schedule.take("b", 0)) == ["y0"]
    assert names(schedule.take("a", 0)) == ["x0"]


def test_what_a_lost_worker_had_goes_to_others_and_what_it_was_at_goes_alone() -> None:
    schedule = Schedule(1)
    schedule.want(jobs(8))
    unit = schedule.take("a", 0)
    assert names(unit) == ["0", "1", "2", "3"]
    schedule.answer("a", unit[0], None, 1)
    assert schedule.lose("a") is None
    assert names(schedule.take("b", 1)) == ["1"]
    assert names(schedule.take("c", 1)) == ["2", "3", "4"]


def test_a_piece_that_ends_every_worker_is_abandoned_and_the_rest_goes_on() -> None:
    schedule = Schedule(1)
    schedule.want(jobs(5))
    lost: list[str] = []
    answered: list[str] = []
    workers = iter(range(100))
    while schedule.open:
        worker = next(workers)
        for item in schedule.take(worker, 0):
            if item.name == "2":  # type: ignore[attr-defined]
                gave_up = schedule.lose(worker)
                lost.append(gave_up.name if gave_up else "")  # type: ignore[attr-defined]
                break
            schedule.answer(worker, item, None, 0)
            answered.append(item.name)  # type: ignore[attr-defined]
        else:
            schedule.finish(worker)
    assert lost == [""] * (MAX_TRIES - 1) + ["2"]
    assert sorted(answered) == ["0", "1", "3", "4"]


def test_a_slow_workers_pieces_are_doubled_once_and_the_first_answer_counts() -> None:
    schedule = Schedule(4)
    schedule.want(jobs(8, batch_key="same"))
    slow = schedule.take("slow", 0)
    now = 0.0
    while unit := schedule.take("quick", now):
        for item in unit:
            now += 1
            schedule.answer("quick", item, None, now)
        schedule.finish("quick")
        if unit == slow:
            break
    assert 3 * 1.0 < now <= 9
    assert not schedule.open
    assert schedule.useless("slow")
    assert schedule.take("third", now + 100) == []
    assert not schedule.answer("slow", slow[0], "late", now + 100)
    schedule.finish("slow")
    assert schedule.want(jobs(0)) == []


def test_pieces_of_two_workers_that_hang_go_to_a_third() -> None:
    schedule = Schedule(4)
    schedule.want(jobs(3))
    for item in schedule.take("quick", 0):
        schedule.answer("quick", item, None, 0.1)
    schedule.finish("quick")
    hung = schedule.take("hung", 0.1)
    assert schedule.take("other", 0.2) != hung
    schedule.finish("other")
    for item in schedule.take("other", 0.3):
        schedule.answer("other", item, None, 0.4)
    schedule.finish("other")
    assert schedule.take("doubles", 10) == hung
    assert schedule.take("third", 10.5) == []
    schedule.lose("doubles")
    assert schedule.take("doubles again", 20) == hung
    assert schedule.take("third", 30) == hung  # both are silent now
    assert schedule.answer("hung", hung[0], "after all", 31)
    assert not schedule.open


def test_a_first_piece_has_ten_minutes() -> None:
    schedule = Schedule(1)
    schedule.want(jobs(1))
    (item,) = schedule.take("hung", 0)
    assert schedule.take("other", FIRST_PATIENCE_SECONDS - 1) == []
    assert schedule.take("other", FIRST_PATIENCE_SECONDS + 1) == [item]


def test_who_had_not_begun_is_not_to_blame() -> None:
    schedule = Schedule(1)
    schedule.want(jobs(1))
    for worker in range(2 * MAX_TRIES):
        (item,) = schedule.take(worker, 0)
        assert schedule.suspected(item) == (worker > 0)
        assert schedule.lose(worker, begun=False) is None
    for worker in range(10, 10 + MAX_TRIES - 1):
        assert len(schedule.take(worker, 0)) == 1
        gave_up = schedule.lose(worker)
    assert gave_up is not None
    assert not schedule.open


def test_nobody_is_slow_within_seconds() -> None:
    schedule = Schedule(1)
    schedule.want(jobs(2, batch_key="same"))
    for item in schedule.take("a", 0):
        schedule.answer("a", item, None, 0.001)
    schedule.finish("a")
    assert len(schedule.take("b", 0)) == 1
    assert schedule.take("c", PATIENCE_SECONDS / 2) == []
    assert len(schedule.take("c", PATIENCE_SECONDS * 2)) == 1


def test_idle_workers_begin_what_may_come_and_it_is_not_done_twice() -> None:
    schedule = Schedule(2)
    now, later = jobs(1), [Job("next"), Job("never"), Job("soon")]
    schedule.want(now)
    schedule.take("a", 0)
    for worker, expected in (("b", "next"), ("c", "never"), ("d", "soon")):
        assert names(schedule.take(worker, 0, speculate=lambda: later)) == [expected]
        assert not schedule.useless(worker)
    assert schedule.take("e", 0, speculate=lambda: later) == []
    assert not schedule.answer("b", later[0], "early", 1)
    schedule.finish("b")
    assert schedule.answer("a", now[0], "now", 1)
    schedule.finish("a")
    assert schedule.want([later[0], later[2], Job("more")]) == [(later[0], "early")]
    assert schedule.useless("c")
    assert not schedule.useless("d")
    assert names(schedule.take("a", 1)) == ["more"]
    assert schedule.take("b", 1) == []
    assert schedule.answer("d", later[2], "in time", 2)
    assert not schedule.answer("c", later[1], "for nothing", 2)


def test_what_is_needless_is_not_begun() -> None:
    schedule = Schedule(1)
    schedule.want(jobs(4))
    assert names(schedule.take("a", 0, is_cancelled=lambda item: item.name != "2")) == ["2"]
    assert schedule.take("b", 0, is_cancelled=lambda item: item.name != "2") == []


@pytest.mark.parametrize("seed", range(20))
def test_whatever_happens_every_piece_is_answered_once(seed: int) -> None:
    draw = random.Random(seed)
    expected = [
        Job(f"{home}-{i}", affinity=str(home), batch_key=str(i // 3), cost=draw.uniform(0.5, 4))
        for home in range(draw.randint(1, 4))
        for i in range(draw.randint(1, 30))
    ]
    poison = {job for job in expected if draw.random() < 0.05}
    schedule = Schedule(draw.randint(1, 8))
    assert schedule.want(expected) == []
    units: dict[int, list[Any]] = {i: [] for i in range(schedule.workers)}
    answered: list[Any] = []
    gave_up: list[Any] = []
    busy: set[int] = set()
    numbers = iter(range(100, 10**6))
    now = 0.0
    while schedule.open:
        now += 0.3
        worker = draw.choice(list(units))
        if worker not in busy:
            units[worker] = list(schedule.take(worker, now))
            if units[worker]:
                busy.add(worker)
        elif not units[worker]:
            schedule.finish(worker)
            busy.remove(worker)
        elif units[worker][0] in poison or draw.random() < 0.1:
            result = schedule.lose(worker)
            if result is not None:
                gave_up.append(result)
            del units[worker]
            units[next(numbers)] = []
        elif draw.random() < 0.8:  # the others are slow
            item = units[worker].pop(0)
            if schedule.answer(worker, item, None, now):
                answered.append(item)
    assert len(answered) == len(set(answered))
    assert sorted(j.name for j in {*answered, *gave_up}) == sorted(j.name for j in expected)
    assert not set(answered) & set(gave_up)
    assert poison.isdisjoint(answered)
