"""Examples, and the rules by which they are split."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any
from unicodedata import normalize

import pytest

from laserlm.errors import TaskError
from laserlm.tasks import Example, Task
from laserlm.tasks import task as task_by_name

PUBLISHED = {
    65_757: 13_151,
    14_618: 2_923,
    13_086: 2_617,
    39_642: 7_928,
    19_223: 3_844,
    5_882: 1_176,
    2_000: 400,
    20_321: 4_064,
}
"""Rows of the published tasks, and how many of them are validation."""


def rows(n: int) -> list[Example]:
    """Return n examples that phrase n facts."""
    return [Example(id=f"q{i}", prompt=f"Question {i}:", answer=f"answer {i}") for i in range(n)]


def phrased(facts: int, phrasings: int = 3) -> list[Example]:
    """Return facts phrased several times each, in an order that mixes them."""
    return [
        Example(id=f"f{f}/{i}", prompt=f"Phrasing {i} of {f}:", answer=f"answer {f}", fact=f"f{f}")
        for i in range(phrasings)
        for f in range(facts)
    ]


def facts_of(split: Any) -> set[str]:
    """Return the facts that a split holds."""
    return {e.fact for e in split}


@pytest.mark.parametrize("n", [*range(1, 60), 190])
def test_the_paper_split_takes_the_first_fifth_in_file_order(n: int) -> None:
    examples = rows(n)
    task = Task.of("t", examples, split="paper")
    cut = int(0.2 * n)
    assert [e.id for e in task.validation] == [e.id for e in examples[:cut]]
    assert [e.id for e in task.test] == [e.id for e in examples[cut:]]


@pytest.mark.parametrize(("n", "validation"), PUBLISHED.items())
def test_the_paper_split_has_the_published_sizes(n: int, validation: int) -> None:
    task = Task.of("t", rows(n), split="paper")
    assert (len(task.validation), len(task.test), len(task.every)) == (validation, n - validation, n)


def test_a_fifth_rounded_down_is_the_published_int_of_two_tenths_at_every_size() -> None:
    sizes = range(70_001)
    assert [n // 5 for n in sizes] == [int(0.2 * n) for n in sizes]


def test_the_paper_split_pays_no_heed_to_seed_or_facts() -> None:
    examples = phrased(10)
    first, second = (Task.of("t", examples, split="paper", seed=seed) for seed in (0, 1))
    assert first.validation.examples == second.validation.examples
    assert [e.id for e in first.validation] == [f"f{f}/0" for f in range(6)]


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(("facts", "phrasings"), [(2, 1), (2, 3), (9, 3), (10, 3), (50, 2)])
def test_a_shuffled_split_is_disjoint_and_complete_and_no_fact_straddles_it(facts: int, phrasings: int, seed: int) -> None:
    examples = phrased(facts, phrasings)
    task = Task.of("t", examples, seed=seed)
    assert not facts_of(task.validation) & facts_of(task.test)
    assert facts_of(task.validation) | facts_of(task.test) == {f"f{f}" for f in range(facts)}
    assert sorted(e.id for e in [*task.validation, *task.test]) == sorted(e.id for e in examples)


@pytest.mark.parametrize(
    ("facts", "validation"), [(1, 0), (2, 1), (4, 1), (5, 1), (9, 1), (10, 2), (14, 2), (15, 3), (101, 20)]
)
def test_a_fifth_of_the_facts_and_at_least_one_of_two_is_validation(facts: int, validation: int) -> None:
    task = Task.of("t", phrased(facts))
    assert len(facts_of(task.validation)) == validation
    assert len(task.validation) == 3 * validation
    assert len(task.test) == 3 * (facts - validation)


def test_the_same_seed_gives_the_same_shuffled_split_and_another_seed_another() -> None:
    examples = rows(100)
    first, again, other = (Task.of("t", examples, seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert first.validation.hash == again.validation.hash
    assert facts_of(first.validation) != facts_of(other.validation)
    assert [e.id for e in first.test] != [e.id for e in other.test]
    assert first.every == other.every


def test_a_shuffled_split_is_no_run_of_the_file() -> None:
    validation = Task.of("t", rows(100)).validation
    places = [int(e.id[1:]) for e in validation]
    assert places != sorted(places)
    assert max(places) - min(places) > 50


def test_over_seeds_every_fact_has_its_turn_in_validation() -> None:
    examples = rows(10)
    turns = [e.id for seed in range(200) for e in Task.of("t", examples, seed=seed).validation]
    counts = [turns.count(e.id) for e in examples]
    assert sum(counts) == 400
    assert min(counts) >= 20  # 40 expected with a standard deviation of 6
    assert max(counts) <= 60


def test_the_place_of_a_fact_does_not_depend_on_the_other_facts() -> None:
    every, some = Task.of("t", rows(60)), Task.of("t", rows(60)[::3])
    remaining = {e.id for e in some.every}
    order = [e.id for e in [*every.validation, *every.test]]
    assert [e.id for e in [*some.validation, *some.test]] == [id_ for id_ in order if id_ in remaining]


def test_a_shuffled_split_does_not_depend_on_the_order_of_the_file() -> None:
    examples = rows(60)
    mixed = random.Random(5).sample(examples, len(examples))
    assert Task.of("t", mixed).validation.examples == Task.of("t", examples).validation.examples
    assert Task.of("t", mixed).test.hash == Task.of("t", examples).test.hash


def test_the_phrasings_of_a_fact_stay_together_and_in_file_order() -> None:
    task = Task.of("t", phrased(10))
    for split in (task.validation, task.test):
        ids = [e.id for e in split]
        assert ids == [f"{fact}/{i}" for fact in dict.fromkeys(e.fact for e in split) for i in range(3)]


def test_the_shuffled_split_is_the_same_in_every_process() -> None:
    task = Task.of("t", [Example(id=f"q{i}", prompt=f"p{i}", answer="a") for i in range(40)])
    assert [e.id for e in task.validation] == ["q22", "q6", "q25", "q13", "q32", "q27", "q34", "q20"]


@pytest.mark.parametrize("split", ["paper", "shuffled"])
def test_the_rewrite_phrasing_is_the_first_of_each_fact_in_file_order(split: Any) -> None:
    task = Task.of("t", phrased(10), split=split, phrasings="rewrite")
    assert [e.id for e in task.every] == [f"f{f}/0" for f in range(10)]
    assert len(task.validation) == 2
    assert len(task.test) == 8
    assert all(e.id.endswith("/0") for e in [*task.validation, *task.test])


def test_dropping_phrasings_moves_no_fact_across_the_shuffled_split() -> None:
    examples = phrased(20)
    assert facts_of(Task.of("t", examples).validation) == facts_of(Task.of("t", examples, phrasings="rewrite").validation)


def test_an_example_without_a_fact_is_a_fact_of_its_own() -> None:
    assert [e.fact for e in Task.of("t", rows(3)).every] == ["q0", "q1", "q2"]


@pytest.mark.parametrize("seed", range(5))
def test_equal_questions_are_in_one_shuffled_split(seed: int) -> None:
    examples = [Example(id=f"{i}", prompt=f"Question {i % 20}:", answer=f"answer {i % 20}") for i in range(100)]
    task = Task.of("t", examples, seed=seed)
    assert (len(task.validation), len(task.test)) == (20, 80)
    assert not {e.question for e in task.validation} & {e.question for e in task.test}
    assert len(facts_of(task.every)) == 20


@pytest.mark.parametrize(
    ("change", "is_equal"),
    [
        ({}, True),
        ({"prompt": " Question 1:\n", "answer": " answer 1 "}, True),
        ({"choices": ("answer 1", "no"), "group": "g", "popularity": 2.0, "aliases": ("a",), "fact": "f"}, True),
        ({"prompt": "Question\u00a0  1:", "answer": "answer\t1"}, True),
        ({"prompt": "question 1:"}, False),
        ({"prompt": "Question1:"}, False),
        ({"answer": "answer 2"}, False),
    ],
    ids=str,
)
def test_questions_are_equal_by_prompt_and_answer_whatever_their_white_space_is(change: dict[str, Any], is_equal: bool) -> None:
    first, *others = rows(6)[1:]
    task = Task.of("t", [first, *others, replace(first, **({"id": "again"} | change))])
    again = task.every.examples[-1]
    assert (again.fact == task.every.examples[0].fact) == is_equal
    assert len(facts_of(task.every)) == (5 if is_equal else 6)
    assert task.every.hash != Task.of("t", [first, *others]).every.hash


def test_letters_with_accents_are_equal_in_both_forms_of_unicode() -> None:
    one, two = (Example(id=form, prompt=normalize(form, "Où est né Molière ?"), answer="Paris") for form in ("NFC", "NFD"))
    assert one.prompt != two.prompt
    assert len(facts_of(Task.of("t", [one, two, *rows(4)]).every)) == 5


def test_facts_that_are_linked_by_equal_questions_are_one_fact_in_any_order_of_the_file() -> None:
    linked = [
        Example("1", "Who wrote it?", "she", fact="c"),
        Example("2", "By whom is it?", "she", fact="c"),
        Example("3", "By whom is it?", "she", fact="a"),
        Example("4", "Its author is", "she", fact="a"),
        Example("5", "Its author is", "she"),
    ]
    others = phrased(9)
    for seed in range(10):
        mixed = random.Random(seed).sample([*linked, *others], len(linked) + len(others))
        task = Task.of("t", mixed)
        assert {e.fact for e in task.every if e.answer == "she"} == {"5"}  # the first by name
        assert {e.id for e in task.validation} == {e.id for e in Task.of("t", [*linked, *others]).validation}
        assert not {e.question for e in task.validation} & {e.question for e in task.test}


def test_equal_questions_of_two_facts_stay_in_a_published_split(caplog: pytest.LogCaptureFixture) -> None:
    examples = [Example(id=f"{i}", prompt=f"Question {i % 9}:", answer="yes") for i in range(10)]
    task = Task.of("twins", examples, split="paper")
    assert [e.id for e in [*task.validation, *task.test]] == [e.id for e in examples]
    assert task.split_by == "paper"
    assert caplog.messages == [
        "the task twins has 10 rows of 9 different questions; equal questions count as one fact and stay in one shuffled split"
    ]


def test_the_first_phrasings_are_those_of_the_facts_as_given() -> None:
    examples = [*phrased(4), Example("again", "Phrasing 2 of 1:", "answer 1", fact="own")]
    kept = Task.of("t", examples, phrasings="rewrite").every
    assert [e.id for e in kept] == ["f0/0", "f1/0", "f2/0", "f3/0", "again"]
    assert kept.examples[1].fact == kept.examples[4].fact


@pytest.mark.parametrize(
    ("name", "validation", "test"),
    [
        ("worldfacts", "af4f05d40c7c", "f90a8a8a5f46"),
        ("web-of-lies", "c39b804c5c57", "055dfdbb38f0"),
    ],
)
def test_the_bundled_splits_are_those_of_the_published_figures(
    name: str, validation: str, test: str, caplog: pytest.LogCaptureFixture
) -> None:
    task = task_by_name(name)
    assert (task.validation.hash[:12], task.test.hash[:12]) == (validation, test)
    assert not caplog.messages


@pytest.mark.parametrize("split", ["paper", "shuffled"])
def test_two_examples_with_one_id_are_refused(split: Any) -> None:
    with pytest.raises(TaskError) as caught:
        Task.of("twins", [*rows(6), rows(4)[3]], split=split)
    assert "'twins'" in str(caught.value)
    assert "'q3'" in str(caught.value)
    assert "must differ" in str(caught.value)


def test_a_task_without_examples_is_refused() -> None:
    with pytest.raises(TaskError, match=r"'nothing' has no examples\. Check the file"):
        Task.of("nothing", [])


@pytest.mark.parametrize("settings", [{"split": "random"}, {"phrasings": "first"}])
def test_an_unknown_rule_is_refused_with_those_there_are(settings: dict[str, Any]) -> None:
    with pytest.raises(TaskError) as caught:
        Task.of("t", rows(3), **settings)
    assert repr(*settings.values()) in str(caught.value)
    assert "Write one of" in str(caught.value)


def test_a_limit_keeps_the_first_examples_of_a_split() -> None:
    split = Task.of("t", rows(50)).test
    assert split.limit(3).examples == split.examples[:3]
    assert split.limit(1000).examples == split.examples
    assert split.limit(None) == split
    assert (split.limit(3).task, split.limit(3).name, split.limit(3).scorer) == (split.task, split.name, split.scorer)


@pytest.mark.parametrize("n", [0, -1])
def test_a_limit_below_one_is_refused(n: int) -> None:
    with pytest.raises(TaskError, match=f"a limit of {n} leaves no example. Write 1 or more"):
        Task.of("t", rows(5)).test.limit(n)


def test_splits_go_by_name() -> None:
    task = Task.of("t", rows(10), scorer="choice", source="made up")
    for name, split in (("validation", task.validation), ("test", task.test), ("all", task.every)):
        assert task.split(name) is split
        assert (split.name, split.task, split.scorer) == (name, "t", "choice")
        assert len(split) == len(list(split)) == len(split.examples)
    assert task.source == "made up"
    with pytest.raises(TaskError, match="no split 'train'; there are validation, test and all"):
        task.split("train")


def test_the_hash_of_a_split_is_of_its_content_and_order_alone() -> None:
    examples = rows(10)
    split = Task.of("t", examples, split="paper").every
    assert split.hash == Task.of("another name", rows(10), scorer="choice").every.hash
    assert split.hash != Task.of("t", examples[::-1]).every.hash
    assert split.hash != split.limit(9).hash
    assert len(split.hash) == 64


@pytest.mark.parametrize(
    "change",
    [
        {"id": "q"},
        {"prompt": "Question 4: "},
        {"answer": "Answer 4"},
        {"choices": ("answer 4", "no")},
        {"group": "g"},
        {"fact": "q3"},
        {"popularity": 1.0},
    ],
    ids=lambda change: str(*change),
)
def test_a_change_of_any_field_changes_the_hash(change: dict[str, Any]) -> None:
    examples = rows(6)
    changed = [*examples[:4], replace(examples[4], **change), examples[5]]
    assert Task.of("t", examples).every.hash != Task.of("t", changed).every.hash


def test_neighbouring_fields_do_not_run_together_in_the_hash() -> None:
    first = Task.of("t", [Example(id="q", prompt="The sea", answer="is blue")]).every
    second = Task.of("t", [Example(id="q", prompt="The sea is", answer="blue")]).every
    assert first.hash != second.hash


@pytest.mark.parametrize("name", ["trivia", "", "jsonl", "jsonl:", "counterfact:file.json", "WorldFacts"])
def test_an_unknown_task_is_an_error_that_lists_the_names(name: str) -> None:
    with pytest.raises(TaskError) as caught:
        task_by_name(name)
    assert f"no task {name!r}" in str(caught.value)
    assert "there are worldfacts, counterfact, hotpotqa" in str(caught.value)
    assert "hub:ORG/NAME, perplexity:FILE and lm-eval:NAME. See 'laser tasks'" in str(caught.value)


def test_counterfact_that_cannot_be_downloaded_says_where_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: Any, **__: Any) -> None:
        raise OSError("no network")

    monkeypatch.setattr("urllib.request.urlopen", unreachable)
    with pytest.raises(TaskError) as caught:
        task_by_name("counterfact")
    assert "give it with --data" in str(caught.value)
    assert "https://rome.baulab.info/data/dsets/counterfact.json" in str(caught.value)


def test_an_unknown_scorer_is_refused() -> None:
    scorer: Any = "best_guess"
    with pytest.raises(TaskError, match="'best_guess'"):
        Task.of("t", rows(3), scorer=scorer)
