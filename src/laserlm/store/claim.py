"""Who works on a run: one process at a time holds the claim, and shows with a heartbeat that it is alive."""

from __future__ import annotations

import logging
import os
import secrets
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import update
from sqlalchemy.orm import Session

from laserlm.errors import RunBusyError, StoreError
from laserlm.store.database import Database
from laserlm.store.schema import RunRow

__all__ = ["UNCLAIMED", "alive", "busy_error", "claim", "heartbeat", "shown_status", "update_owned"]

BEAT_SECONDS = 15.0
STALE = timedelta(seconds=60)
UNCLAIMED = {"owner_token": None, "owner_host": None, "owner_pid": None, "claimed": None, "heartbeat": None}

log = logging.getLogger(__name__)


def alive(run: RunRow) -> bool:
    """Return whether a process still works on the run.

    Its last heartbeat is recent, and on this host a process with its number exists.
    """
    if run.owner_token is None or run.heartbeat is None or run.owner_pid is None:
        return False
    if datetime.now(UTC) - run.heartbeat > STALE:
        return False
    return run.owner_host != socket.gethostname() or _exists(run.owner_pid)


def shown_status(run: RunRow) -> str:
    """Return the run's status; that of a killed process still says running, but the run is interrupted.

    The scores of a model on some examples are never done: studies add to them. They are open.
    """
    status = "interrupted" if run.status == "running" and not alive(run) else run.status
    return "open" if run.kind == "scores" and status == "interrupted" else status


def busy_error(run: RunRow) -> RunBusyError:
    """Return the error that names the process that works on the run."""
    since = f"{run.claimed:%Y-%m-%d %H:%M:%S} UTC" if run.claimed else "a moment ago"
    return RunBusyError(
        f"run {run.id} is being worked on by process {run.owner_pid} on {run.owner_host} since {since}; "
        "wait for it, or use another database with --store"
    )


def claim(session: Session, run: RunRow) -> str:
    """Take the run for this process and return the token that proves it.

    Raises:
        RunBusyError: if a live process holds it, or another one is taking it at this moment.
    """
    if alive(run):
        raise busy_error(run)
    now = datetime.now(UTC)
    token = secrets.token_hex(8)
    # Only if the claim is still as it was seen: of two that take over at once, one finds no row.
    taken = session.scalars(
        update(RunRow)
        .where(RunRow.id == run.id)
        .where(RunRow.owner_token.is_not_distinct_from(run.owner_token))
        .where(RunRow.heartbeat.is_not_distinct_from(run.heartbeat))
        .values(
            owner_token=token,
            owner_host=socket.gethostname(),
            owner_pid=os.getpid(),
            claimed=now,
            heartbeat=now,
            updated=now,
            status="running",
            reason=None,
        )
        .returning(RunRow.id)
        .execution_options(synchronize_session=False)
    ).first()
    if taken is None:
        session.refresh(run)
        raise busy_error(run)
    return token


def update_owned(session: Session, run_id: str, token: str, **values: Any) -> None:
    """Set columns of the run and renew its heartbeat; nobody can take the run before this transaction ends.

    Raises:
        RunBusyError: if the claim is no longer ours.
    """
    held = session.scalars(
        update(RunRow)
        .where(RunRow.id == run_id, RunRow.owner_token == token)
        .values({"heartbeat": datetime.now(UTC)} | values)
        .returning(RunRow.id)
        .execution_options(synchronize_session=False)
    ).first()
    if held is None:
        raise RunBusyError(
            f"run {run_id} is no longer held by this process: it was left, or showed no sign of life for "
            f"{STALE.seconds} seconds and was taken over; nothing was written, start again to go on with it"
        )


@contextmanager
def heartbeat(database: Database, run_id: str, token: str) -> Iterator[None]:
    """Renew the heartbeat from a thread until the end of the context."""
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(BEAT_SECONDS):
            try:
                with database.write() as session:
                    update_owned(session, run_id, token)
            except RunBusyError:
                return  # the next write in the main thread meets the same and says so there
            except StoreError as error:
                log.warning("no heartbeat of run %s, trying again: %s", run_id, error)

    thread = threading.Thread(target=beat, name=f"heartbeat of run {run_id}", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _exists(pid: int) -> bool:
    if os.name != "posix":
        return True  # elsewhere signal 0 is not a question but ends the process
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
