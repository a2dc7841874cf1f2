"""A user's own questions: one JSON object on each line.

Fields: ``prompt`` and ``answer``; optionally ``choices`` (a list that holds the answer), ``aliases`` (other right answers,
for what the model writes itself), ``joint`` (what joins prompt and answer, a space unless told otherwise), ``id``,
``group``, ``fact`` (rows that phrase one fact share it), ``subject`` (what it is about) and ``popularity``.
"""

from __future__ import annotations

import math
from pathlib import Path

from laserlm.errors import TaskError
from laserlm.tasks.example import Example
from laserlm.tasks.files import field, json_lines

__all__ = ["examples"]


def examples(file: Path) -> list[Example]:
    """Read a JSON-lines file of questions.

    Raises:
        TaskError: if a line cannot be used; the line is named.
    """
    rows: list[Example] = []
    lines: dict[str, int] = {}
    for number, row in json_lines(file):
        where = f"{file}, line {number}"
        row = {name: value for name, value in row.items() if value is not None or name in ("prompt", "answer")}
        answer = field(row, "answer", str, where)
        choices = tuple(field(row, "choices", list, where)) if "choices" in row else ()
        if not all(isinstance(c, str) and c.strip() for c in choices) or len(set(choices)) != len(choices):
            raise TaskError(f"{where}: the field 'choices' must be a list of different texts, got {choices!r:.80}")
        if "choices" in row and (answer not in choices or len(choices) < 2):
            raise TaskError(f"{where}: 'choices' must hold the answer {answer!r} and one more at least, got {choices!r:.80}")
        aliases = tuple(field(row, "aliases", list, where)) if "aliases" in row else ()
        if not all(isinstance(a, str) and a.strip() for a in aliases):
            raise TaskError(f"{where}: the field 'aliases' must be a list of texts, got {aliases!r:.80}")
        joint = row.get("joint", " ")
        if not isinstance(joint, str):
            raise TaskError(f"{where}: the field 'joint' must be a text, which may be empty, got {joint!r:.60}")
        if rows and bool(choices) != bool(rows[0].choices):
            raise TaskError(f"{where}: some rows have 'choices' and some have not; put them in two files")
        id_ = str(row.get("id", f"line {number}"))
        if id_ in lines:
            raise TaskError(f"{where}: the id {id_!r} stands on line {lines[id_]} too; ids must differ")
        lines[id_] = number
        popularity = row.get("popularity")
        if popularity is not None and not (type(popularity) in (int, float) and math.isfinite(popularity)):
            raise TaskError(f"{where}: the field 'popularity' must be a finite number, got {popularity!r:.60}")
        rows.append(
            Example(
                id=id_,
                prompt=field(row, "prompt", str, where),
                answer=answer,
                choices=choices,
                group=str(row.get("group", "")),
                fact=str(row.get("fact", "")),
                popularity=None if popularity is None else float(popularity),
                aliases=aliases,
                joint=joint,
                subject=str(row.get("subject", "")),
            )
        )
    if not rows:
        raise TaskError(f"{file} has no questions; write one JSON object with 'prompt' and 'answer' on each line")
    return rows
