"""The perplexity of a plain text."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

from laserlm.errors import TaskError
from laserlm.tasks.example import Example
from laserlm.tasks.files import read_text

PASSAGE_CHARACTERS = 2000
"""Smallest length of a passage, except for a text that is shorter."""
CONTEXT_CHARACTERS = 8000
"""Length of the context before a passage. It has more tokens than the unscored part of any window."""


def examples(file: Path) -> list[Example]:
    """Return the passages of a text file.

    Raises:
        TaskError: if the file has no text.
    """
    text = read_text(file)
    if not text.strip():
        raise TaskError(f"{file} has no text. Give a file with at least a few thousand characters.")
    return passages(text)


def passages(text: str) -> list[Example]:
    """Cut a text into passages of whole lines; the text before each passage is its prompt."""
    cuts, end = [0], 0
    for line in text.splitlines(keepends=True):
        end += len(line)
        if end - cuts[-1] >= PASSAGE_CHARACTERS and text[cuts[-1] : end].strip():
            cuts.append(end)
    # The last passage takes the rest, so that no short passage weighs as much as the others.
    cuts = [*(cuts[:-1] or [0]), len(text)]
    return [
        Example(id=f"{start}-{end}", prompt=text[max(0, start - CONTEXT_CHARACTERS) : start], answer=text[start:end], joint="")
        for start, end in pairwise(cuts)
    ]
