"""The choice of single components: a step on known derivatives, and a whole search on a tiny model."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families import build
from searching.conftest import BeforeScoring
from searching.support import harm_on
from torch import Tensor

from laserlm.edit import applied
from laserlm.errors import ScoringError
from laserlm.models import LanguageModel
from laserlm.reductions import Intervention
from laserlm.scoring.evaluate import evaluate
from laserlm.scoring.records import Evaluation, ExampleScore
from laserlm.searching import SearchConfig, SearchProgress, SearchResult, components, expand, search
from laserlm.searching.components import choose_components, choose_step, parts_of, questions_with_room, separate_matrices
from laserlm.searching.config import Strategy
from laserlm.searching.guard import guards_of
from laserlm.searching.race import is_significantly_worse
from laserlm.searching.result import Point
from laserlm.searching.scorer import PrefixScorer
from laserlm.searching.session import SearchSession
from laserlm.tasks import Example, Split, Task

Make = Callable[..., LanguageModel]
MANY = 10**6
NO_HARM = 1e-9


# A step on known derivatives.


def drawn(E: int, K: int, seed: int, means: Sequence[float] | float = 0.0, spread: float = 0.05) -> Tensor:
    """Return derivatives (E, K) that are spread around some means (K,) of the components."""
    generator = torch.Generator().manual_seed(seed)
    return torch.as_tensor(means, dtype=torch.float32) + spread * torch.randn(E, K, generator=generator)


def step(c: Tensor, harm: Tensor | None = None, removed: Sequence[int] = (), per_fact: int = 1, **options: Any) -> list[int]:
    facts = [f"{i // per_fact}" for i in range(len(c))]
    harm = torch.full((c.shape[1],), NO_HARM) if harm is None else harm
    return choose_step(c, facts, harm, removed, **({"cap": MANY, "allowed": math.inf} | options))


def gain(c: Tensor, chosen: Sequence[int], removed: Sequence[int] = ()) -> float:
    """Return how much the mean loss is expected to fall: by the mean of the sum, less half its variance."""
    x = sum((-c[:, i] if i in removed else c[:, i] for i in chosen), torch.zeros(len(c)))
    return float(x.mean() - x.var() / 2)


def subsets(K: int) -> list[tuple[int, ...]]:
    return [s for n in range(K + 1) for s in itertools.combinations(range(K), n)]


@pytest.mark.parametrize("shared", [0.0, 0.2])
@pytest.mark.parametrize("seed", range(4))
def test_a_step_is_about_as_good_as_the_best_of_all_subsets(seed: int, shared: float) -> None:
    """Also where the components share a part of their spread over the questions."""
    draw = random.Random(seed)
    c = drawn(300, 8, seed, [draw.uniform(-0.1, 0.2) for _ in range(8)], 0.2)
    c = c + shared * torch.randn(300, 1, generator=torch.Generator().manual_seed(seed + 100))
    best = max(gain(c, s) for s in subsets(8))
    chosen = step(c)
    assert len(set(chosen)) == len(chosen)
    assert gain(c, chosen) >= 0.9 * best > 0
    assert gain(c, chosen) >= max(gain(c, [i]) for i in range(8))


@pytest.mark.parametrize("seed", range(4))
def test_a_step_uses_the_harm_that_it_may_add_about_as_well_as_the_best_of_all_subsets(seed: int) -> None:
    draw = random.Random(seed)
    c = drawn(300, 10, seed, [draw.uniform(0.02, 0.2) for _ in range(10)])
    harm = torch.tensor([draw.uniform(0.001, 0.003) for _ in range(10)])
    allowed = 0.01
    possible = [s for s in subsets(10) if float(harm[list(s)].sum()) <= allowed]
    chosen = step(c, harm, allowed=allowed)
    assert float(harm[chosen].sum()) <= allowed + 1e-6
    assert gain(c, chosen) >= 0.85 * max(gain(c, s) for s in possible)
    assert gain(c, chosen) >= max(gain(c, [i]) for i in range(10))


@pytest.mark.parametrize(("facts", "per_fact"), [(100, 1), (100, 3)])
def test_where_the_questions_say_nothing_a_step_takes_nothing(facts: int, per_fact: int) -> None:
    """The questions of a fact are equal, and say no more than one of them."""
    taken = [len(step(drawn(facts, 1000, seed).repeat_interleave(per_fact, 0), per_fact=per_fact)) for seed in range(20)]
    assert sum(n > 0 for n in taken) <= 1


def test_a_few_components_that_help_come_before_many_that_do_nothing() -> None:
    means = torch.zeros(1000)
    means[[3, 500, 998]] = torch.tensor([0.2, 0.1, 0.15])
    assert step(drawn(100, 1000, 0, means, 0.02))[:3] == [3, 998, 500]


def test_the_most_gain_for_the_harm_comes_first_and_no_more_than_the_cap() -> None:
    c = drawn(200, 4, 0, [0.2, 0.12, 0.1, 0.15], 0.01)
    harm = torch.tensor([0.08, 0.01, 0.01, 0.08])
    assert step(c, harm) == [1, 2, 0, 3]
    assert step(c, harm, cap=2) == [1, 2]
    assert step(c, harm, allowed=0.021) == [1, 2]
    # What is too harmful is passed over, and what comes after it is not.
    assert step(drawn(200, 3, 0, [0.9, 0.12, 0.1], 0.01), torch.tensor([0.05, 0.01, 0.01]), allowed=0.03) == [1, 2]
    assert step(c, harm, allowed=0.0) == []


def test_a_removed_component_is_put_back_where_the_loss_falls_with_its_strength() -> None:
    c = drawn(200, 4, 0, [0.1, -0.1, 0.1, -0.1], 0.01)
    assert set(step(c)) == {0, 2}
    assert set(step(c, removed=[1, 2])) == {0, 1}
    # To put one back adds no harm.
    assert step(c, torch.ones(4), removed=[1, 2], allowed=0.01) == [1]


def test_of_two_copies_one_is_taken_where_one_is_enough() -> None:
    one = drawn(400, 1, 0, 0.1, 0.3)
    assert gain(torch.cat([one, one], 1), [0]) > 0 > gain(torch.cat([one, one], 1), [0, 1]) - gain(one, [0])
    assert len(step(torch.cat([one, one], 1))) == 1
    # Two whose spread cancels are taken together; so are one to remove and a copy to put back.
    other = 2 * one.mean() - one
    assert len(step(torch.cat([one, other], 1))) == 2
    assert sorted(step(torch.cat([one, one - 2 * one.mean()], 1), removed=[1])) == [0, 1]


# A whole search.


def questions(validation: int = 45, test: int = 20, per_fact: int = 1) -> Task:
    """Return questions whose answers are of no use to the model that it is asked of, some of each fact."""
    cities = ["Paris", "Rome", "Oslo", "Lisbon", "Madrid"]
    names = ["".join(pair) for pair in itertools.product("abcdefghij", repeat=2)]
    examples = [
        Example(f"{i}", f"The capital of {names[i]} is", cities[i // per_fact * 7 % 3], fact=f"fact {i // per_fact}")
        for i in range(validation + test)
    ]
    parts = {"validation": examples[:validation], "test": examples[validation:], "every": examples}
    splits = {name: Split("example", name, tuple(part), "answer") for name, part in parts.items()}
    return Task("example", splits["validation"], splits["test"], splits["every"])


SETTINGS: dict[str, Any] = {"strategy": "components", "grid": "all.mlp@0.5", "metric": "loss", "max_harm": 1.0, "steps": 5}


@dataclass(frozen=True)
class Gradient:
    """A gradient that a search took: of which questions or passages, at which intervention."""

    split: str
    ids: tuple[str, ...]
    intervention: str
    squared: bool


@dataclass(frozen=True)
class Trial:
    """A step that a search tested: on which questions, and whether it was better than what was before it."""

    ids: tuple[str, ...]
    before: str
    after: str
    is_better: bool


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[Gradient | Trial]:
    """The gradients that are taken and the tests that are made."""
    seen: list[Gradient | Trial] = []
    contributions = PrefixScorer.contributions

    def watched(
        scorer: PrefixScorer, split: str, examples: Sequence[int], intervention: Intervention, *rest: Any, **options: Any
    ) -> dict[str, Tensor]:
        ids = tuple(scorer.splits[split].split.examples[i].id for i in examples)
        seen.append(Gradient(split, ids, str(intervention), bool(options.get("squared"))))
        return contributions(scorer, split, examples, intervention, *rest, **options)

    def tested(after: Evaluation, before: Evaluation, metric: Any, delta: float) -> bool:
        is_better = is_significantly_worse(after, before, metric, delta)
        seen.append(Trial(tuple(s.id for s in after.scores), before.intervention, after.intervention, is_better))
        return is_better

    monkeypatch.setattr(PrefixScorer, "contributions", watched)
    monkeypatch.setattr(components, "is_significantly_worse", tested)
    return seen


def test_what_a_search_chooses_gains_and_is_within_the_bound(llama: LanguageModel, events: list[Gradient | Trial]) -> None:
    task = questions()
    stages: list[str] = []
    result = search(llama, task, **SETTINGS, on_step=lambda progress: stages.append(progress.stage))
    assert (result.complete, result.strategy, result.failed) == (True, "components", {})
    assert result.best
    assert result.candidates == sum(m.max_rank for m in separate_matrices(expand(SETTINGS["grid"], llama.matrices)))
    (guard,) = guards_of(llama, None)
    bound = math.log1p(SETTINGS["max_harm"])
    accepted = {e.before for e in events if isinstance(e, Trial)} - {""} | {str(result.best)}
    assert accepted <= {p.intervention for p in result.points}
    for point in result.points:
        (harm,) = point.harms
        expected = harm_on(llama, guard, guard.choosing, point.intervention)
        assert (harm.change, harm.error) == pytest.approx((expected.change, expected.error), abs=1e-4)
        assert harm.change + harm.error <= bound or point.intervention not in accepted
    (chosen,) = [p for p in result.points if p.intervention == str(result.best)]
    assert chosen.comparison == result.validation
    # The harm that is told is measured on the other part.
    expected = harm_on(llama, guard, guard.measuring, str(result.best))
    assert [(harm.guard, harm.change) for harm in result.harms] == [("self", pytest.approx(expected.change, abs=1e-4))]
    assert result.harms[0].change != pytest.approx(chosen.harms[0].change, abs=1e-6)
    with applied(llama, result.best):
        edited = evaluate(llama, task.validation), evaluate(llama, task.test)
    assert result.validation.edited_loss == pytest.approx(edited[0].loss, abs=1e-4)
    assert result.test.edited_loss == pytest.approx(edited[1].loss, abs=1e-4)
    assert result.validation.edited_loss < result.validation.base_loss
    assert SearchResult.from_dict(json.loads(json.dumps(result.as_dict()))) == result
    assert {"components", "gradient 1", "step 1", "test"} <= set(stages)


@pytest.mark.parametrize("per_fact", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_no_fact_accepts_a_step_that_it_had_a_part_in_choosing(
    per_fact: int, llama: LanguageModel, events: list[Gradient | Trial]
) -> None:
    task = questions(45, 20, per_fact)
    search(llama, task, **SETTINGS | {"steps": 4}, seed=per_fact)
    fact_of = {e.id: e.fact for e in task.validation}
    graded: list[frozenset[str]] = []
    chosen_on: set[str] = set()
    for event in events:
        if isinstance(event, Gradient) and not event.squared:
            assert event.split == "validation"
            assert len(set(event.ids)) == len(event.ids)
            chosen_on = {fact_of[id] for id in event.ids}
        elif isinstance(event, Trial):
            facts = {fact_of[id] for id in event.ids}
            assert not facts & chosen_on
            assert facts | chosen_on == set(fact_of.values())
            graded.append(frozenset(facts))
    assert len(set(graded)) > 1  # the parts take turns


def test_a_step_is_chosen_on_as_many_questions_as_memory_has_room_for(
    llama: LanguageModel, events: list[Gradient | Trial], caplog: pytest.LogCaptureFixture
) -> None:
    K = sum(m.max_rank for m in separate_matrices(expand(SETTINGS["grid"], llama.matrices)))
    settings = SETTINGS | {"steps": 1, "memory": 22 * 16 * K}
    search(llama, questions(), **settings)
    (gradient,) = [e for e in events if isinstance(e, Gradient) and not e.squared]
    (trial,) = [e for e in events if isinstance(e, Trial)]
    assert (len(gradient.ids), len(trial.ids)) == (22, 15)
    assert "components are chosen on 22 of 30 questions" in caplog.text
    least = math.ceil(1000 * 16 * K * 45 / 2**30) / 1000  # of three equal parts
    assert f"the least bound that has room for all that are used is --memory {least:g}" in caplog.text
    caplog.clear()
    search(llama, questions(), **settings | {"memory": least * 2**30})
    assert "are chosen on" not in caplog.text


def test_the_harm_of_components_is_of_the_choosing_part_of_the_guard(
    llama: LanguageModel, events: list[Gradient | Trial]
) -> None:
    (guard,) = guards_of(llama, None)
    search(llama, questions(), **SETTINGS | {"steps": 1})
    (harm,) = [e for e in events if isinstance(e, Gradient) and e.squared]
    assert harm.ids == tuple(e.id for e in guard.choosing.split)
    assert harm.intervention == ""
    # It does not depend on the task: another search takes it from the cache.
    events.clear()
    search(llama, questions(30), **SETTINGS | {"steps": 1})
    assert [e.squared for e in events if isinstance(e, Gradient)] == [False]


@pytest.mark.parametrize("max_harm", [1.0, pytest.param(0.02, marks=pytest.mark.slow)])
def test_a_search_that_is_interrupted_after_any_score_goes_on_with_the_same_result(
    max_harm: float, llama: LanguageModel, tmp_path: Path, events: list[Gradient | Trial]
) -> None:
    task, settings = questions(30, 6), SETTINGS | {"steps": 3, "max_harm": max_harm}
    uninterrupted = search(llama, task, **settings)
    needed = {e for e in events if isinstance(e, Gradient) and not e.squared}
    events.clear()

    def interrupt(progress: SearchProgress) -> None:
        if not progress.stage.startswith(("gradient", "harm")):  # which are told when they begin
            raise KeyboardInterrupt

    results: list[SearchResult | None] = []
    while not results or (results[-1] is None and len(results) < 40):
        try:
            results.append(search(llama, task, **settings, store=tmp_path / "runs.db", on_step=interrupt))
        except KeyboardInterrupt:
            results.append(None)
        assert llama.intervention == ""
    assert len(results) > 4
    result = results[-1]
    assert result is not None
    own: dict[str, Any] = {"run": "", "seconds": 0, "boundary_bytes": 0, "decomposition_bytes": 0}
    assert replace(result, **own) == replace(uninterrupted, **own)
    taken = [e for e in events if isinstance(e, Gradient)]
    assert set(taken) == needed  # the harm is in the cache
    if max_harm == 1.0:  # a step beyond the bound is followed by a smaller one, for which a new process needs the gradient
        assert len(taken) == len(needed)
    events.clear()
    assert search(llama, task, **settings, store=tmp_path / "runs.db") == result
    assert events == []


def test_at_the_end_of_its_time_a_search_has_the_last_accepted_step(
    llama: LanguageModel, monkeypatch: pytest.MonkeyPatch, before_scoring: BeforeScoring, events: list[Gradient | Trial]
) -> None:
    task = questions()
    search(llama, task, **SETTINGS)
    first = next(e.before for e in events if isinstance(e, Trial) and e.before)  # what the first accepted step led to
    clock = [0.0]
    tried: list[str] = []

    def before(text: str, split: Split) -> None:
        if split.name == "validation" and text not in tried:
            clock[0] += 1e6 if first in tried else 0  # time is up when the next step is scored
            tried.append(text)

    before_scoring(before)
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    result = search(llama, task, **SETTINGS, budget=1)
    assert not result.complete
    assert tried[-2] == str(result.best) == first
    assert result.validation.n == len(task.validation)
    assert result.test.n == len(task.test)
    assert [harm.comparison.intervention for harm in result.harms] == [first]


@pytest.mark.slow
def test_a_tighter_bound_is_kept(llama: LanguageModel) -> None:
    loose, tight = (search(llama, questions(), **SETTINGS | {"max_harm": bound}) for bound in (1.0, 0.01))
    assert loose.best
    (harm,) = next(p for p in loose.points if p.intervention == str(loose.best)).harms
    assert harm.change + harm.error > math.log1p(0.01)
    for point in tight.points:
        if point.intervention == str(tight.best):
            assert all(harm.change + harm.error <= math.log1p(0.01) for harm in point.harms)
    assert tight.best != loose.best


@pytest.mark.parametrize(("max_harm", "delta"), [(1e-9, 1.0), (1.0, 0.0)])
def test_a_search_that_keeps_the_model_says_why(max_harm: float, delta: float, llama: LanguageModel) -> None:
    result = search(llama, questions(), **SETTINGS | {"steps": 2, "max_harm": max_harm, "delta": delta})
    assert not result.best
    (reason,) = result.verdict()
    assert f"No step within the bound on harm (--max-harm {max_harm:.2g}) helped" in reason
    refused = replace(result, scored=1, points=(Point("1.fc_in@drop0", result.validation, ()),))
    assert refused.verdict() == [f"Every step that gained cost more than the bound on harm (--max-harm {max_harm:.2g}) allows."]


def test_a_setting_of_a_race_asks_for_a_race() -> None:
    assert SearchConfig.of(candidates=8).strategy == "race"
    assert SearchConfig.of(candidates=8, strategy="compose").strategy == "compose"
    assert SearchConfig.of("quick").strategy is None
    assert SearchConfig.of("quick", strategy="components", delta=0.1).steps == 4
    with pytest.raises(ScoringError, match=r"keep 0.5 is a setting of the strategy race, and components has .*--strategy race"):
        SearchConfig.of(keep=0.5, strategy="components")


def test_steps_ask_for_components() -> None:
    assert SearchConfig.of(steps=2).strategy == "components"
    for settings in ({"candidates": 8}, {"strategy": "race"}, {"strategy": "exhaustive"}):
        with pytest.raises(ScoringError, match=r"steps 2 is a setting of the strategy components, and .* has none"):
            SearchConfig.of(steps=2, **settings)
    with pytest.raises(ScoringError, match=r"steps 2 is a setting of the strategy components, and strengths has none"):
        SearchConfig.of(steps=2, strategy="strengths")


def test_a_gradient_is_over_as_many_questions_as_asked_for() -> None:
    parts = parts_of([str(i) for i in range(90)])
    assert len(questions_with_room(SearchConfig(gradient_examples=30), 1, parts)) == 30
    assert len(questions_with_room(SearchConfig(gradient_examples=1000), 1, parts)) == 90


@pytest.mark.parametrize("strategy", ["components", "strengths", None])
def test_questions_of_too_few_facts_choose_nothing(strategy: Strategy | None, llama: LanguageModel) -> None:
    result = search(llama, questions(20, 20, per_fact=10), strategy=strategy, metric="loss")
    assert (result.strategy, str(result.best), result.points) == (strategy or "strengths", "", ())
    (reason,) = result.verdict()
    assert "questions are of 2 facts. A choice of components needs 3 at least" in reason


def test_a_model_that_writes_no_text_needs_a_task_that_guards(make: Make) -> None:
    bert = make("bert")
    with pytest.raises(ScoringError, match=r"needs a guard, and bert .* writes no text .*--guard TASK"):
        search(bert, questions(), **SETTINGS)
    guard = replace(questions(6, 6), name="guard")
    result = search(bert, questions(), **SETTINGS | {"steps": 2, "delta": 0.9}, guards=(guard,))
    assert [(harm.guard, harm.kind, harm.comparison.n) for harm in result.harms] == [("guard", "questions", 6)]


def test_a_step_that_cannot_be_scored_is_not_accepted(llama: LanguageModel, before_scoring: BeforeScoring) -> None:
    def broken(text: str, split: Split) -> None:
        if split.name == "validation" and text:
            raise ScoringError("a log-probability of nan")

    before_scoring(broken)
    result = search(llama, questions(), **SETTINGS)
    assert (str(result.best), len(result.failed)) == ("", result.scored)
    assert result.scored > 0


# Steps that help nobody.


class Useless:
    """A ledger and an executor under which every component promises a gain, and each intervention moves losses at random."""

    def __init__(self, examples: Sequence[Example], seed: int) -> None:
        self.draw = random.Random(seed)
        self.split = Split("example", "validation", tuple(examples), "answer")
        self.encoded, self.name, self.deadline, self.cost, self.scored = self, "validation", math.inf, 0.0, 0
        self.scorer, self.executor, self.workers = "answer", self, 1
        self.scores: dict[str, Evaluation] = {}
        self.failed: dict[str, str] = {}
        self.on_scored: Any = None

    def run(self, tasks: Sequence[Any], **_: Any) -> Any:
        for task in tasks:
            means = {m.id: [self.draw.uniform(-0.1, 0.1) for _ in range(m.max_rank)] for m in task.matrices}
            n = len(task.examples)
            yield task, {id: drawn(n, len(of), self.draw.randrange(MANY), of) for id, of in means.items()}

    def n(self, intervention: Intervention) -> int:
        return self.scores[str(intervention)].n if str(intervention) in self.scores else 0

    def fails(self, *_: Any) -> bool:
        return False

    def share(self, _: Intervention) -> float:
        return 1.0

    def first(self, intervention: Intervention, n: int) -> Evaluation:
        evaluation = self.scores[str(intervention)]
        return replace(evaluation, scores=evaluation.scores[:n])

    def extend(self, interventions: Sequence[Intervention], _: int) -> None:
        for text in (str(i) for i in interventions if str(i) not in self.scores):
            scores = [ExampleScore(e.id, False, self.draw.gauss(-3, 0.1), 1, "", "", fact=e.fact) for e in self.split.examples]
            self.scores[text] = Evaluation("m", "example", "validation", "answer", text, tuple(scores), 0.0)


def test_useless_steps_are_accepted_no_more_often_than_stated(monkeypatch: pytest.MonkeyPatch) -> None:
    candidates = expand("1.fc_in@0.5", build("llama").matrices)
    monkeypatch.setattr(components.ComponentPool, "harm", lambda pool, _: torch.full((len(pool),), 0.01))
    monkeypatch.setattr(SearchSession, "allows", lambda *_: True)
    delta, searches, accepted, steps = 0.3, 100, 0, []
    config = SearchConfig(**SETTINGS | {"delta": delta})
    for seed in range(searches):
        ledger: Any = Useless([Example(f"{i}", "a", "b", fact=f"{i}") for i in range(30)], seed)
        run: Any = SimpleNamespace(notes={}, note=lambda *_: None)
        session = SearchSession(run, ledger, ledger, ledger, candidates, config, [], lambda _: None)
        choose_components(session)
        accepted += bool(session.best)
        steps.append(len(ledger.scores) - 1)
    assert min(steps) >= 1
    assert accepted / searches < delta + 3 * (delta * (1 - delta) / searches) ** 0.5
    assert accepted > 0
