"""Prepare flips for a page: mark what differs between two outputs, and fold what all prompts have in common."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

from laserlm.studies.flipping import Flip

LEAST_COMMON = 24
"""Characters that all prompts share at their start or end, from which they are folded."""
WORD = re.compile(r"\s+|\w+|[^\w\s]")
Pieces = list[tuple[str, str]]
"""Parts of a text with their kind: ``answer``, ``differs`` or empty."""


@dataclass(frozen=True)
class FlipRow:
    """A flip with its prompt cut short and its outputs in pieces."""

    prompt: str
    answer: str
    base: Pieces
    edited: Pieces


@dataclass(frozen=True)
class FlipRows:
    """Flips of a page.

    Args:
        start: text that all prompts begin with, empty if it is short.
        end: text that all prompts end with, empty if it is short.
        rows: by kind of change.
    """

    start: str
    end: str
    rows: dict[str, list[FlipRow]]


def flip_rows(flips: dict[str, Sequence[Flip]]) -> FlipRows:
    """Return flips, by kind of change, as rows of a page."""
    prompts = [flip.prompt for of in flips.values() for flip in of]
    start = _common_start(prompts)
    end = _common_start([prompt[len(start) :][::-1] for prompt in prompts])[::-1]
    rows = {kind: [_row(flip, len(start), len(end)) for flip in of] for kind, of in flips.items()}
    return FlipRows(start, end, rows)


def marked(base: str, edited: str, answer: str) -> tuple[Pieces, Pieces]:
    """Return two outputs in pieces: where the right answer is in them, else where they differ."""
    words = [WORD.findall(text) for text in (base, edited)]
    before, after = Pieces(), Pieces()
    for tag, i, j, k, m in SequenceMatcher(None, words[0], words[1], autojunk=False).get_opcodes():
        kind = "" if tag == "equal" else "differs"
        before.append(("".join(words[0][i:j]), kind))
        after.append(("".join(words[1][k:m]), kind))
    return _with_answer(base, before, answer), _with_answer(edited, after, answer)


def _with_answer(text: str, pieces: Pieces, answer: str) -> Pieces:
    """Return the pieces of a text with the first occurrence of the answer as a piece of its own."""
    match = re.search(rf"(?<!\w){re.escape(answer.strip())}(?!\w)", text, re.IGNORECASE) if answer.strip() else None
    if match is None:
        return [piece for piece in pieces if piece[0]]
    cut, position = Pieces(), 0
    for piece, kind in pieces:
        end = position + len(piece)
        first, last = (min(max(x, position), end) - position for x in match.span())
        cut += [(piece[:first], kind), (piece[first:last], "answer"), (piece[last:], kind)]
        position = end
    return [piece for piece in cut if piece[0]]


def _common_start(texts: Sequence[str]) -> str:
    """Return the words that all of several texts begin with, or an empty text if they are short or fill a text."""
    if len(set(texts)) < 2:
        return ""
    first, last = min(texts), max(texts)
    length = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    words = re.sub(r"\w*\Z", "", first[:length])
    return words if len(words) >= LEAST_COMMON else ""


def _row(flip: Flip, start: int, end: int) -> FlipRow:
    shortened = ("… " if start else "") + flip.prompt[start : len(flip.prompt) - end] + (" …" if end else "")
    return FlipRow(shortened, flip.answer, *marked(flip.base, flip.edited, flip.answer))
