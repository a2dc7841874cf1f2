"""A run as plain JSON values."""

from __future__ import annotations

from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from laserlm.store.claim import shown_status
from laserlm.store.schema import ExampleRow, RunRow, ScoreRow, TrialRow

__all__ = ["export_run"]


def export_run(session: Session, run: RunRow) -> dict[str, Any]:
    """Return a run with its examples, trials and scores; a score names its example by the place in ``examples``."""
    of_run = select(ScoreRow.example_id).join(TrialRow).where(TrialRow.run_id == run.id)
    examples = session.scalars(select(ExampleRow).where(ExampleRow.id.in_(of_run)).order_by(ExampleRow.id)).all()
    places = {example.id: place for place, example in enumerate(examples)}
    trials = session.scalars(select(TrialRow).where(TrialRow.run_id == run.id).order_by(TrialRow.id)).all()
    return {
        "id": run.id,
        "kind": run.kind,
        "status": shown_status(run),
        "reason": run.reason,
        "key": run.key,
        "model": run.model,
        "task": run.task,
        "created": run.created.isoformat(),
        "updated": run.updated.isoformat(),
        "settings": run.settings,
        "provenance": run.provenance,
        "notes": run.notes,
        "outcome": run.outcome,
        "examples": [
            {
                "id": example.name,
                "prompt": example.prompt,
                "answer": example.answer,
                "choices": example.choices,
                "group": example.group,
                "fact": example.fact,
                "popularity": example.popularity,
                **(example.more or {}),
            }
            for example in examples
        ],
        "trials": [
            {
                "split": trial.split,
                "intervention": trial.intervention,
                "status": trial.status,
                "reason": trial.reason,
                "model": trial.model,
                "task": trial.task,
                "scorer": trial.scorer,
                "n": trial.n,
                "accuracy": trial.accuracy,
                "loss": trial.loss,
                "seconds": trial.seconds,
                "classes": trial.classes,
                "created": trial.created.isoformat(),
                "scores": _scores(session, trial, places),
            }
            for trial in trials
        ],
    }


def _scores(session: Session, trial: TrialRow, places: dict[int, int]) -> list[dict[str, Any]]:
    rows = session.execute(
        select(
            ScoreRow.example_id,
            ScoreRow.correct,
            ScoreRow.logprob,
            ScoreRow.tokens,
            ScoreRow.predicted,
            func.coalesce(ScoreRow.answer, ExampleRow.answer),
            ScoreRow.figures,
        )
        .join(ExampleRow, ScoreRow.example_id == ExampleRow.id)
        .where(ScoreRow.trial_id == trial.id)
        .order_by(ScoreRow.position)
    )
    return [
        {
            "example": places[example_id],
            "correct": correct,
            "logprob": logprob,
            "tokens": tokens,
            "predicted": predicted,
            "answer": answer,
            **(figures or {}),
        }
        for example_id, correct, logprob, tokens, predicted, answer, figures in rows
    ]
