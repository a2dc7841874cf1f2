"""Make examples of the rows of a user's file, and report all rows that cannot be used."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from laserlm.errors import TaskError
from laserlm.tasks.example import Example
from laserlm.tasks.files import Record

ERRORS_SHOWN = 5


def read_rows(records: Sequence[Record], file: str, read: Callable[[Any, str], Example]) -> list[Example]:
    """Return the examples that ``read`` makes of rows and their origins.

    Raises:
        TaskError: if rows cannot be used; the message counts them and shows the first.
    """
    examples: list[Example] = []
    origin_of_id: dict[str, str] = {}
    problems: list[str] = []
    for origin, row in records:
        try:
            example = read(row, origin)
            if example.id in origin_of_id:
                raise TaskError(f"{origin}: the id {example.id!r} is on {origin_of_id[example.id]} too. Ids must differ.")
        except TaskError as error:
            problems.append(str(error))
            continue
        origin_of_id[example.id] = place_in_file(origin)
        examples.append(example)
    if len(problems) == 1:
        raise TaskError(problems[0])
    if problems:
        shown = "\n  ".join(problems[:ERRORS_SHOWN])
        more = f"\n  and {len(problems) - ERRORS_SHOWN} more" if len(problems) > ERRORS_SHOWN else ""
        raise TaskError(f"{len(problems)} of {len(records)} rows of {file} cannot be used:\n  {shown}{more}")
    return examples


def place_in_file(origin: str) -> str:
    """Return the last part of an origin, such as "line 3"."""
    return origin.rpartition(", ")[2]
