from __future__ import annotations

import tracemalloc
from dataclasses import replace

from laserlm.scoring.records import Evaluation, ExampleScore
from laserlm.searching.score_table import ScoreTable


def evaluation(intervention: str, start: int, stop: int, shift: float = 0.0) -> Evaluation:
    scores = tuple(
        ExampleScore(f"e{i}", i % 2 == 0, -i / 7 - shift, 1 + i % 3, f"word {i % 5}", f"answer {i}", "P36", {}, i % 4 == 0)
        for i in range(start, stop)
    )
    return Evaluation("tiny", "example", "validation", "answer", intervention, scores, 1.5, ("a", "b"))


def test_evaluations_come_back_as_they_were() -> None:
    table = ScoreTable([evaluation("", 0, 10), evaluation("1.fc_in@0.5", 0, 4, 0.25)])
    assert dict(table) == {"": evaluation("", 0, 10), "1.fc_in@0.5": evaluation("1.fc_in@0.5", 0, 4, 0.25)}
    assert table.first("", 3) == evaluation("", 0, 3)
    assert [s.tied for s in table.first("", 6).scores] == [True, False, False, False, True, False]
    assert (table.n(""), table.n("1.fc_in@0.5"), table.n("other"), "other" in table) == (10, 4, 0, False)


def test_scores_are_added_after_those_that_are_there_and_times_add_up() -> None:
    table = ScoreTable([evaluation("", 0, 4), evaluation("", 4, 9)])
    assert table[""] == replace(evaluation("", 0, 9), seconds=3.0)


def test_scores_that_differ_in_more_than_the_log_probability_are_distinguished() -> None:
    full = evaluation("", 0, 5)
    other = replace(full, intervention="b", scores=tuple(replace(s, figures={"f1": s.logprob}, tied=None) for s in full.scores))
    table = ScoreTable([full, other])
    assert table["b"] == other
    assert [s.figures for s in table["b"].scores] == [{"f1": s.logprob} for s in full.scores]
    assert {s.tied for s in table["b"].scores} == {None}


def test_a_score_takes_few_bytes() -> None:
    table = ScoreTable([evaluation("", 0, 500)])
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    for number in range(100):
        table.append(evaluation(f"{number}.fc_in@0.5", 0, 500, number / 3))
    durations = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert durations / (100 * 500) < 25
