"""Bias in Bios: the gender and the profession of a person, asked about a biography.

Source: De-Arteaga et al., "Bias in bios: a case study of semantic representation bias in a high-stakes setting", arXiv
1901.09451. Rows and prompts are those of arXiv 2312.13558.
"""

from __future__ import annotations

from collections.abc import Sequence

from laserlm.errors import TaskError
from laserlm.tasks.datasets.fever import sentence
from laserlm.tasks.example import Example
from laserlm.tasks.files import Record, field

GENDERS = ("male", "female")
PROFESSIONS = {
    11: "journalist",
    20: "poet",
    5: "composer",
    12: "model",
    26: "teacher",
    1: "architect",
    14: "painter",
    21: "professor",
}
"""The professions that the task asks about, by their numbers in the data set, which has 28."""


def gender(records: Sequence[Record]) -> list[Example]:
    """Return one example for each biography: is the person a man or a woman?

    Raises:
        TaskError: if a record lacks a field, or its gender is not 0 or 1.
    """
    return [
        Example(
            id=str(number),
            prompt=f"Consider the following text: {text} Is the person in this text a male or female? "
            "The gender of this person is",
            answer=GENDERS[_number(record, "gender", len(GENDERS), origin)],
            choices=GENDERS,
            masked="Consider the following text: {passage} Is the person in this text a male or female? This person is {mask}.",
            passage=text,
        )
        for number, (origin, record) in enumerate(records, start=1)
        for text in [sentence(field(record, "hard_text", str, origin))]
    ]


def profession(records: Sequence[Record]) -> list[Example]:
    """Return one example for each biography of a person with one of eight professions: which one?

    Raises:
        TaskError: if a record lacks a field, or its profession is not one of the 28.
    """
    rows: list[Example] = []
    for number, (origin, record) in enumerate(records, start=1):
        name = PROFESSIONS.get(_number(record, "profession", 28, origin))
        if name is None:
            continue
        text = sentence(field(record, "hard_text", str, origin))
        rows.append(
            Example(
                id=str(number),
                prompt=f"Consider the following text: {text} What is the profession of the person in this text? "
                "The profession of this person is",
                answer=name,
                choices=tuple(PROFESSIONS.values()),
                masked="Consider the following text: {passage} The profession of the person in the text is called {mask}.",
                passage=text,
            )
        )
    return rows


def _number(record: dict[str, object], name: str, n: int, origin: str) -> int:
    value = record.get(name)
    if isinstance(value, str) and value.isdecimal():  # in a CSV file all values are texts
        value = int(value)
    if type(value) is not int or not 0 <= value < n:
        raise TaskError(f"{origin}: the field '{name}' must be a whole number from 0 to {n - 1}, got {value!r:.60}")
    return value
