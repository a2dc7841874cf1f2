"""The results database: open it, work on runs and query them."""

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
from laserlm.store.claim import Beat, current_status, database_time, require_free, unless_alive
from laserlm.store.database import Database, lock
from laserlm.store.run import Run, claimed_run
from laserlm.store.schema import ExampleRow, RunRow, ScoreRow, TrialRow
from laserlm.store.trials import load_evaluation, load_evaluations, load_examples
from laserlm.tasks.example import Example


@dataclass(frozen=True)
class RunInfo:
    """The listed properties of a run.

    Args:
        id: 12 hex characters.
        kind: kind of work, such as ``search``.
        status: ``running``, ``interrupted``, ``done`` or ``failed``. Runs that are not ``done`` resume under the same key.
            Runs of kind ``scores`` are ``open``, because studies add to them.
        key: identifies the work.
        model: the model's name.
        task: the task's name.
        created: time of the first start (aware, UTC).
        updated: time of the last change (aware, UTC).
        trials: number of recorded trials, including failed trials.
        settings: the settings passed to ``Store.run``.
        provenance: the provenance passed to ``Store.run``.
        outcome: the value passed to ``Run.finish``; None while the run is unfinished.
        reason: why the run failed, else None.
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

    @property
    def adapter(self) -> str | None:
        """The adapter whose update was reduced, as it was named; None without one."""
        return self.settings.get("adapter")

    @property
    def full_model(self) -> str:
        """The model's name, with that of the adapter."""
        return self.model if self.adapter is None else f"{self.model} with the adapter {self.adapter}"


@dataclass(frozen=True)
class TrialInfo:
    """The listed properties of a trial; the numbers are None for a failed trial.

    Args:
        split: ``validation``, ``test`` or ``all``.
        intervention: canonical text; empty for the unchanged model.
        status: ``done`` or ``failed``.
        reason: why the trial failed, else None.
        n: number of examples.
        accuracy: share of correct examples.
        loss: mean over the examples of the log-loss in nats per answer token.
        seconds: wall time of the forward passes.
        scorer: name of the scorer.
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
    """The runs of a results database. Close it, or use it as a context manager."""

    def __init__(self, database: Database) -> None:
        self.database = database

    @classmethod
    def open(cls, where: str | Path, *, create: bool = True) -> Store:
        """Open a results database; create or migrate it if needed.

        Args:
            where: path of an SQLite file, or a SQLAlchemy URL of SQLite or PostgreSQL if it contains ``://``.
            create: whether an SQLite file that does not exist is created. Without it, a mistyped path is an error.

        Raises:
            StoreError: if the database does not exist, cannot be opened or was written by a newer laserlm.
        """
        return cls(Database(where, create=create))

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
        """Work on the newest run with this key, or on a new run, inside a ``with`` block.

        A finished run has its outcome and cannot be changed. At the end of the block, a run without ``Run.finish`` is
        interrupted, and after an exception other than Ctrl-C it is failed. Both can be resumed, and so can the run of a
        killed process.

        Args:
            kind: kind of work, such as ``search``.
            key: identifies the work; equal for equal model, task, grid and settings.
            settings: plain JSON values, including ``model`` and ``task``.
            provenance: see ``laserlm.provenance``.
            restart: start a new run even if the key has one.

        Raises:
            RunBusyError: if a live process works on the run.
        """
        return claimed_run(self.database, kind=kind, key=key, settings=settings, provenance=provenance, restart=restart)

    def runs(self) -> list[RunInfo]:
        """Return all runs, newest first."""
        with self.database.read() as session:
            rows = session.execute(select(RunRow, _trial_count()).order_by(RunRow.number.desc()))
            now = database_time(session)
            return [_run_info(row, trials, now) for row, trials in rows]

    def find(self, id_or_prefix: str, kind: str | None = None) -> RunInfo:
        """Return the run whose id starts with a prefix, or the newest search for ``last``.

        Args:
            id_or_prefix: start of an id, or ``last``. Without any search, ``last`` is the newest run.
            kind: kind of the run; None for any kind.

        Raises:
            StoreError: if no run or more than one run has the prefix.
        """
        runs = [run for run in self.runs() if kind is None or run.kind == kind]
        if id_or_prefix == "last" and runs:
            return next((run for run in runs if run.kind == "search"), runs[0])
        prefix = id_or_prefix.lower()
        matches = [run for run in runs if prefix and run.id.startswith(prefix)]
        if len(matches) == 1:
            return matches[0]
        if matches:
            raise StoreError(
                f"{id_or_prefix!r} begins the ids of {len(matches)} runs: {', '.join(run.id for run in matches[:5])}; "
                "write more characters of one id, see 'laser runs list'"
            )
        near = get_close_matches(prefix, [run.id for run in runs], n=3, cutoff=0.5)
        hint = f"; similar ids are {', '.join(near)}" if near else ""
        raise StoreError(f"no run {id_or_prefix!r} among {len(runs)} in {self.database.name}{hint}; see 'laser runs list'")

    def evaluation(self, run_id: str, split: str, intervention: str) -> Evaluation | None:
        """Return a recorded evaluation, or None if the trial is missing or failed."""
        with self.database.read() as session:
            _row(session, run_id)
            return load_evaluation(session, run_id, split, intervention)

    def trials(self, run_id: str) -> list[TrialInfo]:
        """Return the trials of a run in the order of recording."""
        with self.database.read() as session:
            _row(session, run_id)
            rows = session.scalars(select(TrialRow).where(TrialRow.run_id == run_id).order_by(TrialRow.id))
            return [
                TrialInfo(t.split, t.intervention, t.status, t.reason, t.n, t.accuracy, t.loss, t.seconds, t.scorer)
                for t in rows
            ]

    def evaluations(self, run_id: str, split: str) -> dict[str, Evaluation]:
        """Return the scores of every trial on a split, by intervention; trials without scores are left out."""
        with self.database.read() as session:
            _row(session, run_id)
            return {e.intervention: e for e in load_evaluations(session, run_id, split)}

    def examples(self, run_id: str, split: str) -> tuple[Example, ...]:
        """Return the examples on which a run scored the unchanged model, in the order of its scores."""
        with self.database.read() as session:
            _row(session, run_id)
            return load_examples(session, run_id, split)

    def notes(self, run_id: str) -> dict[str, Any]:
        """Return the notes of a run, by name."""
        with self.database.read() as session:
            return dict(_row(session, run_id).notes or {})

    def export(self, run_id: str) -> dict[str, Any]:
        """Return a complete run as plain JSON values; the scores refer to examples by their index in ``examples``."""
        with self.database.read() as session:
            return _export(session, _row(session, run_id))

    def delete(self, run_id: str) -> None:
        """Delete a run with its trials, scores and the examples that no other run has scored.

        Raises:
            RunBusyError: if a live process works on the run.
        """

        def delete_free(dead: Beat | None) -> None:
            with self.database.write() as session:
                require_free(_row(session, run_id, update=True), dead)
                session.execute(delete(RunRow).where(RunRow.id == run_id))
                lock(session.connection(), "examples")
                session.execute(
                    delete(ExampleRow)
                    .where(~exists().where(ScoreRow.example_id == ExampleRow.id))
                    .execution_options(synchronize_session=False)
                )

        unless_alive(self.database, select(RunRow).where(RunRow.id == run_id), delete_free)


def _row(session: Session, run_id: str, *, update: bool = False) -> RunRow:
    query = select(RunRow).where(RunRow.id == run_id)
    row = session.scalars(query.with_for_update() if update else query).one_or_none()
    if row is None:
        raise StoreError(f"no run {run_id!r}; see 'laser runs list'")
    return row


def _trial_count() -> ScalarSelect[int]:
    return select(func.count(TrialRow.id)).where(TrialRow.run_id == RunRow.id).scalar_subquery()


def _run_info(row: RunRow, trials: int, now: datetime) -> RunInfo:
    return RunInfo(
        id=row.id,
        kind=row.kind,
        status=current_status(row, now),
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


def _export(session: Session, run: RunRow) -> dict[str, Any]:
    of_run = select(ScoreRow.example_id).join(TrialRow).where(TrialRow.run_id == run.id)
    examples = session.scalars(select(ExampleRow).where(ExampleRow.id.in_(of_run)).order_by(ExampleRow.id)).all()
    indices = {example.id: index for index, example in enumerate(examples)}
    trials = session.scalars(select(TrialRow).where(TrialRow.run_id == run.id).order_by(TrialRow.id)).all()
    return {
        "id": run.id,
        "kind": run.kind,
        "status": current_status(run, database_time(session)),
        **_values(run, "reason", "key", "model", "task"),
        "created": run.created.isoformat(),
        "updated": run.updated.isoformat(),
        **_values(run, "settings", "provenance", "notes", "outcome"),
        "examples": [
            {
                "id": example.name,
                **_values(example, "prompt", "answer", "choices", "group", "fact", "popularity"),
                **(example.more or {}),
            }
            for example in examples
        ],
        "trials": [
            {
                **_values(trial, "split", "intervention", "status", "reason", "model", "task", "scorer", "n", "accuracy"),
                **_values(trial, "loss", "seconds", "classes"),
                "created": trial.created.isoformat(),
                "scores": _export_scores(session, trial, indices),
            }
            for trial in trials
        ],
    }


def _values(row: Any, *columns: str) -> dict[str, Any]:
    return {column: getattr(row, column) for column in columns}


def _export_scores(session: Session, trial: TrialRow, indices: dict[int, int]) -> list[dict[str, Any]]:
    rows = session.execute(
        select(ScoreRow, ExampleRow.answer)
        .join(ExampleRow, ScoreRow.example_id == ExampleRow.id)
        .where(ScoreRow.trial_id == trial.id)
        .order_by(ScoreRow.position)
    )
    return [
        {
            "example": indices[score.example_id],
            **_values(score, "correct", "logprob", "tokens", "predicted"),
            "answer": answer if score.answer is None else score.answer,
            **(score.figures or {}),
        }
        for score, answer in rows
    ]
