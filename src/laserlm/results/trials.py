"""Write and read the trials of a run: evaluations with their scores, and failures."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime

from sqlalchemy import func, insert, select
from sqlalchemy.orm import Session

from laserlm.errors import StoreError
from laserlm.results.schema import ExampleRow, ScoreRow, TrialRow
from laserlm.scoring.records import Evaluation, Score
from laserlm.tasks.example import Example

__all__ = ["check", "find_trial", "load_evaluation", "save_evaluation", "save_failure"]

CHUNK = 500  # values in one query; SQLite before 3.32 takes 999


def check(evaluation: Evaluation, examples: Sequence[Example]) -> None:
    """Raise a StoreError unless the scores are those of the examples, in their order, and are numbers."""
    trial = f"the evaluation of {evaluation.intervention or 'the unchanged model'!r} on {evaluation.split}"
    if len(examples) != evaluation.n:
        raise StoreError(
            f"{trial} has {evaluation.n} scores for {len(examples)} examples; record the examples it was made from"
        )
    for position, (score, example) in enumerate(zip(evaluation.scores, examples, strict=True)):
        if (score.id, score.group) != (example.id, example.group):
            raise StoreError(
                f"{trial} has at position {position} the score of {score.id!r} (group {score.group!r}) and the example "
                f"{example.id!r} (group {example.group!r}); record the examples in the order of the scores"
            )
        if math.isnan(score.logprob) or score.tokens < 1:
            raise StoreError(
                f"{trial} gives example {score.id!r} the log-probability {score.logprob} over {score.tokens} tokens; "
                "record a number over one token or more, or the trial as failed"
            )


def find_trial(session: Session, run_id: str, split: str, intervention: str) -> TrialRow | None:
    """Return the trial, done or failed, or None."""
    return session.scalars(
        select(TrialRow).where(TrialRow.run_id == run_id, TrialRow.split == split, TrialRow.intervention == intervention)
    ).one_or_none()


def save_evaluation(session: Session, run_id: str, evaluation: Evaluation, examples: Sequence[Example]) -> None:
    """Add a trial with its scores, and those examples the database does not have yet."""
    trial = _new_trial(session, run_id, evaluation.split, evaluation.intervention)
    trial.status = "done"
    trial.model = evaluation.model
    trial.task = evaluation.task
    trial.scorer = evaluation.scorer
    trial.n = evaluation.n
    trial.accuracy = evaluation.accuracy
    trial.loss = evaluation.loss
    trial.seconds = evaluation.seconds
    trial.classes = list(evaluation.classes)
    session.add(trial)
    session.flush()
    ids = _example_ids(session, examples)
    session.execute(
        insert(ScoreRow),
        [
            {
                "trial_id": trial.id,
                "position": position,
                "example_id": ids[example],
                "correct": score.correct,
                "logprob": score.logprob,
                "tokens": score.tokens,
                "predicted": score.predicted,
                "answer": None if score.answer == example.answer else score.answer,
            }
            for position, (score, example) in enumerate(zip(evaluation.scores, examples, strict=True))
        ],
    )


def save_failure(session: Session, run_id: str, split: str, intervention: str, reason: str) -> None:
    """Add a trial that has no scores and the reason why."""
    trial = _new_trial(session, run_id, split, intervention)
    trial.status = "failed"
    trial.reason = reason
    session.add(trial)


def load_evaluation(session: Session, run_id: str, split: str, intervention: str) -> Evaluation | None:
    """Return the evaluation as it was recorded, or None where there is none or it failed."""
    trial = find_trial(session, run_id, split, intervention)
    if trial is None or trial.status != "done":
        return None
    rows = session.execute(
        select(
            ExampleRow.name,
            ScoreRow.correct,
            ScoreRow.logprob,
            ScoreRow.tokens,
            ScoreRow.predicted,
            func.coalesce(ScoreRow.answer, ExampleRow.answer),
            ExampleRow.group,
        )
        .join(ExampleRow, ScoreRow.example_id == ExampleRow.id)
        .where(ScoreRow.trial_id == trial.id)
        .order_by(ScoreRow.position)
    )
    scores = tuple(
        Score(id, correct, logprob, tokens, predicted, answer, group)
        for id, correct, logprob, tokens, predicted, answer, group in rows
    )
    if len(scores) != trial.n:
        raise StoreError(
            f"run {run_id} has {len(scores)} of {trial.n} scores for {intervention!r} on {split}; "
            "the database is damaged, restore a copy or start again with another --store"
        )
    return Evaluation(
        trial.model or "",
        trial.task or "",
        split,
        trial.scorer or "",
        intervention,
        scores,
        trial.seconds or 0.0,
        tuple(trial.classes or ()),
    )


def _new_trial(session: Session, run_id: str, split: str, intervention: str) -> TrialRow:
    if (earlier := find_trial(session, run_id, split, intervention)) is not None:
        raise StoreError(
            f"run {run_id} already has a trial of {intervention or 'the unchanged model'!r} on {split} "
            f"({earlier.status}); look before measuring, or start a new run with --restart"
        )
    return TrialRow(run_id=run_id, split=split, intervention=intervention, created=datetime.now(UTC))


def _example_ids(session: Session, examples: Iterable[Example]) -> dict[Example, int]:
    digests = {example: _digest(example) for example in examples}
    ids: dict[str, int] = {}
    wanted = list(digests.values())
    for start in range(0, len(wanted), CHUNK):
        query = select(ExampleRow.digest, ExampleRow.id).where(ExampleRow.digest.in_(wanted[start : start + CHUNK]))
        ids.update((digest, id) for digest, id in session.execute(query))
    new = [
        {
            "digest": digest,
            "name": example.id,
            "prompt": example.prompt,
            "answer": example.answer,
            "choices": list(example.choices),
            "group": example.group,
            "fact": example.fact,
            "popularity": example.popularity,
        }
        for example, digest in digests.items()
        if digest not in ids
    ]
    if new:
        added = session.execute(insert(ExampleRow).returning(ExampleRow.digest, ExampleRow.id), new)
        ids.update((digest, id) for digest, id in added)
    return {example: ids[digest] for example, digest in digests.items()}


def _digest(example: Example) -> str:
    return hashlib.sha256(json.dumps(asdict(example), sort_keys=True).encode()).hexdigest()
