"""The claim on a run: one process at a time owns it, and a heartbeat shows that the process is alive.

No clock decides who owns a run, because the clocks of two hosts differ and any clock may jump. A process takes a run over
only if it has watched the heartbeat for ``HEARTBEAT_TIMEOUT`` and seen no change.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

from sqlalchemy import Select, func, select, update
from sqlalchemy.orm import Session

from laserlm.errors import RunBusyError, StoreError
from laserlm.store.database import Database
from laserlm.store.schema import RunRow

HEARTBEAT_SECONDS = 15.0
HEARTBEAT_TIMEOUT = timedelta(seconds=60)
WATCH_SECONDS = 1.0
"""Seconds between two looks at a heartbeat that seems to have stopped."""
UNCLAIMED = {"owner_token": None, "owner_host": None, "owner_pid": None, "claimed": None, "heartbeat": None}

T = TypeVar("T")
Beat = tuple[str | None, datetime | None]
"""Token of a claim, and its last heartbeat."""

log = logging.getLogger(__name__)


def database_time(session: Session) -> datetime:
    """Return the time by which heartbeats are written: that of the server, or of this host for an SQLite file."""
    if session.get_bind().dialect.name == "postgresql":
        now: datetime = session.execute(select(func.clock_timestamp())).scalar_one()
        return now
    return datetime.now(UTC)


def current_status(run: RunRow, now: datetime) -> str:
    """Return the status of the run at a time of the database. A run is interrupted if it says ``running`` but seems left.

    Runs of kind ``scores`` are never finished, because studies add scores to them. Their status is ``open``.
    """
    status = "interrupted" if run.status == "running" and not _seems_alive(run, now) else run.status
    return "open" if run.kind == "scores" and status == "interrupted" else status


def unless_alive(database: Database, query: Select[RunRow], act: Callable[[Beat | None], T]) -> T:
    """Return what ``act`` does with a run that no live process owns.

    Args:
        database: where the run is.
        query: selects the run.
        act: claims or deletes the run in a transaction. It is called with None. If that raises a RunBusyError, it is called
            again, with the claim of the owner if that process turns out to have stopped.

    Raises:
        RunBusyError: if a live process owns the run.
    """
    try:
        return act(None)
    except RunBusyError:
        return act(_dead_claim(database, query))


def _dead_claim(database: Database, query: Select[RunRow]) -> Beat | None:
    """Return the claim of a process that has stopped without releasing its run, or None.

    If the heartbeat is recent by the database's clock, return None at once. If it seems old, look for the next one for
    ``HEARTBEAT_TIMEOUT``. Looks are counted, so that a time in which this process was suspended too does not count. The wait
    must not happen within a transaction, which would keep the owner from writing.
    """
    first: Beat | None = None
    for _ in range(1 + HEARTBEAT_TIMEOUT // timedelta(seconds=WATCH_SECONDS)):
        with database.read() as session:
            run = session.scalars(query).first()
            if run is None or not _may_be_alive(run) or _seems_alive(run, database_time(session)):
                return None
            beat = run.owner_token, run.heartbeat
            if first is None:
                first = beat
                log.warning(
                    "run %s belongs to process %s on %s, which seems to have stopped; waiting up to %g s for its heartbeat",
                    run.id,
                    run.owner_pid,
                    run.owner_host,
                    HEARTBEAT_TIMEOUT.total_seconds(),
                )
        if beat != first:
            return None
        time.sleep(WATCH_SECONDS)
    return first


def require_free(run: RunRow, dead: Beat | None) -> None:
    """Raise a RunBusyError if a process owns the run, unless by the claim of a process that has stopped."""
    if _may_be_alive(run) and (run.owner_token, run.heartbeat) != dead:
        raise busy_error(run)


def busy_error(run: RunRow) -> RunBusyError:
    """Return an error that names the process that works on the run."""
    since = f"{run.claimed:%Y-%m-%d %H:%M:%S} UTC" if run.claimed else "a moment ago"
    return RunBusyError(
        f"run {run.id} is being worked on by process {run.owner_pid} on {run.owner_host} since {since}; "
        "wait for it, or use another database with --store"
    )


def claim(session: Session, run: RunRow, dead: Beat | None = None) -> str:
    """Claim the run for this process and return the claim's token.

    Args:
        session: writes the claim.
        run: as it was read in this session.
        dead: the claim that may be taken over; see ``unless_alive``.

    Raises:
        RunBusyError: if another process owns the run or claims it at the same moment.
    """
    require_free(run, dead)
    now = datetime.now(UTC)
    token = secrets.token_hex(8)
    # The row must still have the owner and heartbeat that were read, so that only one of two processes succeeds.
    claimed_id = session.scalars(
        update(RunRow)
        .where(RunRow.id == run.id)
        .where(RunRow.owner_token.is_not_distinct_from(run.owner_token))
        .where(RunRow.heartbeat.is_not_distinct_from(run.heartbeat))
        .values(
            owner_token=token,
            owner_host=socket.gethostname(),
            owner_pid=os.getpid(),
            claimed=now,
            heartbeat=database_time(session),
            updated=now,
            status="running",
            reason=None,
        )
        .returning(RunRow.id)
        .execution_options(synchronize_session=False)
    ).first()
    if claimed_id is None:
        session.refresh(run)
        raise busy_error(run)
    return token


def update_owned(session: Session, run_id: str, token: str, **values: Any) -> None:
    """Set columns of the run and renew its heartbeat. The run cannot be claimed before this transaction ends.

    Raises:
        RunBusyError: if this process no longer owns the run.
    """
    owned_id = session.scalars(
        update(RunRow)
        .where(RunRow.id == run_id, RunRow.owner_token == token)
        .values({"heartbeat": database_time(session)} | values)
        .returning(RunRow.id)
        .execution_options(synchronize_session=False)
    ).first()
    if owned_id is None:
        raise RunBusyError(
            f"this process no longer owns run {run_id}: it released the run, or another process claimed it after "
            f"{HEARTBEAT_TIMEOUT.seconds} seconds without a heartbeat; nothing was written, start again to resume the run"
        )


@contextmanager
def heartbeat(database: Database, run_id: str, token: str) -> Iterator[None]:
    """Renew the heartbeat from a thread inside a ``with`` block."""
    stop = threading.Event()

    def renew() -> None:
        while not stop.wait(HEARTBEAT_SECONDS):
            try:
                with database.write() as session:
                    update_owned(session, run_id, token)
            except RunBusyError as error:
                # The next write of the main thread raises this error. A run that is finished has no owner.
                if _owner(database, run_id) not in (None, token):
                    log.warning("%s", error)
                return
            except StoreError as error:
                log.warning("no heartbeat of run %s, trying again: %s", run_id, error)

    thread = threading.Thread(target=renew, name=f"heartbeat of run {run_id}", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _owner(database: Database, run_id: str) -> str | None:
    with database.read() as session:
        return session.scalars(select(RunRow.owner_token).where(RunRow.id == run_id)).first()


def _may_be_alive(run: RunRow) -> bool:
    """Return whether a process owns the run that is on another host, or exists on this one."""
    if run.owner_token is None or run.owner_pid is None:
        return False
    return run.owner_host != socket.gethostname() or _exists(run.owner_pid)


def _seems_alive(run: RunRow, now: datetime) -> bool:
    return _may_be_alive(run) and run.heartbeat is not None and abs(now - run.heartbeat) <= HEARTBEAT_TIMEOUT


def _exists(pid: int) -> bool:
    if os.name != "posix":
        return True  # on other systems signal 0 ends the process
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
