"""GSM8K: word problems, answered in numbers.

Source: Cobbe et al., "Training verifiers to solve math word problems", arXiv 2110.14168.
"""

from __future__ import annotations

from collections.abc import Sequence

from laserlm.errors import TaskError
from laserlm.tasks.example import Example
from laserlm.tasks.files import Record, field

ANSWER_MARK = "####"


def examples(records: Sequence[Record]) -> list[Example]:
    """Return one example for each problem. The answer is the number after ``####``, without thousands separators.

    Raises:
        TaskError: if a record lacks a field, or its answer has no number.
    """
    rows: list[Example] = []
    for number, (origin, record) in enumerate(records, start=1):
        solution = field(record, "answer", str, origin)
        answer = solution.rpartition(ANSWER_MARK)[2].replace(",", "").strip()
        try:
            float(answer if ANSWER_MARK in solution else "")
        except ValueError:
            raise TaskError(
                f"{origin}: the field 'answer' must end in '{ANSWER_MARK}' and a number, got {solution[-60:]!r}"
            ) from None
        rows.append(
            Example(id=str(number), prompt=f"Question: {field(record, 'question', str, origin)}\nAnswer:", answer=answer)
        )
    return rows
