"""Outputs of two models with their differences marked, and prompts without what all of them share."""

from __future__ import annotations

import pytest

from laserlm.studies.flipping import Flip
from laserlm.web.flip_rows import flip_rows, marked

FEW_SHOT = "Answer the question with one word.\nQ: "


@pytest.mark.parametrize(
    ("base", "edited", "answer", "marked_base", "marked_edited"),
    [
        ("the small town", "the large town", "none", "the <small> town", "the <large> town"),
        ("It is Rome.", "It is paris, of course.", "Paris", "It is <Rome>.", "It is [paris]<, of course>."),
        ("Parisian", "Paris", "Paris", "<Parisian>", "[Paris]"),  # a part of a word is no answer
        ("Rome", "", "Oslo", "<Rome>", ""),
        ("a (b) c", "a (b) c", "(b", "a [(b]) c", "a [(b]) c"),
        ("New York", "New York City", "York", "New [York]", "New [York]< City>"),
    ],
)
def test_the_answer_is_marked_and_else_what_differs(
    base: str, edited: str, answer: str, marked_base: str, marked_edited: str
) -> None:
    brackets = {"": "{}", "differs": "<{}>", "answer": "[{}]"}
    sides = marked(base, edited, answer)
    assert ["".join(brackets[kind].format(text) for text, kind in side) for side in sides] == [marked_base, marked_edited]
    assert ["".join(text for text, _ in side) for side in sides] == [base, edited]


def flip(prompt: str) -> Flip:
    return Flip("i", "corrected", "", prompt, "Rome", "Oslo", "Rome", 1.0, 1.0)


def test_what_all_prompts_share_is_folded_in_whole_words() -> None:
    prompts = [f"{FEW_SHOT}Where is {name}?\nYour answer in one word, please:" for name in ("Stockholm", "Stocks", "Stone")]
    rows = flip_rows({"corrected": [flip(p) for p in prompts[:2]], "broken": [flip(prompts[2])]})
    assert (rows.start, rows.end) == (f"{FEW_SHOT}Where is ", "?\nYour answer in one word, please:")
    assert [row.prompt for row in rows.rows["corrected"]] == ["… Stockholm …", "… Stocks …"]
    assert [row.prompt for row in rows.rows["broken"]] == ["… Stone …"]


@pytest.mark.parametrize("prompts", [["The capital of Italy is", "The capital of Oz is"], [FEW_SHOT], [FEW_SHOT] * 3, []])
def test_short_beginnings_and_single_prompts_are_shown_in_full(prompts: list[str]) -> None:
    rows = flip_rows({"corrected": [flip(p) for p in prompts], "broken": []})
    assert (rows.start, rows.end) == ("", "")
    assert [row.prompt for row in rows.rows["corrected"]] == prompts
