"""The results database as the rest of laserlm sees it."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import datetime
from difflib import get_close_matches
from pathlib import Path
from types import TracebackType
from typing import Any

from sqlalchemy import ScalarSelect, delete, exists, func, select
from sqlalchemy.orm import Session

from laserlm.errors import StoreError
from laserlm.scoring.records import Evaluation
from laserlm.store.claim import alive, busy_error, shown_status
from laserlm.store.database import Database, lock
from laserlm.store.export import export_run
from laserlm.store.run import Run, claimed_run
from laserlm.store.schema import ExampleRow, RunRow, ScoreRow, TrialRow
from laserlm.store.trials import load_evaluation, load_examples, load_trials
from laserlm.tasks.example import Example

__all__ = ["RunInfo", "Store", "TrialInfo"]


@dataclass(frozen=True)
class RunInfo:
    """What a listing shows of a run.

    Args:
        id: 12 hex characters.
        kind: what was done, such as ``search``.
        status: ``running``, ``interrupted``, ``done`` or ``failed``; all but ``done`` are resumed under the same key. Scores
            that studies add to are ``open``.
        key: what identifies the work.
        model: the model's name.
        task: the task's name.
        created: when it was first started, aware, in UTC.
        updated: when it last wrote something, likewise.
        trials: number of trials recorded, the failed ones too.
        settings: as given to ``Store.run`` when it was created.
        provenance: likewise.
        outcome: as given to ``Run.finish``, None while unfinished.
        reason: why it failed, None otherwise.
    """

    id: str
    kind: str
    status: str
    key: str
    model: str
    task: str
    created: datetime
    updated: datetime
    trials: int
    settings: dict[str, Any]
    provenance: dict[str, Any]
    outcome: dict[str, Any] | None
    reason: str | None = None


@dataclass(frozen=True)
class TrialInfo:
    """What a listing shows of a trial; the figures are None where it failed.

    Args:
        split: ``validation``, ``test`` or ``all``.
        intervention: canonical text, empty for the unchanged model.
        status: ``done`` or ``failed``.
        reason: why it failed.
        n: number of examples.
        accuracy: share of them that are correct.
        loss: mean over them of the log-loss in nats per answer token.
        seconds: wall time of the forward passes.
        scorer: how an example was scored.
    """

    split: str
    intervention: str
    status: str
    reason: str | None
    n: int | None
    accuracy: float | None
    loss: float | None
    seconds: float | None
    scorer: str | None


class Store:
    """The runs of a results database, to be closed or used as a context manager."""

    def __init__(self, database: Database) -> None:
        self.database = database

    @classmethod
    def open(cls, where: str | Path) -> Store:
        """Open a results database, and create or migrate it where needed.

        Args:
            where: path of an SQLite file, or a SQLAlchemy URL of SQLite or PostgreSQL if it contains ``://``.

        Raises:
            StoreError: if it cannot be opened, or was written by a newer laserlm.
        """
        return cls(Database(where))

    def __enter__(self) -> Store:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close all connections."""
        self.database.close()

    def run(
        self, *, kind: str, key: str, settings: dict[str, Any], provenance: dict[str, Any], restart: bool = False
    ) -> AbstractContextManager[Run]:
        """Work on the newest run with this key, or on a new one, until the end of the context.

        A finished run comes with its outcome, and nothing is written. Left without ``Run.finish`` or by Ctrl-C, the run
        is interrupted, by another exception failed; either can be resumed, and so can that of a killed process.

        Args:
            kind: what is done, such as ``search``.
            key: what identifies the work: equal for equal model, task, grid and settings.
            settings: plain JSON values, ``model`` and ``task`` among them.
            provenance: see ``laserlm.provenance``.
            restart: make a new run even if there is one.

        Raises:
            RunBusyError: if a live process works on the run.
        """
        return claimed_run(self.database, kind=kind, key=key, settings=settings, provenance=provenance, restart=restart)

    def runs(self) -> list[RunInfo]:
        """Return all runs, the newest first."""
        with self.database.read() as session:
            rows = session.execute(select(RunRow, _trial_count()).order_by(RunRow.number.desc()))
            return [_run_info(row, trials) for row, trials in rows]

    def find(self, id_or_prefix: str, kind: str | None = None) -> RunInfo:
        """Return the run, of one kind where that is given, whose id begins so; ``last`` is the newest search.

        Scores that studies keep are runs too, and newer ones; they are ``last`` only where there is no search.

        Raises:
            StoreError: if there is no such run, or more than one.
        """
        runs = [run for run in self.runs() if kind is None or run.kind == kind]
        if id_or_prefix == "last" and runs:
            return next((run for run in runs if run.kind == "search"), runs[0])
        prefix = id_or_prefix.lower()
        found = [run for run in runs if prefix and run.id.startswith(prefix)]
        if len(found) == 1:
            return found[0]
        if found:
            raise StoreError(
                f"{id_or_prefix!r} begins the ids of {len(found)} runs: {', '.join(run.id for run in found[:5])}; "
                "write more of one, see 'laser runs list'"
            )
        near = get_close_matches(prefix, [run.id for run in runs], n=3, cutoff=0.5)
        hint = f"; near it are {', '.join(near)}" if near else ""
        raise StoreError(f"no run {id_or_prefix!r} among {len(runs)} in {self.database.name}{hint}; see 'laser runs list'")

    def evaluation(self, run_id: str, split: str, intervention: str) -> Evaluation | None:
        """Return an evaluation as it was recorded, or None where there is none or it failed."""
        with self.database.read() as session:
            _row(session, run_id)
            return load_evaluation(session, run_id, split, intervention)

    def trials(self, run_id: str) -> list[TrialInfo]:
        """Return the trials of a run in the order they were recorded."""
        with self.database.read() as session:
            _row(session, run_id)
            rows = session.scalars(select(TrialRow).where(TrialRow.run_id == run_id).order_by(TrialRow.id))
            return [
                TrialInfo(t.split, t.intervention, t.status, t.reason, t.n, t.accuracy, t.loss, t.seconds, t.scorer)
                for t in rows
            ]

    def evaluations(self, run_id: str, split: str) -> dict[str, Evaluation]:
        """Return the scores of every trial of a split that has some, by intervention."""
        with self.database.read() as session:
            _row(session, run_id)
            return load_trials(session, run_id, split)[0]

    def examples(self, run_id: str, split: str) -> tuple[Example, ...]:
        """Return the examples that the unchanged model was scored on in a run, in the order of its scores."""
        with self.database.read() as session:
            _row(session, run_id)
            return load_examples(session, run_id, split)

    def notes(self, run_id: str) -> dict[str, Any]:
        """Return what a run keeps beside its trials, by name."""
        with self.database.read() as session:
            return dict(_row(session, run_id).notes or {})

    def export(self, run_id: str) -> dict[str, Any]:
        """Return everything of a run as plain JSON values; a score names its example by the place in ``examples``."""
        with self.database.read() as session:
            return export_run(session, _row(session, run_id))

    def delete(self, run_id: str) -> None:
        """Delete a run with its trials and scores, and the examples that no other run scored.

        Raises:
            RunBusyError: if a live process works on the run.
        """
        with self.database.write() as session:
            row = _row(session, run_id, update=True)
            if alive(row):
                raise busy_error(row)
            session.execute(delete(RunRow).where(RunRow.id == run_id))
            lock(session.connection(), "examples")
            session.execute(
                delete(ExampleRow)
                .where(~exists().where(ScoreRow.example_id == ExampleRow.id))
                .execution_options(synchronize_session=False)
            )


def _row(session: Session, run_id: str, *, update: bool = False) -> RunRow:
    query = select(RunRow).where(RunRow.id == run_id)
    row = session.scalars(query.with_for_update() if update else query).one_or_none()
    if row is None:
        raise StoreError(f"no run {run_id!r}; see 'laser runs list'")
    return row


def _trial_count() -> ScalarSelect[int]:
    return select(func.count(TrialRow.id)).where(TrialRow.run_id == RunRow.id).scalar_subquery()


def _run_info(row: RunRow, trials: int) -> RunInfo:
    return RunInfo(
        id=row.id,
        kind=row.kind,
        status=shown_status(row),
        key=row.key,
        model=row.model,
        task=row.task,
        created=row.created,
        updated=row.updated,
        trials=trials,
        settings=row.settings,
        provenance=row.provenance,
        outcome=row.outcome,
        reason=row.reason,
    )
