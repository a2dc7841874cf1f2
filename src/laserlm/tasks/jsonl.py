"""A user's own questions: one JSON object on each line.

The fields ``prompt`` and ``answer`` are needed. Optional fields: ``choices`` (a list with the answer), ``aliases`` (other
right answers, for generated text), ``joint`` (the separator between prompt and answer, by default a space), ``id``,
``group``, ``fact`` (rows that phrase one fact share it), ``subject`` (what the fact is about) and ``popularity``.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from laserlm.errors import TaskError
from laserlm.tasks.example import Example
from laserlm.tasks.files import field, json_lines

__all__ = ["examples"]


def examples(file: Path) -> list[Example]:
    """Read a JSON-lines file of questions.

    Raises:
        TaskError: if a line cannot be used; the message names the line.
    """
    rows: list[Example] = []
    line_of_id: dict[str, int] = {}
    for number, record in json_lines(file):
        origin = f"{file}, line {number}"
        row = _example(record, number, origin)
        if rows and bool(row.choices) != bool(rows[0].choices):
            raise TaskError(f"{origin}: some rows have 'choices' and some have not. Put them in two files.")
        if row.id in line_of_id:
            raise TaskError(f"{origin}: the id {row.id!r} is on line {line_of_id[row.id]} too. Ids must differ.")
        line_of_id[row.id] = number
        rows.append(row)
    if not rows:
        raise TaskError(f"{file} has no questions. Write one JSON object with 'prompt' and 'answer' on each line.")
    return rows


def _example(record: dict[str, Any], number: int, origin: str) -> Example:
    record = {name: value for name, value in record.items() if value is not None or name in ("prompt", "answer")}
    answer = field(record, "answer", str, origin)
    choices = _texts(record, "choices", origin, different=True)
    if "choices" in record and (answer not in choices or len(choices) < 2):
        raise TaskError(f"{origin}: 'choices' must hold the answer {answer!r} and one more at least, got {choices!r:.80}")
    joint = record.get("joint", " ")
    if not isinstance(joint, str):
        raise TaskError(f"{origin}: the field 'joint' must be a text, which may be empty, got {joint!r:.60}")
    popularity = record.get("popularity")
    if popularity is not None and not (type(popularity) in (int, float) and math.isfinite(popularity)):
        raise TaskError(f"{origin}: the field 'popularity' must be a finite number, got {popularity!r:.60}")
    return Example(
        id=str(record.get("id", f"line {number}")),
        prompt=field(record, "prompt", str, origin),
        answer=answer,
        choices=choices,
        group=str(record.get("group", "")),
        fact=str(record.get("fact", "")),
        popularity=None if popularity is None else float(popularity),
        aliases=_texts(record, "aliases", origin),
        joint=joint,
        subject=str(record.get("subject", "")),
    )


def _texts(record: dict[str, Any], name: str, origin: str, *, different: bool = False) -> tuple[str, ...]:
    texts = tuple(field(record, name, list, origin)) if name in record else ()
    if not all(isinstance(t, str) and t.strip() for t in texts) or (different and len(set(texts)) != len(texts)):
        raise TaskError(f"{origin}: the field '{name}' must be a list of {'different ' * different}texts, got {texts!r:.80}")
    return texts
