"""Several processes on one database, and processes that are killed."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import event
from sqlalchemy.orm import Session

from laserlm.errors import RunBusyError
from laserlm.store import Store


def test_a_killed_run_goes_on_at_once_with_what_it_had(store_url, start, go, sample):
    process = start("two")
    go(process)
    assert process.wait() == -signal.SIGKILL
    with Store.open(store_url) as store:
        (info,) = store.runs()
        assert (info.status, info.trials) == ("interrupted", 2)
        with store.run(**sample.work()) as run:
            assert (run.id, run.resumed) == (info.id, True)
            assert [t.intervention for t in store.trials(run.id)] == ["", "3.fc_in@0.1"]
            for intervention in ("", "3.fc_in@0.1"):
                assert run.evaluation("validation", intervention) == sample.evaluation(intervention)
            run.record(sample.evaluation("b"), sample.EXAMPLES)


def test_a_kill_before_the_commit_leaves_nothing_half_written(store_url, start, go, sql, sample):
    process = start("half")
    go(process)
    assert process.wait() == -signal.SIGKILL
    with Store.open(store_url) as store, store.run(**sample.work()) as run:
        assert [t.intervention for t in store.trials(run.id)] == ["whole"]
        assert run.evaluation("validation", "half") is None
        assert sql("select count(*) from scores") == [(len(sample.EXAMPLES),)]
        run.record(sample.evaluation("half"), sample.EXAMPLES)
        assert run.evaluation("validation", "half") == sample.evaluation("half")


def test_kills_at_any_moment_lose_and_repeat_nothing(store_url, start, go, sample):
    printed = 0
    for _ in range(3):
        process = start("endless")
        go(process)
        for _ in range(7):
            assert process.stdout.readline() == f"{printed}\n"
            printed += 1
        process.kill()
        # What was printed is recorded; the last ones may have been recorded and not read here.
        printed += len(process.stdout.read().splitlines())
        process.wait()
        with Store.open(store_url) as store:
            (info,) = store.runs()
            names = [t.intervention for t in store.trials(info.id)]
            assert names == [str(i) for i in range(len(names))]
            assert printed <= len(names) <= printed + 1
            assert all(store.evaluation(info.id, "validation", n) == sample.evaluation(n) for n in names)
            printed = len(names)


def test_two_processes_record_different_runs_together(store_url, start, go, sample):
    processes = [start("trials", key) for key in ("one", "two")]
    go(*processes)
    assert [p.wait() for p in processes] == [0, 0]
    with Store.open(store_url) as store:
        assert {(r.key, r.status, r.trials) for r in store.runs()} == {("one", "done", 30), ("two", "done", 30)}
        for run in store.runs():
            for i in range(30):
                name = f"{run.key}-{i}"
                assert store.evaluation(run.id, "validation", name) == sample.evaluation(name)


def test_a_second_process_on_a_run_learns_who_works_on_it(store_url, start, go, sample):
    process = start("claim")
    go(process)
    assert process.stdout.readline() == "claimed\n"
    with Store.open(store_url) as store:
        assert store.runs()[0].status == "running"
        with pytest.raises(RunBusyError, match=f"process {process.pid} on "), store.run(**sample.work()):
            pass
        with pytest.raises(RunBusyError, match=f"process {process.pid} on "):
            store.delete(store.runs()[0].id)
        process.communicate("\n")
        with store.run(**sample.work()) as run:
            assert run.outcome == {"by": process.pid}


def test_processes_that_open_a_new_database_together_agree(store_url, start, go):
    processes = [start("open") for _ in range(4)]
    go(*processes)
    assert [p.wait() for p in processes] == [0] * 4
    with Store.open(store_url) as store:
        assert store.runs() == []


def test_of_processes_that_claim_a_run_together_one_gets_it(store_url, start, go):
    processes = [start("claim") for _ in range(3)]
    go(*processes)
    printed = [p.stdout.readline() for p in processes]
    assert sorted(printed) == ["busy\n", "busy\n", "claimed\n"]
    for process in processes:
        process.communicate("\n")
    with Store.open(store_url) as store:
        assert [r.status for r in store.runs()] == ["done"]


def one_after_the_other(*writes: Callable[[], Any]) -> None:
    """Begin a write in a thread, and another one before the first is over, which waits for it."""
    written, end = threading.Event(), threading.Event()

    def pause(session: Session) -> None:
        if threading.current_thread() is first:
            written.set()
            assert end.wait(30)

    first, second = (threading.Thread(target=write) for write in writes)
    event.listen(Session, "before_commit", pause)
    try:
        first.start()
        assert written.wait(30)
        second.start()
        second.join(0.3)
        assert second.is_alive()
    finally:
        end.set()
        first.join()
        second.join()
        event.remove(Session, "before_commit", pause)


def test_two_that_add_the_same_examples_add_them_once(store, sql, sample):
    with store.run(**sample.work("one")) as one, store.run(**sample.work("two")) as two:
        one_after_the_other(
            lambda: one.record(sample.evaluation("a"), sample.EXAMPLES),
            lambda: two.record(sample.evaluation("b"), sample.EXAMPLES),
        )
        assert one.evaluation("validation", "a") == sample.evaluation("a")
        assert two.evaluation("validation", "b") == sample.evaluation("b")
    assert sql("select count(*) from examples") == [(10,)]


@pytest.mark.parametrize("order", [1, -1])
def test_a_deletion_leaves_examples_that_another_run_scores_at_this_moment(store, sample, order):
    with store.run(**sample.work("old")) as old:
        old.record(sample.evaluation("a"), sample.EXAMPLES)
    with store.run(**sample.work("new")) as new:
        writes = (lambda: store.delete(old.id), lambda: new.record(sample.evaluation("a"), sample.EXAMPLES))
        one_after_the_other(*writes[::order])
        assert new.evaluation("validation", "a") == sample.evaluation("a")
    assert [r.id for r in store.runs()] == [new.id]


def test_a_run_that_is_deleted_when_it_is_taken_up_is_a_new_one(store, sample):
    with store.run(**sample.work()) as old:
        pass
    durations = []

    def take():
        with store.run(**sample.work()) as run:
            durations.append(run)

    one_after_the_other(lambda: store.delete(old.id), take)
    (new,) = durations
    assert not new.resumed
    assert [r.id for r in store.runs()] == [new.id]


def test_a_run_that_is_taken_up_when_it_is_deleted_is_kept(store, sample):
    with store.run(**sample.work()) as old:
        pass
    refused = threading.Event()

    def take():
        with store.run(**sample.work()):
            assert refused.wait(30)

    def delete():
        with pytest.raises(RunBusyError, match=old.id):
            store.delete(old.id)
        refused.set()

    one_after_the_other(take, delete)
    assert [r.id for r in store.runs()] == [old.id]
