"""A run that this process works on: what it records, and how it is left."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from laserlm.errors import RunBusyError, StoreError
from laserlm.scoring.records import Evaluation
from laserlm.store.claim import UNCLAIMED, claim, heartbeat, update_owned
from laserlm.store.database import Database, lock
from laserlm.store.schema import RunRow
from laserlm.store.trials import check, load_evaluation, load_trials, save_evaluation, save_failure
from laserlm.tasks.example import Example

__all__ = ["Run", "claimed_run"]


class Run:
    """A piece of work under one key; made by ``Store.run``.

    Args:
        id: 12 hex characters.
        resumed: whether an earlier unfinished run with the same key goes on.
        notes: what ``note`` was given so far.
        outcome: what ``finish`` was given, None while unfinished.
    """

    def __init__(self, database: Database, row: RunRow, token: str, *, resumed: bool) -> None:
        self.id = row.id
        self.resumed = resumed
        self.notes = row.notes or {}
        self.outcome = row.outcome
        self._database = database
        self._token = token  # empty for a run that was finished before

    def evaluation(self, split: str, intervention: str) -> Evaluation | None:
        """Return what is already recorded, or None where there is nothing or it failed."""
        with self._database.read() as session:
            return load_evaluation(session, self.id, split, intervention)

    def trials(self, split: str) -> tuple[dict[str, Evaluation], dict[str, str]]:
        """Return the scores of a split so far and the reasons of failures, by intervention; one may be in both."""
        with self._database.read() as session:
            return load_trials(session, self.id, split)

    def record(self, evaluation: Evaluation, examples: Sequence[Example], *, start: int = 0) -> None:
        """Save a trial with all its scores, or the next scores of one, or nothing.

        Args:
            evaluation: one that this run does not have yet.
            examples: those it was made from, in the order of its scores.
            start: number of scores that this trial has already, which these follow.

        Raises:
            StoreError: if this run's trial of that split and intervention failed or has not ``start`` scores; if scores
                and examples do not belong together; if a log-probability is NaN; if the run is finished.
            RunBusyError: if another process has taken the run over.
        """
        check(evaluation, examples)
        with self._held() as session:
            save_evaluation(session, self.id, evaluation, examples, start)

    def fail(self, split: str, intervention: str, reason: str, *, start: int = 0) -> None:
        """Save that a trial gave no scores, or no more than the ``start`` it has, and why.

        Raises:
            StoreError: if this run's trial of that split and intervention failed before or has not ``start`` scores; if
                the run is finished.
            RunBusyError: if another process has taken the run over.
        """
        with self._held() as session:
            save_failure(session, self.id, split, intervention, reason, start)

    def note(self, name: str, value: Any) -> None:
        """Save a plain JSON value that the run needs to go on, under a name.

        Raises:
            StoreError: if the run is finished.
            RunBusyError: if another process has taken the run over.
        """
        notes = self.notes | {name: value}
        with self._held(notes=notes):
            self.notes = notes

    def finish(self, outcome: dict[str, Any]) -> None:
        """Save the outcome, plain JSON values, and end the run.

        Raises:
            StoreError: if the run is finished already.
            RunBusyError: if another process has taken the run over.
        """
        with self._held(status="done", outcome=outcome, **UNCLAIMED):
            pass
        self.outcome = outcome

    def release(self, status: str, reason: str | None = None) -> None:
        """Give the claim up and record why, unless the run is finished or another process has taken it over."""
        if self.outcome is not None:
            return
        try:
            with self._held(status=status, reason=reason, **UNCLAIMED):
                pass
        except RunBusyError:
            pass  # taken over: it is the other process that will release it

    @contextmanager
    def _held(self, **values: Any) -> Iterator[Session]:
        if self.outcome is not None:
            raise StoreError(f"run {self.id} is finished and takes nothing more; start a new one with --restart")
        with self._database.write() as session:
            update_owned(session, self.id, self._token, updated=datetime.now(UTC), **values)
            yield session


@contextmanager
def claimed_run(
    database: Database, *, kind: str, key: str, settings: dict[str, Any], provenance: dict[str, Any], restart: bool
) -> Iterator[Run]:
    """Yield the run of this key, claimed unless it is finished; see ``Store.run``."""
    run = _claimed(database, kind, key, settings, provenance, restart)
    if run.outcome is not None:
        yield run
        return
    try:
        with heartbeat(database, run.id, run._token):
            yield run
    except BaseException as error:
        failed = isinstance(error, Exception)  # the rest, such as KeyboardInterrupt, end the process on request
        try:
            run.release("failed" if failed else "interrupted", f"{type(error).__name__}: {error}" if failed else None)
        except StoreError as second:
            error.add_note(f"the run could not be released either: {second}")
        raise
    run.release("interrupted")


def _claimed(
    database: Database, kind: str, key: str, settings: dict[str, Any], provenance: dict[str, Any], restart: bool
) -> Run:
    if missing := {"model", "task"} - settings.keys():
        raise StoreError(f"the settings of a run lack {', '.join(sorted(missing))}; they have {', '.join(settings)}")
    with database.write() as session:
        lock(session.connection(), f"run {key}")
        newest = select(RunRow).where(RunRow.key == key).order_by(RunRow.number.desc()).limit(1).with_for_update()
        row = None if restart else session.scalars(newest).first()
        if row is not None and row.status == "done":
            return Run(database, row, "", resumed=False)
        resumed = row is not None
        if row is None:
            now = datetime.now(UTC)
            row = RunRow(
                id=secrets.token_hex(6),
                key=key,
                kind=kind,
                status="running",
                model=str(settings["model"]),
                task=str(settings["task"]),
                settings=settings,
                provenance=provenance,
                created=now,
                updated=now,
            )
            session.add(row)
            session.flush()
        return Run(database, row, claim(session, row), resumed=resumed)
