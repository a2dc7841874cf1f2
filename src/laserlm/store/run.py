"""A run that this process works on: record trials and notes, finish or release it."""

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
from laserlm.store.claim import UNCLAIMED, Beat, claim, heartbeat, unless_alive, update_owned
from laserlm.store.database import Database, lock
from laserlm.store.schema import RunRow
from laserlm.store.trials import check, load_evaluation, load_evaluations, load_failures, save_evaluation, save_failure
from laserlm.tasks.example import Example


class Run:
    """A piece of work under one key, opened by ``Store.run``.

    Attributes:
        id: 12 hex characters.
        resumed: whether this resumes an earlier unfinished run with the same key.
        notes: values passed to ``note`` so far, by name.
        outcome: the value passed to ``finish``; None while the run is unfinished.
    """

    def __init__(self, database: Database, row: RunRow, token: str, *, resumed: bool) -> None:
        self.id = row.id
        self.resumed = resumed
        self.notes = row.notes or {}
        self.outcome = row.outcome
        self._database = database
        self._token = token  # empty for a finished run

    def evaluation(self, split: str, intervention: str) -> Evaluation | None:
        """Return a recorded evaluation, or None if the trial is missing or failed."""
        with self._database.read() as session:
            return load_evaluation(session, self.id, split, intervention)

    def trials(self, split: str) -> tuple[dict[str, Evaluation], dict[str, str]]:
        """Return the scores and the reasons of failures on a split, by intervention; a trial may have both."""
        return {e.intervention: e for e in self.evaluations(split)}, self.failures(split)

    def evaluations(self, split: str) -> Iterator[Evaluation]:
        """Yield the evaluations of the trials on a split that have scores, a part of them in memory at a time."""
        with self._database.read() as session:
            yield from load_evaluations(session, self.id, split)

    def failures(self, split: str) -> dict[str, str]:
        """Return why trials on a split have no scores, or no further ones, by intervention."""
        with self._database.read() as session:
            return load_failures(session, self.id, split)

    def record(self, evaluation: Evaluation, examples: Sequence[Example], *, start: int = 0) -> None:
        """Save a new trial with all its scores, or append scores to a trial; after an error nothing is saved.

        Args:
            evaluation: the scores to save.
            examples: the scored examples, in the order of the scores.
            start: number of scores that the trial already has.

        Raises:
            StoreError: if the trial failed or does not have ``start`` scores, the scores belong to other examples, a
                log-probability is NaN, or the run is finished.
            RunBusyError: if another process owns the run now.
        """
        check(evaluation, examples)
        with self._owned_session() as session:
            save_evaluation(session, self.id, evaluation, examples, start)

    def fail(self, split: str, intervention: str, reason: str, *, start: int = 0) -> None:
        """Save why a trial has no scores, or no scores after the first ``start``.

        Raises:
            StoreError: if the trial failed before or does not have ``start`` scores, or the run is finished.
            RunBusyError: if another process owns the run now.
        """
        with self._owned_session() as session:
            save_failure(session, self.id, split, intervention, reason, start)

    def note(self, name: str, value: Any) -> None:
        """Save a plain JSON value that resuming the run needs, under a name.

        Raises:
            StoreError: if the run is finished.
            RunBusyError: if another process owns the run now.
        """
        notes = self.notes | {name: value}
        with self._owned_session(notes=notes):
            self.notes = notes

    def finish(self, outcome: dict[str, Any]) -> None:
        """Save the outcome (plain JSON values) and end the run.

        Raises:
            StoreError: if the run is already finished.
            RunBusyError: if another process owns the run now.
        """
        with self._owned_session(status="done", outcome=outcome, **UNCLAIMED):
            pass
        self.outcome = outcome

    def release(self, status: str, reason: str | None = None) -> None:
        """Release the claim and record why, unless the run is finished or another process owns it."""
        if self.outcome is not None:
            return
        try:
            with self._owned_session(status=status, reason=reason, **UNCLAIMED):
                pass
        except RunBusyError:
            pass  # the other process will release it

    @contextmanager
    def _owned_session(self, **values: Any) -> Iterator[Session]:
        if self.outcome is not None:
            raise StoreError(f"run {self.id} is finished and cannot be changed; start a new run with --restart")
        with self._database.write() as session:
            update_owned(session, self.id, self._token, updated=datetime.now(UTC), **values)
            yield session


@contextmanager
def claimed_run(
    database: Database, *, kind: str, key: str, settings: dict[str, Any], provenance: dict[str, Any], restart: bool
) -> Iterator[Run]:
    """Yield the run of this key, and claim it unless it is finished; see ``Store.run``."""
    run = _open_run(database, kind, key, settings, provenance, restart)
    if run.outcome is not None:
        yield run
        return
    try:
        with heartbeat(database, run.id, run._token):
            yield run
    except BaseException as error:
        failed = isinstance(error, Exception)  # KeyboardInterrupt and SystemExit are requests to stop
        try:
            run.release("failed" if failed else "interrupted", f"{type(error).__name__}: {error}" if failed else None)
        except StoreError as second:
            error.add_note(f"the run could not be released either: {second}")
        raise
    run.release("interrupted")


def _open_run(
    database: Database, kind: str, key: str, settings: dict[str, Any], provenance: dict[str, Any], restart: bool
) -> Run:
    if missing := {"model", "task"} - settings.keys():
        raise StoreError(f"the settings of the run lack {', '.join(sorted(missing))}; they have {', '.join(settings)}")
    newest = select(RunRow).where(RunRow.key == key).order_by(RunRow.number.desc()).limit(1)

    def open_free(dead: Beat | None) -> Run:
        with database.write() as session:
            lock(session.connection(), f"run {key}")
            row = None if restart else session.scalars(newest.with_for_update()).first()
            if row is not None and row.status == "done":
                return Run(database, row, "", resumed=False)
            resumed = row is not None
            if row is None:
                row = _new_row(kind, key, settings, provenance)
                session.add(row)
                session.flush()
            return Run(database, row, claim(session, row, dead), resumed=resumed)

    return unless_alive(database, newest, open_free)


def _new_row(kind: str, key: str, settings: dict[str, Any], provenance: dict[str, Any]) -> RunRow:
    now = datetime.now(UTC)
    return RunRow(
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
