"""Who owns a run does not depend on clocks: those of two hosts differ, a clock jumps, and a process may stand still."""

from __future__ import annotations

import logging
import signal
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import update

from laserlm.errors import RunBusyError
from laserlm.store import claim
from laserlm.store.schema import RunRow

HOUR = 3600


def set_heartbeat(store, seconds):
    """Write a heartbeat as a host does whose clock is ahead by so many seconds."""
    with store.database.write() as session:
        session.execute(update(RunRow).values(heartbeat=datetime.now(UTC) + timedelta(seconds=seconds)))


@pytest.mark.parametrize("ahead", [-HOUR, -61, -60, 60, 61, HOUR])
def test_a_live_process_on_a_host_with_another_clock_keeps_its_run(store, sql, sample, watching, ahead):
    with store.run(**sample.work()) as run:
        sql("update runs set owner_host = 'elsewhere'")
        set_heartbeat(store, ahead)
        watching.meanwhile = lambda seconds: set_heartbeat(store, ahead + seconds) if seconds % 15 == 0 else None
        for refused in (lambda: store.run(**sample.work()).__enter__(), lambda: store.delete(run.id)):
            with pytest.raises(RunBusyError, match="on elsewhere"):
                refused()
        assert watching.seconds <= 30  # each time up to the next heartbeat, or not at all
        run.record(sample.evaluation("a"), sample.EXAMPLES)


@pytest.mark.parametrize("ahead", [-HOUR, -61, 61, HOUR])
def test_a_process_that_ended_on_a_host_with_another_clock_is_followed(store, sql, sample, watching, ahead):
    with store.run(**sample.work()) as old:
        sql("update runs set owner_host = 'elsewhere'")
        set_heartbeat(store, ahead)
        with store.run(**sample.work()) as new:
            assert (new.id, new.resumed) == (old.id, True)
            assert watching.seconds > 60
            new.finish({})


@pytest.mark.parametrize("jump", [-HOUR, HOUR])
def test_a_clock_that_jumps_takes_no_run_away(store, sample, watching, monkeypatch, jump):
    real = claim.database_time
    with store.run(**sample.work()) as run:
        monkeypatch.setattr(claim, "database_time", lambda session: real(session) + timedelta(seconds=jump))
        watching.meanwhile = lambda seconds: set_heartbeat(store, seconds) if seconds == 15 else None
        with pytest.raises(RunBusyError), store.run(**sample.work()):
            pass
        assert watching.seconds == 15
        run.record(sample.evaluation("a"), sample.EXAMPLES)


def test_heartbeats_on_a_server_are_of_its_clock(store, sample, monkeypatch):
    class Ahead(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.now(tz) + timedelta(seconds=HOUR)

    monkeypatch.setattr(claim, "datetime", Ahead)
    with store.run(**sample.work()), store.database.read() as session:
        heartbeat = session.query(RunRow.heartbeat).scalar()
        on_server = session.get_bind().dialect.name == "postgresql"
        assert (heartbeat - datetime.now(UTC) < timedelta(minutes=1)) == on_server
        assert store.runs()[0].status == "running"


def test_a_run_that_changes_hands_while_it_is_watched_is_left_alone(store, sql, sample, watching):
    with store.run(**sample.work()):
        sql("update runs set owner_host = 'elsewhere'")
        set_heartbeat(store, -HOUR)
        watching.meanwhile = lambda seconds: sql("update runs set owner_token = 'third', owner_host = 'third'")
        with pytest.raises(RunBusyError, match="on third"), store.run(**sample.work()):
            pass


def test_a_stopped_process_that_wakes_up_finds_that_it_lost_its_run(store, start, go, sample, watching):
    process = start("claim")
    go(process)
    assert process.stdout.readline() == "claimed\n"
    process.send_signal(signal.SIGSTOP)
    set_heartbeat(store, -61)
    with store.run(**sample.work()) as run:
        assert run.resumed
        process.send_signal(signal.SIGCONT)
        assert process.communicate("\n")[0] == "busy\n"
        run.finish({"by": "this process"})
    assert store.runs()[0].outcome == {"by": "this process"}


def test_a_process_that_lost_its_run_learns_it_before_it_writes(store, sql, sample, monkeypatch, caplog):
    monkeypatch.setattr(claim, "HEARTBEAT_SECONDS", 0.01)
    with caplog.at_level(logging.WARNING), store.run(**sample.work()):
        sql("update runs set owner_token = 'other'")
        end = datetime.now(UTC) + timedelta(seconds=30)
        while "no longer owns" not in caplog.text and datetime.now(UTC) < end:
            pass
    assert "this process no longer owns run" in caplog.text


def test_a_finished_run_is_not_reported_as_lost(store, sample, monkeypatch, caplog):
    monkeypatch.setattr(claim, "HEARTBEAT_SECONDS", 0.01)
    with caplog.at_level(logging.WARNING), store.run(**sample.work()) as run:
        run.finish({})
        end = datetime.now(UTC) + timedelta(seconds=0.1)
        while datetime.now(UTC) < end:
            pass
    assert caplog.text == ""
