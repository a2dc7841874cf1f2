"""The result of a finished run is read by earlier and later versions."""

from __future__ import annotations

from typing import Any

from laserlm.models import LanguageModel
from laserlm.reductions import Intervention
from laserlm.searching import SearchResult, search
from laserlm.tasks import Task

RECORDS = ("validation", "test", "comparison", "rungs", "steps", "screened")
"""Keys below which there are records with fields; other keys lead to plain values, by names of interventions or settings."""


def with_unknown_fields(value: Any) -> Any:
    """Add what a later version may record to every record in a JSON value."""
    if isinstance(value, list):
        return [with_unknown_fields(one) for one in value]
    known = {key: with_unknown_fields(one) if key in RECORDS else one for key, one in value.items()}
    return known | {"of_a_later_version": [1, 2]}


def test_a_result_with_fields_of_a_later_version_is_read(llama: LanguageModel, task: Task) -> None:
    found = search(llama, task, grid="all.all@0.5,0.3", metric="loss", first_rung=4)
    values = found.as_dict()
    values["steps"] = [{"added": "1.fc_in@0.5", "intervention": "1.fc_in@0.5", "comparison": values["test"]}]
    later = with_unknown_fields(values)
    for record in (later, later["test"], later["rungs"][0], later["screened"], later["steps"][0]["comparison"]):
        assert "of_a_later_version" in record
    read = SearchResult.from_dict(later)
    assert read == SearchResult.from_dict(values)
    assert (read.best, read.test, read.rungs, read.screened) == (found.best, found.test, found.rungs, found.screened)
    assert Intervention.parse(read.steps[0].added) == Intervention.parse("1.fc_in@0.5")
    assert read.steps[0].comparison == found.test
