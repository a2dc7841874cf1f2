"""The claim on a run: one process at a time owns it, and a heartbeat shows that the process is alive."""

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

__all__ = ["UNCLAIMED", "busy_error", "claim", "current_status", "heartbeat", "is_alive", "update_owned"]

HEARTBEAT_SECONDS = 15.0
HEARTBEAT_TIMEOUT = timedelta(seconds=60)
UNCLAIMED = {"owner_token": None, "owner_host": None, "owner_pid": None, "claimed": None, "heartbeat": None}

log = logging.getLogger(__name__)


def is_alive(run: RunRow) -> bool:
    """Return whether a process works on the run: its heartbeat is recent and, on this host, its process exists."""
    if run.owner_token is None or run.heartbeat is None or run.owner_pid is None:
        return False
    if datetime.now(UTC) - run.heartbeat > HEARTBEAT_TIMEOUT:
        return False
    return run.owner_host != socket.gethostname() or _exists(run.owner_pid)


def current_status(run: RunRow) -> str:
    """Return the status of the run. A run is interrupted if its row says ``running`` but its process was killed.

    Runs of kind ``scores`` are never finished, because studies add scores to them. Their status is ``open``.
    """
    status = "interrupted" if run.status == "running" and not is_alive(run) else run.status
    return "open" if run.kind == "scores" and status == "interrupted" else status


def busy_error(run: RunRow) -> RunBusyError:
    """Return an error that names the process that works on the run."""
    since = f"{run.claimed:%Y-%m-%d %H:%M:%S} UTC" if run.claimed else "a moment ago"
    return RunBusyError(
        f"run {run.id} is being worked on by process {run.owner_pid} on {run.owner_host} since {since}; "
        "wait for it, or use another database with --store"
    )


def claim(session: Session, run: RunRow) -> str:
    """Claim the run for this process and return the claim's token.

    Raises:
        RunBusyError: if a live process owns the run or claims it at the same moment.
    """
    if is_alive(run):
        raise busy_error(run)
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
            heartbeat=now,
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
        .values({"heartbeat": datetime.now(UTC)} | values)
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
            except RunBusyError:
                return  # the next write in the main thread raises the same error
            except StoreError as error:
                log.warning("no heartbeat of run %s, trying again: %s", run_id, error)

    thread = threading.Thread(target=renew, name=f"heartbeat of run {run_id}", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


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
