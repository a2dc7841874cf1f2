"""The result of a finished run is read by earlier and later versions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from laserlm.models import LanguageModel
from laserlm.reductions import Intervention
from laserlm.scoring.evaluate import Comparison
from laserlm.scoring.statistics import Interval
from laserlm.searching import SearchResult, search
from laserlm.searching.guard import Harm
from laserlm.searching.result import Point
from laserlm.tasks import Task

RECORDS = ("validation", "test", "comparison", "rungs", "steps", "screened", "harms", "points")
"""Keys below which there are records with fields; other keys lead to plain values, by names of interventions or settings."""


def with_unknown_fields(value: Any) -> Any:
    """Add what a later version may record to every record in a JSON value."""
    if isinstance(value, list):
        return [with_unknown_fields(one) for one in value]
    known = {key: with_unknown_fields(one) if key in RECORDS else one for key, one in value.items()}
    return known | {"of_a_later_version": [1, 2]}


def test_a_result_with_fields_of_a_later_version_is_read(llama: LanguageModel, task: Task) -> None:
    result = search(llama, task, grid="all.all@0.5,0.3", metric="loss", first_rung=4, max_harm=2.0)
    values = result.as_dict()
    values["steps"] = [{"added": "1.fc_in@0.5", "intervention": "1.fc_in@0.5", "comparison": values["test"]}]
    later = with_unknown_fields(values)
    harm, point = later["harms"][0], later["points"][0]
    steps = later["steps"][0]["comparison"]
    for record in (later, later["test"], later["rungs"][0], later["screened"], steps, harm, harm["comparison"], point):
        assert "of_a_later_version" in record
    read = SearchResult.from_dict(later)
    assert read == SearchResult.from_dict(values)
    assert replace(read, steps=()) == result
    assert Intervention.parse(read.steps[0].added) == Intervention.parse("1.fc_in@0.5")
    assert read.steps[0].comparison == result.test


def test_a_result_of_a_version_without_guards_is_read(llama: LanguageModel, task: Task) -> None:
    result = search(llama, task, grid="1.fc_in@0.5", metric="loss", first_rung=4)
    values = result.as_dict()
    del values["harms"], values["points"]
    for rung in values["rungs"]:
        del rung["harmful"]
    assert SearchResult.from_dict(values) == replace(result, harms=(), points=())


def point(name: str, gain: float, loss: float, harm: float) -> Point:
    """Return an intervention that gains in accuracy, changes the loss, and costs something on a guard."""
    every = Interval(-9.0, 9.0)
    c = Comparison("validation", name, 10, 0.5, 0.5 + gain, gain, every, 1.0, 1, 0, 2.0, 2.0 + loss, every)
    of_guard = replace(c, base_loss=3.0, edited_loss=3.0 + harm)
    return Point(name, c, (Harm("self", "text", replace(of_guard, edited_loss=3.0)), Harm("a.txt", "text", of_guard)))


def test_the_pareto_points_are_those_that_none_equals_in_gain_and_harm(llama: LanguageModel, task: Task) -> None:
    result = search(llama, task, grid="1.fc_in@0.5", metric="loss", first_rung=4)
    best, cheap, same_gain, worse, lower_loss = (
        point("2.fc_in@0.1", 0.25, -0.5, 0.5),
        point("1.fc_in@0.1", 0.125, -0.5, 0.25),
        point("0.fc_in@0.1", 0.25, -0.5, 0.75),
        point("0.fc_in@0.2", 0.125, 0.5, 0.5),
        point("0.fc_in@0.3", 0.125, -0.75, 0.375),
    )
    assert best.change == 0.5  # the largest of its two guards
    assert replace(result, points=(same_gain, best, worse, cheap, lower_loss)).pareto == [cheap, lower_loss, best]
    assert replace(result, points=(best, replace(best, intervention="0.fc_up@0.1"))).pareto[0] == best
    assert replace(result, points=()).pareto == []
