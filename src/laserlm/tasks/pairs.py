"""Preferences, for reward models, and sentence pairs with a score, for embedding models, from a user's file."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from laserlm.errors import TaskError
from laserlm.tasks.cells import list_of
from laserlm.tasks.conversation import message_of
from laserlm.tasks.example import Example, TaskSource
from laserlm.tasks.files import Record, field
from laserlm.tasks.rows import place_in_file, read_rows

PROMPTS = ("prompt", "question", "instruction")
SENTENCES = (("sentence1", "sentence2"), ("sentence_1", "sentence_2"), ("text1", "text2"))
SCORES = ("score", "similarity_score", "similarity")
Messages = tuple[tuple[str, str], ...]


def source_of(records: Sequence[Record], name: str, file: str) -> TaskSource | None:
    """Return the preferences or sentence pairs of rows; None where the columns are those of neither.

    Raises:
        TaskError: if rows cannot be used.
    """
    columns = {str(name) for _, row in records if isinstance(row, dict) for name in row}
    if {"chosen", "rejected"} <= columns:
        examples = read_rows(records, file, _preference)
        return TaskSource(name, examples, f"preferences of {Path(file).name}", "preference")
    names = next((pair for pair in SENTENCES if {*pair} <= columns), None)
    score = next((name for name in SCORES if name in columns), None)
    if names is None or score is None:
        return None
    pairs = read_rows(records, file, lambda row, origin: _sentence_pair(row, origin, (*names, score)))
    largest = max(abs(float(e.answer)) for e in pairs)
    scale = largest if largest > 1 else 1.0
    pairs = [replace(e, answer=f"{float(e.answer) / scale:.6g}") for e in pairs]
    notes = (f"{file}: scores are divided by {largest:g}, the largest, to be compared with cosines",) if scale != 1 else ()
    return TaskSource(name, pairs, f"sentence pairs of {Path(file).name}", "similarity", notes=notes)


def _preference(row: Any, origin: str) -> Example:
    row = _object(row, origin)
    answers = [_turns(row.get(side), side, origin) for side in ("chosen", "rejected")]
    shared = _shared(*answers)
    chosen, rejected = (answer[len(shared) :] for answer in answers)
    if len(chosen) != 1 or len(rejected) != 1:
        raise TaskError(
            f"{origin}: 'chosen' and 'rejected' must differ in the last message alone, got {len(chosen)} and {len(rejected)} "
            "messages after the shared ones. Write two different answers to one conversation."
        )
    prompt = next((row[name] for name in PROMPTS if row.get(name)), "")
    start = _turns(prompt, "prompt", origin, role="user") if prompt else ()
    messages = shared if shared[: len(start)] == start else (*start, *shared)
    return Example(
        id=str(row.get("id", place_in_file(origin))),
        prompt="\n\n".join(text for _, text in messages),
        answer=chosen[0][1],
        choices=(chosen[0][1], rejected[0][1]),
        messages=messages,
        **_names(row),
    )


def _turns(value: Any, name: str, origin: str, role: str = "assistant") -> Messages:
    """Return the messages of a list, or of a text that is one message."""
    if isinstance(value, str) and value.lstrip().startswith("[{"):
        value = list_of(value)
    if isinstance(value, list) and value and all(isinstance(m, dict) for m in value):
        return tuple(message_of(m, origin) for m in value)
    return ((role, field({name: value}, name, str, origin)),)


def _shared(first: Messages, second: Messages) -> Messages:
    """Return the messages that two conversations begin with."""
    n = next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second)))
    return first[:n]


def _sentence_pair(row: Any, origin: str, columns: tuple[str, str, str]) -> Example:
    row = _object(row, origin)
    first, second = (field(row, name, str, origin) for name in columns[:2])
    try:
        score = float(row.get(columns[2]))
    except (TypeError, ValueError):
        score = math.nan
    if not math.isfinite(score):
        raise TaskError(f"{origin}: the field {columns[2]!r} must be a finite number, got {row.get(columns[2])!r:.60}")
    return Example(
        id=str(row.get("id", place_in_file(origin))), prompt=first, answer=repr(score), text_pair=second, **_names(row)
    )


def _names(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the group and the fact of a row that has them."""
    return {name: str(row[name]) for name in ("group", "fact") if row.get(name) is not None}


def _object(row: Any, origin: str) -> Mapping[str, Any]:
    if not isinstance(row, dict):
        raise TaskError(f"{origin}: an object is needed, got {row!r:.60}")
    return row
