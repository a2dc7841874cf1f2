"""Write and read the trials of a run: evaluations with their scores, and failures."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, fields
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import func, insert, select
from sqlalchemy.orm import Session

from laserlm.errors import StoreError
from laserlm.scoring.records import Evaluation, ExampleScore
from laserlm.store.database import lock
from laserlm.store.schema import ExampleRow, ScoreRow, TrialRow
from laserlm.tasks.example import Example

EXAMPLE_COLUMNS = ("id", "prompt", "answer", "choices", "group", "fact", "popularity")
OTHER_FIELDS = [f for f in fields(Example) if f.name not in EXAMPLE_COLUMNS]
MAX_QUERY_VALUES = 500  # SQLite before 3.32 takes at most 999
MAX_QUERY_SCORES = 100_000
"""Scores that one query reads; it bounds the memory, since a score takes some hundred bytes in Python."""


def check(evaluation: Evaluation, examples: Sequence[Example]) -> None:
    """Raise a StoreError unless the scores are numbers and belong to the examples, in the same order."""
    trial = f"the evaluation of {evaluation.intervention or 'the unchanged model'!r} on {evaluation.split}"
    if len(examples) != evaluation.n:
        raise StoreError(
            f"{trial} has {evaluation.n} scores for {len(examples)} examples; record the examples that were scored"
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
    """Return the trial, done or failed, or None if it does not exist."""
    return session.scalars(
        select(TrialRow).where(TrialRow.run_id == run_id, TrialRow.split == split, TrialRow.intervention == intervention)
    ).one_or_none()


def save_evaluation(session: Session, run_id: str, evaluation: Evaluation, examples: Sequence[Example], start: int) -> None:
    """Save a new trial, or append scores to a trial that has ``start`` scores; save new examples too."""
    trial = _open_trial(session, run_id, evaluation.split, evaluation.intervention, start)
    n = start + evaluation.n
    trial.status = "done"
    trial.model = evaluation.model
    trial.task = evaluation.task
    trial.scorer = evaluation.scorer
    trial.n = n
    trial.accuracy = ((trial.accuracy or 0) * start + evaluation.accuracy * evaluation.n) / n
    trial.loss = ((trial.loss or 0) * start + evaluation.loss * evaluation.n) / n
    trial.seconds = (trial.seconds or 0) + evaluation.seconds
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
                "figures": score.figures or None,
            }
            for position, (score, example) in enumerate(zip(evaluation.scores, examples, strict=True), start)
        ],
    )


def save_failure(session: Session, run_id: str, split: str, intervention: str, reason: str, start: int) -> None:
    """Save why a trial has no scores, or no scores after the first ``start``."""
    trial = _open_trial(session, run_id, split, intervention, start)
    trial.status = "failed"
    trial.reason = reason
    session.add(trial)


def load_evaluation(session: Session, run_id: str, split: str, intervention: str) -> Evaluation | None:
    """Return the recorded evaluation, or None if the trial is missing or failed."""
    trial = find_trial(session, run_id, split, intervention)
    return None if trial is None or trial.status != "done" else next(_load(session, [trial]))


def load_evaluations(session: Session, run_id: str, split: str) -> Iterator[Evaluation]:
    """Yield the evaluations of the trials on a split that have scores, a part of them in memory at a time."""
    trials = session.scalars(
        select(TrialRow).where(TrialRow.run_id == run_id, TrialRow.split == split, TrialRow.n > 0).order_by(TrialRow.id)
    ).all()
    part: list[TrialRow] = []
    for trial in trials:
        if len(part) == MAX_QUERY_VALUES or sum(t.n or 0 for t in [*part, trial]) > MAX_QUERY_SCORES:
            yield from _load(session, part)
            part = []
        part.append(trial)
    yield from _load(session, part)


def load_failures(session: Session, run_id: str, split: str) -> dict[str, str]:
    """Return why trials on a split have no scores, or no further ones, by intervention."""
    query = select(TrialRow.intervention, TrialRow.reason).where(
        TrialRow.run_id == run_id, TrialRow.split == split, TrialRow.status == "failed"
    )
    return {intervention: reason or "" for intervention, reason in session.execute(query.order_by(TrialRow.id))}


def load_examples(session: Session, run_id: str, split: str) -> tuple[Example, ...]:
    """Return the examples on which the unchanged model was scored, in the order of its scores."""
    trial = find_trial(session, run_id, split, "")
    if trial is None:
        return ()
    query = select(ExampleRow).join(ScoreRow, ScoreRow.example_id == ExampleRow.id).where(ScoreRow.trial_id == trial.id)
    rows = session.scalars(query.order_by(ScoreRow.position))
    return tuple(map(_example, rows))


def _example(row: ExampleRow) -> Example:
    more = {name: _lists_to_tuples(value) for name, value in (row.more or {}).items()}
    return Example(row.name, row.prompt, row.answer, tuple(row.choices), row.group, row.fact, row.popularity, **more)


def _lists_to_tuples(value: Any) -> Any:
    """Return a JSON value with its lists as tuples, the type of an example's fields."""
    return tuple(map(_lists_to_tuples, value)) if isinstance(value, list) else value


def _load(session: Session, trials: Sequence[TrialRow]) -> Iterator[Evaluation]:
    """Yield the evaluations of a few trials, in their order."""
    scores: dict[int, list[ExampleScore]] = {trial.id: [] for trial in trials}
    rows = session.execute(
        select(
            ScoreRow.trial_id,
            ExampleRow.name,
            ScoreRow.correct,
            ScoreRow.logprob,
            ScoreRow.tokens,
            ScoreRow.predicted,
            func.coalesce(ScoreRow.answer, ExampleRow.answer),
            ExampleRow.group,
            ScoreRow.figures,
            ExampleRow.fact,
        )
        .join(ExampleRow, ScoreRow.example_id == ExampleRow.id)
        .where(ScoreRow.trial_id.in_(list(scores)))
        .order_by(ScoreRow.trial_id, ScoreRow.position)
    )
    for trial_id, id, correct, logprob, tokens, predicted, answer, group, figures, fact in rows:
        score = ExampleScore(id, correct, logprob, tokens, predicted, answer, group, figures or {}, fact=fact)
        scores[trial_id].append(score)
    for trial in trials:
        if len(scores[trial.id]) != trial.n:
            raise StoreError(
                f"run {trial.run_id} has {len(scores[trial.id])} of {trial.n} scores for {trial.intervention!r} on "
                f"{trial.split}; the database is damaged; restore a copy, or give another --store"
            )
        yield Evaluation(
            trial.model or "",
            trial.task or "",
            trial.split,
            trial.scorer or "",
            trial.intervention,
            tuple(scores.pop(trial.id)),
            trial.seconds or 0.0,
            tuple(trial.classes or ()),
        )


def _open_trial(session: Session, run_id: str, split: str, intervention: str, start: int) -> TrialRow:
    """Return a new trial if ``start`` is 0, else the trial that has ``start`` scores."""
    earlier = find_trial(session, run_id, split, intervention)
    if earlier is None and start == 0:
        return TrialRow(run_id=run_id, split=split, intervention=intervention, created=datetime.now(UTC))
    if earlier is not None and earlier.status == "done" and earlier.n == start > 0:
        return earlier
    trial = f"trial of {intervention or 'the unchanged model'!r} on {split}"
    has = f"has no {trial}" if earlier is None else f"already has a {trial} ({earlier.status}, {earlier.n or 0} scores)"
    raise StoreError(f"run {run_id} {has}, but {start} scores were expected; start a new run with --restart")


def _example_ids(session: Session, examples: Iterable[Example]) -> dict[Example, int]:
    connection = session.connection()
    lock(connection, "examples", shared=True)  # nobody may delete the examples before their scores are saved
    digests = {example: _digest(example) for example in examples}
    ids = _known_ids(session, digests.values())
    if missing := set(digests.values()) - ids.keys():
        lock(connection, "new examples")
        ids |= _known_ids(session, missing)  # another process may have added some
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
            "more": {f.name: value for f in OTHER_FIELDS if (value := getattr(example, f.name)) != f.default} or None,
        }
        for example, digest in digests.items()
        if digest not in ids
    ]
    if new:
        added = session.execute(insert(ExampleRow).returning(ExampleRow.digest, ExampleRow.id), new)
        ids.update((digest, id) for digest, id in added)
    return {example: ids[digest] for example, digest in digests.items()}


def _known_ids(session: Session, digests: Iterable[str]) -> dict[str, int]:
    remaining = list(digests)
    ids: dict[str, int] = {}
    for start in range(0, len(remaining), MAX_QUERY_VALUES):
        query = select(ExampleRow.digest, ExampleRow.id).where(
            ExampleRow.digest.in_(remaining[start : start + MAX_QUERY_VALUES])
        )
        ids.update((digest, id) for digest, id in session.execute(query))
    return ids


def _digest(example: Example) -> str:
    return hashlib.sha256(json.dumps(asdict(example), sort_keys=True).encode()).hexdigest()
