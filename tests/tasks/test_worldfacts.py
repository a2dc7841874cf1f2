"""The bundled facts."""

from __future__ import annotations

import csv
import re
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from laserlm.tasks import Example, Task, task
from laserlm.tasks.datasets import worldfacts

DATA = Path(worldfacts.__file__).parents[1] / "data"
PHRASINGS = 3


@pytest.fixture(scope="module")
def dataset() -> Task:
    return task("worldfacts")


@pytest.fixture(scope="module")
def by_fact(dataset: Task) -> dict[str, list[Example]]:
    """The phrasings of each row of the table."""
    facts: dict[str, list[Example]] = defaultdict(list)
    for e in dataset.every:
        facts[e.id.rpartition("/")[0]].append(e)
    return facts


@pytest.fixture(scope="module")
def by_relation(by_fact: dict[str, list[Example]]) -> dict[str, list[Example]]:
    """The first phrasing of each fact by its relation."""
    relations: dict[str, list[Example]] = defaultdict(list)
    for phrasings in by_fact.values():
        relations[phrasings[0].group].append(phrasings[0])
    return relations


def test_there_are_facts_and_relations_enough(by_fact: dict[str, list[Example]], by_relation: dict[str, list[Example]]) -> None:
    assert len(by_fact) >= 2000
    assert len(by_relation) >= 12
    assert min(len(facts) for facts in by_relation.values()) >= 20


def test_every_row_of_the_table_is_a_fact_with_three_phrasings_in_its_order(dataset: Task) -> None:
    with (DATA / "worldfacts.csv").open(encoding="utf-8", newline="") as stream:
        table = list(csv.DictReader(stream))
    assert [e.id for e in dataset.every] == [f"{row['id']}/{i}" for row in table for i in (1, 2, 3)]
    for row, first in zip(table, dataset.every.examples[::PHRASINGS], strict=True):
        assert (first.answer, first.group) == (row["answer"], row["relation"])
        assert first.popularity == float(row["popularity"])


def test_the_phrasings_of_a_fact_differ_and_share_answer_relation_and_popularity(by_fact: dict[str, list[Example]]) -> None:
    for phrasings in by_fact.values():
        assert len({e.prompt for e in phrasings}) == len(phrasings) == PHRASINGS
        assert len({(e.answer, e.group, e.popularity) for e in phrasings}) == 1


def test_ids_are_unique(dataset: Task) -> None:
    assert len({e.id for e in dataset.every}) == len(dataset.every)


def test_no_prompt_is_there_twice(dataset: Task) -> None:
    assert [prompt for prompt, n in Counter(e.prompt.lower() for e in dataset.every).items() if n > 1] == []


def test_a_prompt_is_a_clean_beginning_of_a_sentence(dataset: Task) -> None:
    for e in dataset.every:
        assert e.prompt == e.prompt.strip(), e.id
        assert not re.search(r"\s\s|[{}?\n]", e.prompt), e.id
        assert not e.prompt[0].islower(), e.id
        assert e.prompt[-1] not in ".:;!", e.id


def test_an_answer_is_clean_and_of_three_words_at_most(dataset: Task) -> None:
    for e in dataset.every:
        assert e.answer == e.answer.strip(), e.id
        assert 1 <= len(e.answer.split()) <= 3, e.id


def test_no_prompt_holds_its_answer(dataset: Task) -> None:
    progress = [e.id for e in dataset.every if re.search(rf"(?<!\w){re.escape(e.answer.lower())}(?!\w)", e.prompt.lower())]
    assert progress == []


def test_every_fact_has_a_popularity_above_zero(dataset: Task) -> None:
    assert [e.id for e in dataset.every if e.popularity is None or not e.popularity > 0] == []


def test_no_question_has_two_answers(dataset: Task) -> None:
    answers: dict[str, set[str]] = defaultdict(set)
    for e in dataset.every:
        answers[e.prompt.lower()].add(e.answer)
    assert [prompt for prompt, several in answers.items() if len(several) > 1] == []


def test_a_constant_answer_gains_little(dataset: Task, by_relation: dict[str, list[Example]]) -> None:
    overall = Counter(e.answer for e in dataset.every).most_common(1)[0][1] / len(dataset.every)
    assert overall <= 0.03
    for relation, facts in by_relation.items():
        assert Counter(e.answer for e in facts).most_common(1)[0][1] / len(facts) <= 0.45, relation


def test_the_data_takes_less_than_a_megabyte() -> None:
    assert 0 < sum(file.stat().st_size for file in DATA.iterdir()) <= 1_000_000


@pytest.mark.parametrize(
    ("fact", "answer"),
    [
        ("The capital of France is", "Paris"),
        ("The capital of Japan is", "Tokyo"),
        ("Paris is the capital of", "France"),
        ("The continent on which Kenya is located is", "Africa"),
        ("The three-letter ISO code for the currency of Switzerland is", "CHF"),
        ("The country code top-level domain of Germany is", ".de"),
        ("The nationality of a citizen of Sweden is", "Swedish"),
        ("The official language of Brazil is", "Portuguese"),
        ("The largest city in Turkey is", "Istanbul"),
    ],
)
def test_facts_that_everybody_can_check(dataset: Task, fact: str, answer: str) -> None:
    assert [e.answer for e in dataset.every if e.prompt == fact] == [answer]


def subjects(relation: list[Example], before: str, after: str) -> dict[str, str]:
    """Return the answer of each subject that stands between these two texts in the first phrasing."""
    return {e.prompt.removeprefix(before).removesuffix(after): e.answer for e in relation}


def test_capitals_and_countries_are_inverse(by_relation: dict[str, list[Example]]) -> None:
    capital = subjects(by_relation["country_capital"], "The capital of ", " is")
    country = subjects(by_relation["capital_country"], "", " is the capital of")
    both = {c: capital[name] for c, name in country.items() if name in capital}
    assert len(both) >= 100
    assert all(name == c for c, name in both.items())


def test_the_task_splits_by_fact_and_names_its_sources(dataset: Task, by_fact: dict[str, list[Example]]) -> None:
    assert 0.18 < len(dataset.validation) / len(dataset.every) < 0.22
    assert not {e.fact for e in dataset.validation} & {e.fact for e in dataset.test}
    side = {e.prompt: split.name for split in (dataset.validation, dataset.test) for e in split}
    for city, country in (("Paris", "France"), ("Tokyo", "Japan"), ("Oslo", "Norway"), ("Lima", "Peru"), ("Cairo", "Egypt")):
        assert side[f"{city} is the capital of"] == side[f"The capital of {country} is"]
    assert dataset.every.scorer == "answer"
    assert "GeoNames" in dataset.source
    assert "CC BY 4.0" in dataset.source


def test_the_rewrite_phrasing_asks_each_fact_once(by_fact: dict[str, list[Example]]) -> None:
    rewrites = task("worldfacts", phrasings="rewrite").every
    assert [e.id for e in rewrites] == [f"{fact}/1" for fact in by_fact]
