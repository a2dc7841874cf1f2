"""The choices of multiple-choice questions in a user's file, and which of them an answer means."""

from __future__ import annotations

import re
import string
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from laserlm.tasks.cells import list_of, number_as_text

Reading = Literal["text", "label", "letter", "number"]
READINGS: tuple[Reading, ...] = ("text", "label", "letter", "number")
CHOICE_COLUMN = re.compile(r"(?:(?i:choice|option|answer)[ _-]?)?[A-H]|(?i:choice|option|answer)[ _-]?[0-9a-h]")
"""One column for each choice, as MMLU's tables have."""
NOTES: Mapping[Reading, str] = {
    "label": "answers are the labels of choices",
    "letter": "answers are the letters of choices",
    "number": "answers are the numbers of choices, counted from 0",
}


@dataclass(frozen=True)
class Choices:
    """Choices in their order.

    Args:
        texts: the choices, or what the file holds in their place, for an error.
        labels: what the file calls them; empty for a list.
    """

    texts: Any
    labels: tuple[str, ...] = ()

    @classmethod
    def of_columns(cls, row: Mapping[str, Any], columns: Sequence[str]) -> Choices:
        """Return the choices of a row with one column for each; empty cells are none."""
        labelled = {label_of(name): number_as_text(row[name]) for name in columns if row.get(name) not in (None, "")}
        return cls(list(labelled.values()), tuple(labelled))

    @classmethod
    def of_value(cls, value: Any, *, is_table: bool) -> Choices:
        """Return the choices that one value holds; a table writes lists as text, and may hold numbers."""
        if isinstance(value, str):
            value = list_of(value)
        labels: tuple[str, ...] = ()
        if isinstance(value, dict):
            value = {k: v for k, v in value.items() if v is not None}  # Parquet fills up what another row has
            if isinstance(value.get("text"), list):  # as ARC's
                labels, value = tuple(str(label).upper() for label in value.get("label", ())), value["text"]
            elif value and all(len(str(k)) == 1 and isinstance(v, str) for k, v in value.items()):  # as MedQA's
                labels, value = tuple(str(k).upper() for k in value), list(value.values())
        if isinstance(value, list) and is_table:
            value = [number_as_text(c) for c in value]
        return cls(value, labels)

    @property
    def are_texts(self) -> bool:
        """Whether there is a list, of texts alone."""
        return isinstance(self.texts, list) and all(isinstance(text, str) for text in self.texts)

    def meant(self, answer: str, reading: Reading) -> str | None:
        """Return the choice that an answer means, or None if it means none of them."""
        if not isinstance(self.texts, list):
            return None
        if reading == "text":
            return answer if answer in self.texts else None
        sign = answer.strip(" ().:").upper()
        known: Sequence[str] = self.labels
        if reading == "letter":
            known = () if self.labels else tuple(string.ascii_uppercase)
        elif reading == "number":
            known = () if any(map(str.isdecimal, self.labels)) else [str(i) for i in range(len(self.texts))]
        at = known.index(sign) if sign in known else -1
        return self.texts[at] if 0 <= at < len(self.texts) else None


def label_of(column: str) -> str:
    """Return the letter or the number of a column that holds one choice."""
    return column.strip()[-1].upper()


def reading_of(rows: Iterable[tuple[Any, Choices]]) -> tuple[Reading, str]:
    """Return how the answers of a file are read, and a sentence on it: as what most of them are.

    Args:
        rows: answers as the file has them, and the choices of each.
    """
    rows = list(rows)
    # A number among texts is the number of a choice, although a choice may be that number too.
    are_numbers = all(type(a) is int and c.are_texts for a, c in rows)
    order = ("number", "label", "text", "letter") if are_numbers else READINGS
    meant = {r: [c.meant(str(number_as_text(a)), r) for a, c in rows] for r in order}
    counts = {r: sum(m is not None for m in of_rows) for r, of_rows in meant.items()}
    best = max(order, key=lambda r: counts[r])
    note = NOTES.get(best, "") if counts[best] else ""
    second = max((r for r in order if meant[r] != meant[best]), key=lambda r: counts[r], default=best)
    if rows and counts[best] == counts[second] == len(rows) and second != best:
        note = f"{note or 'answers are the texts of choices'}, although they could be {_what(second)}"
    return best, note


def _what(reading: Reading) -> str:
    """Return what answers are that have a reading."""
    return NOTES[reading].removeprefix("answers are ") if reading in NOTES else "the texts of choices"
