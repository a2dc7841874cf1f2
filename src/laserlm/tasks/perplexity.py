"""The perplexity of a plain text."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

from laserlm.errors import TaskError
from laserlm.tasks.example import Example
from laserlm.tasks.files import read_text

__all__ = ["examples"]

PASSAGE = 2000
"""Characters of a passage at least, but for the last one."""
BEFORE = 8000
"""Characters before a passage that it may be read with: more than the tokens of any window's unscored part."""


def examples(file: Path) -> list[Example]:
    """Cut a text into passages of whole lines, each with what stands before it as its prompt.

    Raises:
        TaskError: if the file holds no text.
    """
    text = read_text(file)
    if not text.strip():
        raise TaskError(f"{file} holds no text; give one with a few thousand characters at least")
    cuts, end = [0], 0
    for line in text.splitlines(keepends=True):
        end += len(line)
        if end - cuts[-1] >= PASSAGE and text[cuts[-1] : end].strip():
            cuts.append(end)
    # What is left at the end belongs to the last passage, so that no short one weighs as much as the others.
    cuts = [*(cuts[:-1] or [0]), len(text)]
    return [
        Example(id=f"{start}-{end}", prompt=text[max(0, start - BEFORE) : start], answer=text[start:end], joint="")
        for start, end in pairwise(cuts)
    ]
