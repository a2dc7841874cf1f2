from __future__ import annotations

import pytest

from laserlm import applied, evaluate
from laserlm.errors import AnalysisError
from laserlm.models import LanguageModel
from laserlm.scoring.evaluate import compare
from laserlm.scoring.records import Evaluation
from laserlm.searching.guard import Guard, guards_of, measure_harm
from laserlm.studies.points import guards_of_run, measure_points
from laserlm.tasks import Example, Split

TEXTS = ("0.fc_in@0.5", "1.fc_in@0.1")


@pytest.fixture(autouse=True)
def few_passages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("laserlm.searching.guard.PASSAGES", 4)
    monkeypatch.setattr("laserlm.searching.guard.PASSAGE_TOKENS", 8)


@pytest.fixture
def guards(llama: LanguageModel) -> list[Guard]:
    return guards_of(llama, ["self"])


@pytest.fixture
def split() -> Split:
    cities = ("Paris", "Rome", "true", "false")
    examples = tuple(Example(id=str(i), prompt=f"The city {i} is", answer=cities[i % 4]) for i in range(24))
    return Split("cities", "test", examples, "answer")


def test_intervals_and_p_values_hold_for_all_points_together(llama: LanguageModel, guards: list[Guard], split: Split) -> None:
    def score(text: str) -> Evaluation:
        with applied(llama, text):
            return evaluate(llama, split)

    one, both = (
        measure_points(llama, dict.fromkeys(texts, 1), TEXTS[0], score, guards, batch_size=8) for texts in (TEXTS[:1], TEXTS)
    )
    assert [point.is_chosen for point in both] == [True, False]
    for point, text in zip(both, TEXTS, strict=True):
        alone = compare(score(""), score(text))
        assert point.comparison == compare(score(""), score(text), confidence=0.975)
        assert point.p == min(1.0, 2 * alone.mcnemar_p)
        assert point.comparison.loss_interval.low < alone.loss_interval.low
        assert point.comparison.loss_interval.high > alone.loss_interval.high
        assert point.comparison.interval.low < alone.interval.low
        harm = measure_harm(llama, guards[0], text)
        assert point.harms[0].ratio == harm.ratio
        assert point.harms[0].interval.high > harm.interval.high
    assert one[0].comparison == compare(score(""), score(TEXTS[0]))
    assert one[0].harms == (measure_harm(llama, guards[0], TEXTS[0]),)


def test_the_guards_are_those_of_the_search(llama: LanguageModel, guards: list[Guard]) -> None:
    noted = [guard.identity for guard in guards]
    assert [g.identity for g in guards_of_run(llama, noted, 0)] == noted
    with pytest.raises(AnalysisError, match="not those of the search, which were self"):
        guards_of_run(llama, noted, 1)
    with pytest.raises(AnalysisError, match="name their files again with --guard"):
        guards_of_run(llama, [{"name": "questions:gone", "hash": "0"}], 0)
