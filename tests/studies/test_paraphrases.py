from __future__ import annotations

import json
from dataclasses import replace

import pytest

from laserlm.errors import AnalysisError, ScoringError
from laserlm.jsonable import to_json
from laserlm.scoring.records import Evaluation, ExampleScore
from laserlm.scoring.statistics import mcnemar, paired_difference, paired_mean, wilson
from laserlm.studies.paraphrases import Growth, paraphrases
from laserlm.tasks import Example

# Of each phrasing: fact, answer, what is given before, and after.
ROWS = [
    ("france", "Paris", "Paris", "Paris"),
    ("france", "Paris", "paris", "Paris"),
    ("france", "Paris", "the", "Paris"),
    ("italy", "Rome", "Rome", "Rome"),
    ("italy", "Rome", "Rome", "rome"),
    ("italy", "Rome", "ROME", "a"),
    ("peru", "Lima", "a", "the"),
    ("peru", "Lima", "b", "the"),
    ("peru", "Lima", "c", "the"),
    ("norway", "Oslo", "a", "Oslo"),
    ("norway", "Oslo", "a", "the"),
    ("spain", "Madrid", "Madrid", "the"),
]
EXAMPLES = [Example(str(i), f"prompt {i}", answer, fact=fact, group="capital") for i, (fact, answer, *_) in enumerate(ROWS)]


def evaluation(column: int) -> Evaluation:
    scores = tuple(
        ExampleScore(str(i), row[column].lower() == row[1].lower(), -1.0, 1, row[column], row[1], "capital")
        for i, row in enumerate(ROWS)
    )
    return Evaluation("m", "t", "test", "next_token", "" if column == 2 else "1.fc_in@0.1", scores, 0.0)


BEFORE, AFTER = evaluation(2), evaluation(3)


def test_facts_and_their_phrasings_worked_out_by_hand() -> None:
    result = paraphrases(BEFORE, AFTER, EXAMPLES)
    assert (result.facts, result.single) == (4, 1)  # of Spain there is one phrasing
    # All right: before Italy, after France. Any right: before France and Italy, after Norway too.
    assert (result.all_right.base.value, result.all_right.edited.value) == (0.25, 0.25)
    assert result.all_right.base.interval == wilson(1, 4)
    assert (result.all_right.change.value, result.all_right.change.interval) == (0, paired_difference(1, 1, 4))
    assert result.all_right.p == mcnemar(1, 1)
    assert (result.any_right.base.value, result.any_right.edited.value) == (0.5, 0.75)
    assert (result.any_right.change.value, result.any_right.change.interval) == (0.25, paired_difference(1, 0, 4))
    # Pairs that agree, of France, Italy, Peru (three pairs each) and Norway (one).
    before, after = [1 / 3, 1, 0, 1], [1, 1 / 3, 1, 0]
    assert result.consistency.base.value == pytest.approx(sum(before) / 4)
    assert result.consistency.edited.value == pytest.approx(sum(after) / 4)
    assert result.consistency.edited.interval == pytest.approx(paired_mean(after))
    changes = [a - b for b, a in zip(before, after, strict=True)]
    assert result.consistency.change.value == pytest.approx(sum(changes) / 4)
    assert result.consistency.change.interval == pytest.approx(paired_mean(changes))
    assert result.consistency.p is None


def test_what_was_right_and_is_lost_worked_out_by_hand() -> None:
    result = paraphrases(BEFORE, AFTER, EXAMPLES)
    assert result.examples == Growth(kept=4, gained=2, lost=1)  # Spain's loss is not counted
    assert (result.comparison.corrected, result.comparison.broken, result.comparison.n) == (2, 1, 11)
    assert (result.examples.share_lost.value, result.examples.only_grows) == (0.2, False)
    assert result.examples.share_lost.interval == wilson(1, 5)
    assert result.complete_facts == Growth(kept=0, gained=1, lost=1)
    assert [(t.phrasings, t.counts) for t in result.tables] == [
        (2, ((0, 1, 0), (0, 0, 0), (0, 0, 0))),  # Norway
        (3, ((1, 0, 0, 0), (0, 0, 0, 0), (0, 0, 0, 1), (0, 0, 1, 0))),  # Peru; France; Italy
    ]
    plain = json.loads(json.dumps(to_json(result)))
    assert plain["examples"] == {
        "kept": 4,
        "gained": 2,
        "lost": 1,
        "share_lost": {"value": 0.2, "interval": list(wilson(1, 5)), "n": 5},
        "only_grows": False,
    }
    assert plain["all_right"]["p"] == 1
    assert plain["tables"][1]["counts"][2] == [0, 0, 0, 1]


def test_nothing_lost_still_leaves_a_share_possible() -> None:
    same = paraphrases(BEFORE, replace(BEFORE, intervention="1.fc_in@0.1"), EXAMPLES)
    assert same.examples.only_grows
    assert same.examples.share_lost.value == 0
    assert same.examples.share_lost.interval == wilson(0, 5)
    assert Growth(kept=0, gained=3, lost=0).share_lost.n == 0  # nothing was right, nothing could be lost
    assert to_json(Growth(kept=0, gained=3, lost=0))["share_lost"] == {"value": None, "interval": None, "n": 0}


def test_a_fact_asked_from_its_other_side_is_another_fact() -> None:
    turned = [replace(e, group="capital of") if e.id in ("1", "2") else e for e in EXAMPLES]
    assert paraphrases(BEFORE, AFTER, turned).single == 2
    unlike = [replace(e, answer="France") if e.id == "2" else e for e in EXAMPLES]
    result = paraphrases(BEFORE, AFTER, unlike)
    assert (result.facts, result.single, [t.phrasings for t in result.tables]) == (4, 2, [2, 3])


def test_what_cannot_be_grouped_is_reported() -> None:
    with pytest.raises(AnalysisError, match=r"no fact of the 12 of t/test has two phrasings; study a task with several"):
        paraphrases(BEFORE, AFTER, [replace(e, fact="") for e in EXAMPLES])
    with pytest.raises(AnalysisError, match="no example '11' that was scored"):
        paraphrases(BEFORE, AFTER, EXAMPLES[:-1])
    with pytest.raises(ScoringError, match="cannot compare"):
        paraphrases(BEFORE, replace(AFTER, scores=AFTER.scores[1:]), EXAMPLES)
