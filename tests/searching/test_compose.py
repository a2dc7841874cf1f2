from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import pytest

from laserlm.edit import applied
from laserlm.models import LanguageModel
from laserlm.reductions import Intervention
from laserlm.scoring.evaluate import compare, evaluate
from laserlm.scoring.records import Evaluation, ExampleScore
from laserlm.searching import Candidate, SearchConfig, expand, search
from laserlm.searching.compose import compose, in_order
from laserlm.searching.config import Metric
from laserlm.searching.result import ComposeStep
from laserlm.searching.screen import Prediction
from laserlm.tasks import Example, Task

Make = Callable[..., LanguageModel]


@pytest.fixture
def task() -> Task:
    cities = ["Paris", "Rome", "Oslo", "Lisbon", "Madrid"]
    rows = [
        Example(f"{a}{b}", f"The capital of {a} and {b} is", cities[(i * 7) % 5])
        for i, (a, b) in enumerate((x, y) for x in "abcdefgh" for y in "uvwxyz")
    ]
    return Task.of("example", rows, scorer="answer")


def test_greedy_goes_from_the_last_block_and_the_smallest_size(llama: LanguageModel) -> None:
    candidates = expand("1-2.mlp@0.5,0.1", llama.matrices)
    names = [f"{layer}.{m}@{size}" for layer in (2, 1) for m in ("fc_in", "fc_up", "fc_out") for size in ("0.1", "0.5")]
    assert [str(c.intervention) for c in in_order(candidates, {}, SearchConfig(mode="greedy"))] == names


def test_joint_takes_what_the_screen_expects_most_of(llama: LanguageModel) -> None:
    candidates = expand("1-2.fc_in@0.5,0.1", llama.matrices)
    predictions = {
        "1.fc_in@0.5": Prediction(-1, 0, 9),
        "2.fc_in@0.1": Prediction(-3, 0, 9),
        "1.fc_in@0.1": Prediction(-2, 0, 9),
    }
    order = in_order(candidates, predictions, SearchConfig(candidates=2))
    assert [str(c.intervention) for c in order] == ["2.fc_in@0.1", "1.fc_in@0.1"]
    order = in_order(candidates, predictions, SearchConfig(sizes_per_matrix=1))
    assert [str(c.intervention) for c in order] == ["2.fc_in@0.1", "1.fc_in@0.1"]


@pytest.mark.parametrize("mode", ["greedy", "joint"])
@pytest.mark.parametrize("metric", ["loss", "accuracy"])
def test_steps_are_accepted_where_validation_improves_and_the_rest_is_undone(
    mode: Any, metric: Any, llama: LanguageModel, task: Task
) -> None:
    before = {name: p.detach().clone() for name, p in llama.model.named_parameters()}
    pointers = {name: p.data_ptr() for name, p in llama.model.named_parameters()}
    options = SearchConfig(first_rung=4)
    result = search(llama, task, strategy="compose", mode=mode, grid="all.all@0.5,0.2", metric=metric, config=options)
    for name, p in llama.model.named_parameters():
        assert p.data_ptr() == pointers[name]
        assert bool((p == before[name]).all())
    if metric == "loss":
        assert result.steps
    assert str(result.best) == (result.steps[-1].intervention if result.steps else "")
    reached = ""
    for step in result.steps:
        assert set(step.intervention.split("+")) - set(reached.split("+")) == {step.added}
        scored = []
        for text in (reached, step.intervention):
            with applied(llama, text):
                scored.append(evaluate(llama, task.validation))
        expected = compare(*scored)
        assert step.comparison.gain == pytest.approx(expected.gain)
        assert step.comparison.edited_loss == pytest.approx(expected.edited_loss, abs=1e-5)
        assert step.comparison.loss_interval.high < 0 if metric == "loss" else step.comparison.interval.low > 0
        reached = step.intervention
    matrices = [text.partition("@")[0] for text in reached.split("+") if text]
    assert len(matrices) == len(set(matrices))
    if result.steps:
        assert result.validation.edited_loss == pytest.approx(result.steps[-1].comparison.edited_loss)
        if mode == "greedy":
            blocks = [int(s.added.partition(".")[0]) for s in result.steps]
            assert blocks == sorted(blocks, reverse=True)


def test_a_fused_matrix_and_its_part_are_not_reduced_both(make: Make, task: Task) -> None:
    result = search(
        make("gpt2"), task, strategy="compose", mode="greedy", grid="all.qkv@0.5+all.attn@0.5", metric="loss",
        first_rung=4,
    )  # fmt: skip
    assert result.failed == {}


Outcome = Callable[[str, int], tuple[bool, float]]
"""Whether an intervention answers an example correctly, and its loss there."""


class Table:
    """A ledger of ``n`` examples that asks a function for each outcome."""

    def __init__(self, n: int, outcome: Outcome, per_fact: int = 1) -> None:
        self.split = range(n)
        self.outcome = outcome
        self.per_fact = per_fact
        self.scores: dict[str, list[ExampleScore]] = {}

    def extend(self, interventions: list[Intervention], stop: int) -> None:
        for text in map(str, interventions):
            scores = self.scores.setdefault(text, [])
            for i in range(len(scores), stop):
                correct, loss = self.outcome(text, i)
                scores.append(ExampleScore(str(i), correct, -loss, 1, "", "", fact=str(i // self.per_fact)))

    def fails(self, intervention: Intervention, stop: int) -> bool:
        return False

    def first(self, intervention: Intervention, n: int) -> Evaluation:
        return Evaluation("m", "t", "validation", "answer", str(intervention), tuple(self.scores[str(intervention)][:n]), 0.0)


def accepted(table: Table, candidates: list[Candidate], metric: Metric, **settings: Any) -> list[ComposeStep]:
    ledger: Any = table
    return list(compose(ledger, candidates, metric, SearchConfig(**settings)))


@pytest.fixture
def candidates(llama: LanguageModel) -> list[Candidate]:
    result = expand("all.all@0.7,0.5,0.3", llama.matrices)[:48]
    assert len(result) == 48
    return result


@pytest.mark.parametrize("metric", ["accuracy", "loss"])
@pytest.mark.parametrize("per_fact", [1, 3])
def test_useless_steps_are_accepted_no_more_often_than_stated(
    metric: Metric, per_fact: int, candidates: list[Candidate]
) -> None:
    """With trials that are tested one by one at 2.5 %, six of ten compositions accept a step."""
    runs, delta = 20, 0.05
    lucky = 0
    for seed in range(runs):
        draw = random.Random(seed)
        facts: dict[tuple[str, int], tuple[bool, float]] = {}

        def outcome(text: str, i: int, draw: random.Random = draw, facts: Any = facts) -> tuple[bool, float]:
            return facts.setdefault((text, i // per_fact), (draw.random() < 0.2, draw.expovariate(1)))

        lucky += bool(accepted(Table(300, outcome, per_fact), candidates, metric, delta=delta))
    assert lucky <= runs * delta + 3 * math.sqrt(runs * delta * (1 - delta))


@pytest.mark.parametrize(("corrected", "is_accepted"), [(10, True), (9, False)])
def test_a_gain_is_accepted_where_luck_among_all_trials_is_rarer_than_delta(
    corrected: int, is_accepted: bool, candidates: list[Candidate]
) -> None:
    """Nothing is broken, so the one-sided p-value is a half to the power of the corrected; 0.05 / 48 lies between the two."""
    assert 0.5**10 < 0.05 / 48 < 0.5**9
    helps = str(candidates[5].intervention)
    table = Table(100, lambda text, i: (helps in text and i % 5 == 0 and i < 5 * corrected, 1.0 + bool(text)))
    steps = accepted(table, candidates, "accuracy", first_rung=32)
    assert [step.added for step in steps] == ([helps] if is_accepted else [])
    (alone,) = accepted(table, [candidates[5]], "accuracy")
    assert alone.comparison.corrected == corrected


@pytest.mark.parametrize("metric", ["accuracy", "loss"])
def test_a_gain_within_its_interval_is_not_accepted(metric: Metric, candidates: list[Candidate]) -> None:
    """Two of a hundred are corrected, and the loss falls on the mean by less than its error."""
    spread = [0.5, -0.7]
    table = Table(100, lambda text, i: (bool(text) and i in (0, 50), 2 + (spread[i % 2] - 0.01 if text else 0.0)))
    table.extend([Intervention(), candidates[0].intervention], 100)
    c = compare(table.first(Intervention(), 100), table.first(candidates[0].intervention, 100))
    assert c.gain > 0 > c.interval.low
    assert c.edited_loss < c.base_loss
    assert c.loss_interval.high > 0
    assert accepted(table, candidates[:1], metric) == []


def test_a_gain_on_three_questions_of_each_fact_counts_once(candidates: list[Candidate]) -> None:
    helps = str(candidates[0].intervention)

    def outcome(text: str, i: int) -> tuple[bool, float]:
        return helps in text and i % 10 < 3 and i < 40, 1.0 + bool(text)

    assert len(accepted(Table(90, outcome), candidates, "accuracy")) == 1
    by_fact = Table(90, outcome, per_fact=10)  # twelve questions of four facts
    assert accepted(by_fact, candidates, "accuracy") == []
