"""PopQA: questions about entities of known popularity.

Source: Mallen et al., "When not to trust language models", arXiv 2212.10511, with its prompt without examples.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from laserlm.errors import TaskError
from laserlm.tasks.example import Example
from laserlm.tasks.files import Record, field


def examples(records: Sequence[Record]) -> list[Example]:
    """Return one example for each question. All its answers count. Its popularity is the subject's monthly page views.

    The published table has the fields at the top and the answers as JSON text. Other copies have the fields under
    ``metadata`` and the answers as a list.

    Raises:
        TaskError: if a record lacks a field.
    """
    rows: list[Example] = []
    for origin, record in records:
        metadata = field(record, "metadata", dict, origin) if "metadata" in record else record
        answers = _answers(record, origin)
        question = field(record, "question", str, origin)
        try:
            popularity = float(metadata["s_pop"])
        except (KeyError, TypeError, ValueError):
            raise TaskError(f"{origin}: the field 's_pop' must be a number, got {metadata.get('s_pop')!r:.60}") from None
        if "id" not in record:
            raise TaskError(f"{origin}: the field 'id' is missing")
        rows.append(
            Example(
                id=str(record["id"]),
                prompt=f"Q: {question} A:",
                answer=answers[0],
                aliases=tuple(answers[1:]),
                group=field(metadata, "prop", str, origin),
                popularity=popularity,
                subject=metadata["subj"] if isinstance(metadata.get("subj"), str) else "",
            )
        )
    return rows


def _answers(record: dict[str, Any], origin: str) -> list[str]:
    name = "golden_answers" if "golden_answers" in record else "possible_answers"
    if name not in record:
        raise TaskError(f"{origin}: the field 'possible_answers' is missing")
    answers = record[name]
    if isinstance(answers, str):
        try:
            answers = json.loads(answers)
        except json.JSONDecodeError:
            answers = None
    if not isinstance(answers, list) or not answers or not all(isinstance(a, str) and a.strip() for a in answers):
        raise TaskError(f"{origin}: the field '{name}' must be a list of texts, got {record[name]!r:.80}")
    return list(dict.fromkeys(answers))
