"""What a result says of its gain, and how it names questions and facts."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from laserlm.reductions import Intervention
from laserlm.scoring.evaluate import Comparison
from laserlm.scoring.statistics import Interval
from laserlm.searching import SearchResult

NO_CHANGE = Interval(-0.1, 0.1)
GAIN_HOLDS = "The gain in accuracy holds on questions that had no part in the choice."
NO_CLEAR_CHANGE = "The held-out questions show no clear change of accuracy: the interval of the gain includes zero."
DOES_NOT_HOLD = "The choice does not hold: it loses on the held-out questions."


def result_of(interval: Interval, loss_interval: Interval = NO_CHANGE, **settings: Any) -> SearchResult:
    """Return a search whose best reduction has these intervals on both splits."""
    c = Comparison("test", "1.fc_in@0.5", 90, 0.4, 0.5, 0.1, interval, 0.2, 12, 3, 2.0, 1.9, loss_interval, facts=30)
    return SearchResult("0", "race", Intervention.parse("1.fc_in@0.5"), 4, 4, {}, c, c, 1.0, True, 0, 0, settings=settings)


@pytest.mark.parametrize(
    ("interval", "sentence"),
    [
        (Interval(0.01, 0.2), GAIN_HOLDS),
        (Interval(-0.01, 0.2), NO_CLEAR_CHANGE),
        (Interval(0.0, 0.2), NO_CLEAR_CHANGE),
        (Interval(-0.2, 0.0), NO_CLEAR_CHANGE),
        (Interval(-0.2, -0.01), DOES_NOT_HOLD),
    ],
)
def test_the_verdict_on_accuracy_follows_the_interval_on_test(interval: Interval, sentence: str) -> None:
    assert result_of(interval).verdict() == [sentence]
    assert result_of(interval, scorer="perplexity").verdict() == []


def test_the_verdict_on_loss_follows_its_interval() -> None:
    falls = "Their loss falls: the interval of its change lies below zero."
    rises = "Their loss rises: the interval of its change lies above zero."
    assert result_of(NO_CHANGE, Interval(-0.2, -0.1)).verdict()[1:] == [falls]
    assert result_of(NO_CHANGE, Interval(0.1, 0.2)).verdict()[1:] == [rises]
    assert result_of(NO_CHANGE, Interval(-math.inf, math.inf)).verdict()[1:] == []


@pytest.mark.parametrize("strategy", ["components", "strengths", "race"])
def test_a_choice_that_what_the_model_writes_refuses_says_so(strategy: Any) -> None:
    refused = replace(result_of(NO_CHANGE), best=Intervention(), strategy=strategy, finalists={"": 0.45, "1.fc_in@0.5": 0.4})
    assert refused.verdict() == [
        "What the model writes decides: 40.0% of the validation questions are answered right under the best of 1 by the loss, "
        "and 45.0% by the unchanged model."
    ]


def test_no_line_shows_the_text_of_thousands_of_strengths() -> None:
    best = Intervention.parse("1.fc_in@scale" + ",".join(f"{i}=0.9{i % 10}" for i in range(3000)))
    result = replace(result_of(NO_CHANGE), best=best)
    result = replace(result, test=replace(result.test, intervention=str(best)))
    assert repr(best) == "Intervention('3000 strengths of 1 matrices')"
    assert "best 3000 strengths of 1 matrices, test: 40.0% -> 50.0%" in repr(result)
    assert max(map(len, (repr(result), repr(result.test)))) < 400


def test_a_result_that_names_no_facts_is_read() -> None:
    """As written by version 0.1.0."""
    result = result_of(Interval(0.01, 0.2))
    values = result.as_dict()
    assert values["test"]["facts"] == 30
    for split in ("validation", "test"):
        del values[split]["facts"]
    read = SearchResult.from_dict(values)
    assert read.test == replace(result.test, facts=None)
    assert (result.test.size, read.test.size) == ("90 of 30 facts", "90")
