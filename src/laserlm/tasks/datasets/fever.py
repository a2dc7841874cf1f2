"""FEVER: claims that are true or false.

Source: Thorne et al., "FEVER: a large-scale dataset for fact extraction and verification", arXiv 1803.05355. Rows and
prompt are those of arXiv 2312.13558.
"""

from __future__ import annotations

from collections.abc import Sequence

from laserlm.errors import TaskError
from laserlm.tasks.example import Example
from laserlm.tasks.files import Record, field

LABELS = {"SUPPORTS": "true", "REFUTES": "false", "NOT ENOUGH INFO": ""}


def examples(records: Sequence[Record]) -> list[Example]:
    """Return one example for each claim that is labelled true or false but not both. Duplicates are merged.

    Raises:
        TaskError: if a record lacks a field, or has another label.
    """
    ids: dict[str, str] = {}
    answers: dict[str, set[str]] = {}
    for origin, record in records:
        label = field(record, "label", str, origin)
        if label not in LABELS:
            raise TaskError(f"{origin}: the field 'label' must be one of {', '.join(LABELS)}, got {label!r:.60}")
        claim = field(record, "claim", str, origin)
        if LABELS[label]:
            ids.setdefault(claim, str(field(record, "id", int, origin)))
            answers.setdefault(claim, set()).add(LABELS[label])
    return [
        Example(id=ids[claim], prompt=prompt, answer=next(iter(labels)), choices=("true", "false"), masked=f"{prompt} {{mask}}")
        for claim, labels in answers.items()
        if len(labels) == 1
        for prompt in [f"Consider the following claim: {sentence(claim)} Is this claim true or false. The claim is"]
    ]


def sentence(text: str) -> str:
    """Return a text without outer white space. Add a full stop unless it ends in one or in a question mark."""
    text = text.strip()
    return text if text.endswith((".", "?")) else f"{text}."
