"""How a run is claimed, left and taken up again."""

from __future__ import annotations

import os
import socket
import threading
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import select, update

from laserlm.errors import RunBusyError, StoreError
from laserlm.store import Store, claim
from laserlm.store.schema import RunRow


def test_a_run_left_unfinished_goes_on(store, sample):
    with store.run(**sample.work()) as first:
        first.record(sample.evaluation("a"), sample.EXAMPLES)
        assert not first.resumed
        assert store.runs()[0].status == "running"
    assert store.runs()[0].status == "interrupted"
    with store.run(**sample.work()) as second:
        assert (second.id, second.resumed, second.outcome) == (first.id, True, None)
        assert second.evaluation("validation", "a") == sample.evaluation("a")
        second.finish({"best": "a"})
        assert second.outcome == {"best": "a"}
    assert [r.status for r in store.runs()] == ["done"]


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [(KeyboardInterrupt(), "interrupted", None), (ValueError("too hot"), "failed", "ValueError: too hot")],
)
def test_a_run_left_by_an_exception_says_so_and_goes_on(store, sample, error, status, reason):
    with pytest.raises(type(error)), store.run(**sample.work()) as first:
        raise error
    (run,) = store.runs()
    assert (run.status, run.reason) == (status, reason)
    with store.run(**sample.work()) as second:
        assert (second.id, second.resumed) == (first.id, True)
        (run,) = store.runs()
        assert (run.status, run.reason) == ("running", None)


def test_a_finished_run_gives_its_outcome_and_writes_nothing(store, sql, sample):
    with store.run(**sample.work()) as first:
        first.record(sample.evaluation("a"), sample.EXAMPLES)
        first.finish({"best": "a"})
        with pytest.raises(StoreError, match="finished"):
            first.finish({"best": "b"})
    before = sql("select * from runs")
    with store.run(**sample.work()) as second:
        assert (second.id, second.resumed, second.outcome) == (first.id, False, {"best": "a"})
        assert second.evaluation("validation", "a") == sample.evaluation("a")
        with pytest.raises(StoreError, match="finished"):
            second.record(sample.evaluation("b"), sample.EXAMPLES)
        with pytest.raises(StoreError, match="finished"):
            second.fail("validation", "b", "no")
    assert sql("select * from runs") == before


def test_an_empty_outcome_is_an_outcome(store, sample):
    with store.run(**sample.work()) as run:
        run.finish({})
    with store.run(**sample.work()) as run:
        assert run.outcome == {}


def test_an_error_after_the_finish_does_not_undo_it(store, sample):
    def finish_and_fail(run):
        run.finish({"best": "a"})
        raise ValueError("late")

    with pytest.raises(ValueError, match="late"), store.run(**sample.work()) as run:
        finish_and_fail(run)
    assert store.runs()[0].status == "done"


@pytest.mark.parametrize("finished", [True, False])
def test_a_restart_makes_a_new_run(store, sample, finished):
    with store.run(**sample.work()) as old:
        old.record(sample.evaluation("a"), sample.EXAMPLES)
        if finished:
            old.finish({})
    with store.run(**sample.work(restart=True)) as new:
        assert new.id != old.id
        assert not new.resumed
        assert new.evaluation("validation", "a") is None
        new.record(sample.evaluation("a"), sample.EXAMPLES)
    with store.run(**sample.work()) as again:
        assert (again.id, again.resumed) == (new.id, True)
    assert store.evaluation(old.id, "validation", "a") == sample.evaluation("a")


def test_keys_are_apart(store, sample):
    with store.run(**sample.work("one")) as one, store.run(**sample.work("two")) as two:
        assert one.id != two.id
        two.record(sample.evaluation("a"), sample.EXAMPLES)
        assert one.evaluation("validation", "a") is None


def test_a_run_has_one_owner_even_within_a_process(store, store_url, sample):
    with store.run(**sample.work()) as run, Store.open(store_url) as other:
        for handle in (store, other):
            busy = pytest.raises(
                RunBusyError,
                match=rf"run {run.id} is .* process {os.getpid()} on {socket.gethostname()} since 2.*--store",
            )
            with busy, handle.run(**sample.work()):
                pass
        run.record(sample.evaluation("a"), sample.EXAMPLES)


def test_a_left_run_takes_nothing_more(store, sample):
    with store.run(**sample.work()) as run:
        pass
    with pytest.raises(RunBusyError, match="no longer owns"):
        run.record(sample.evaluation("a"), sample.EXAMPLES)
    assert store.trials(run.id) == []


def age(store, seconds):
    with store.database.write() as session:
        session.execute(update(RunRow).values(heartbeat=datetime.now(UTC) - timedelta(seconds=seconds)))


def test_a_run_without_heartbeat_is_taken_over_and_its_old_owner_stopped(store, sample, watching):
    with store.run(**sample.work()) as old:
        old.record(sample.evaluation("a"), sample.EXAMPLES)
        age(store, 50)
        with pytest.raises(RunBusyError), store.run(**sample.work()):
            pass
        age(store, 61)
        assert store.runs()[0].status == "interrupted"
        with store.run(**sample.work()) as new:
            assert watching.seconds > 60
            assert (new.id, new.resumed) == (old.id, True)
            for write in (
                lambda: old.record(sample.evaluation("b"), sample.EXAMPLES),
                lambda: old.fail("validation", "b", "no"),
                lambda: old.finish({}),
            ):
                with pytest.raises(RunBusyError, match="another process claimed it"):
                    write()
            old.release("interrupted")
            assert store.runs()[0].status == "running"
            new.record(sample.evaluation("b"), sample.EXAMPLES)
            new.finish({"by": "new"})
    assert [t.intervention for t in store.trials(old.id)] == ["a", "b"]
    assert store.runs()[0].outcome == {"by": "new"}


def test_of_two_that_take_over_at_once_the_second_is_refused(store, sample):
    with store.run(**sample.work()):
        pass
    with store.database.write() as session:
        row = session.scalars(select(RunRow)).one()
        session.execute(
            update(RunRow).values(owner_token="faster", owner_pid=1, owner_host="elsewhere"),
            execution_options={"synchronize_session": False},
        )
        with pytest.raises(RunBusyError, match="process 1 on elsewhere"):
            claim.claim(session, row)


def test_a_process_of_another_host_counts_as_alive_while_it_beats(store, sql, sample, watching):
    with store.run(**sample.work()) as run:
        sql("update runs set owner_pid = :pid", pid=2**22 + 1)
        assert store.runs()[0].status == "interrupted"
        sql("update runs set owner_host = 'elsewhere'")
        assert store.runs()[0].status == "running"
        with pytest.raises(RunBusyError, match="on elsewhere"), store.run(**sample.work()):
            pass
        age(store, 61)
        with store.run(**sample.work()) as new:
            assert new.id == run.id


def test_a_thread_renews_the_heartbeat(store, sample, monkeypatch):
    monkeypatch.setattr(claim, "HEARTBEAT_SECONDS", 0.01)
    with store.run(**sample.work()):
        age(store, 61)
        stop = datetime.now(UTC) + timedelta(seconds=30)
        while store.runs()[0].status != "running" and datetime.now(UTC) < stop:
            pass
        assert store.runs()[0].status == "running"
    assert not [t for t in threading.enumerate() if t.name.startswith("heartbeat")]


def test_a_missed_heartbeat_is_logged_and_tried_again(store, sql, sample, monkeypatch, caplog):
    failures = [StoreError("locked"), StoreError("locked")]
    beaten = threading.Event()
    real = claim.update_owned

    def hold(*arguments, **values):
        if failures:
            raise failures.pop()
        real(*arguments, **values)
        beaten.set()

    monkeypatch.setattr(claim, "HEARTBEAT_SECONDS", 0.01)
    monkeypatch.setattr(claim, "update_owned", hold)
    with store.run(**sample.work()):
        assert beaten.wait(30)
    assert [r.levelname for r in caplog.records if "no heartbeat" in r.message] == ["WARNING", "WARNING"]
