from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy import stats

from laserlm.errors import ScoringError
from laserlm.models import LanguageModel
from laserlm.reductions import Intervention
from laserlm.scoring.records import Evaluation, ExampleScore
from laserlm.scoring.tokenize import encode
from laserlm.searching import Candidate, SearchConfig, expand, search
from laserlm.searching.config import Metric
from laserlm.searching.executors import LocalExecutor
from laserlm.searching.ledger import ScoreLedger
from laserlm.searching.race import choose, is_significantly_worse, race, rung_sizes, shuffled_order
from laserlm.searching.result import RungReport
from laserlm.searching.scorer import EncodedSplit, PrefixScorer
from laserlm.searching.screen import Prediction
from laserlm.store import Store
from laserlm.tasks import Example, Split, Task

Make = Callable[..., LanguageModel]
GRID = "0-1.mlp@0.8,0.6,0.4,0.2"


def make_evaluation(correct: list[bool], losses: list[float] | None = None, per_fact: int = 1) -> Evaluation:
    losses = losses or [1.0] * len(correct)
    scores = [
        ExampleScore(str(i), c, -loss, 1, "", "", fact=f"fact {i // per_fact}")
        for i, (c, loss) in enumerate(zip(correct, losses, strict=True))
    ]
    return Evaluation("m", "t", "validation", "answer", "x", tuple(scores), 0.0)


def test_rungs_double_until_less_than_a_doubling_is_left() -> None:
    assert rung_sizes(300, 16) == [16, 32, 64, 128, 300]
    assert rung_sizes(64, 16) == [16, 32, 64]
    assert rung_sizes(5, 16) == [5]


def test_the_order_depends_on_the_seed_and_the_ids_alone() -> None:
    ids = [f"q{i}" for i in range(50)]
    order = shuffled_order(ids, 0)
    assert sorted(order) == list(range(50))
    assert [ids[i] for i in order] == [ids[::-1][i] for i in shuffled_order(ids[::-1], 0)]
    assert shuffled_order(ids, 1) != order


@pytest.mark.parametrize(("ahead", "behind"), [(1, 0), (7, 1), (12, 2), (3, 9)])
def test_accuracy_is_compared_by_the_exact_one_sided_test(ahead: int, behind: int) -> None:
    leader = make_evaluation([True] * ahead + [False] * behind + [True, False])
    other = make_evaluation([False] * ahead + [True] * behind + [True, False])
    p = stats.binomtest(ahead, ahead + behind, alternative="greater").pvalue
    assert is_significantly_worse(leader, other, "accuracy", p + 1e-9)
    assert not is_significantly_worse(leader, other, "accuracy", p - 1e-9)
    assert not is_significantly_worse(leader, leader, "accuracy", 0.99)


def test_loss_is_compared_by_the_paired_test() -> None:
    a, b = [0.5, 1.2, 0.8, 2.0, 0.1], [0.9, 1.3, 1.6, 2.2, 0.6]
    p = stats.ttest_rel(b, a, alternative="greater").pvalue
    assert is_significantly_worse(make_evaluation([True] * 5, a), make_evaluation([True] * 5, b), "loss", p + 1e-9)
    assert not is_significantly_worse(make_evaluation([True] * 5, a), make_evaluation([True] * 5, b), "loss", p - 1e-9)
    assert is_significantly_worse(
        make_evaluation([True] * 2, [1.0, 1.0]), make_evaluation([True] * 2, [2.0, 2.0]), "loss", 1e-9
    )
    assert not is_significantly_worse(make_evaluation([True], [1.0]), make_evaluation([True], [2.0]), "loss", 0.5)


@pytest.mark.parametrize("metric", ["accuracy", "loss"])
def test_equals_are_eliminated_no_more_often_than_stated(metric: Metric) -> None:
    draw = random.Random(0)
    delta, runs, n = 0.05, 2000, 60
    lost = 0
    for _ in range(runs):
        pair = [
            make_evaluation([draw.random() < 0.2 for _ in range(n)], [draw.expovariate(1) for _ in range(n)]) for _ in range(2)
        ]
        lost += is_significantly_worse(pair[0], pair[1], metric, delta)
    assert lost / runs < delta + 3 * (delta * (1 - delta) / runs) ** 0.5


@pytest.mark.parametrize("metric", ["accuracy", "loss"])
def test_questions_of_one_fact_do_not_beat_more_often_than_stated(metric: Metric) -> None:
    """A race over four rungs of facts of three equal questions, between two that are equally good."""
    draw = random.Random(0)
    delta, runs, sizes = 0.05, 200, [15, 30, 60, 120]
    lost, as_independent = 0, 0
    for _ in range(runs):
        facts = [(draw.random() < 0.3, draw.random() < 0.3, draw.expovariate(1), draw.expovariate(1)) for _ in range(40)]
        rows = [fact for fact in facts for _ in range(3)]
        for per_fact in (3, 1):
            first = make_evaluation([a for a, *_ in rows], [x for *_, x, _ in rows], per_fact)
            second = make_evaluation([b for _, b, *_ in rows], [y for *_, y in rows], per_fact)
            rungs = [[replace(e, scores=e.scores[:n]) for e in (first, second)] for n in sizes]
            is_worse = any(is_significantly_worse(a, b, metric, delta / len(sizes)) for a, b in rungs)
            lost += is_worse and per_fact == 3
            as_independent += is_worse and per_fact == 1
    assert lost / runs < delta + 3 * (delta * (1 - delta) / runs) ** 0.5
    assert as_independent / runs > 3 * delta


def test_one_fact_alone_beats_nothing() -> None:
    better, worse = make_evaluation([True] * 9, [1.0] * 8 + [1.1], 9), make_evaluation([False] * 9, [2.0] * 9, 9)
    for metric in ("accuracy", "loss"):
        chosen: Metric = metric  # type: ignore[assignment]
        assert not is_significantly_worse(better, worse, chosen, 0.2)


@pytest.fixture
def candidates(llama: LanguageModel) -> list[Candidate]:
    return expand(GRID, llama.matrices)


def test_the_screen_sends_its_best_few_sizes_a_matrix_and_some_others(candidates: list[Candidate]) -> None:
    texts = [str(c.intervention) for c in candidates]
    predictions = {t: Prediction(-1.0 * i, 0.0, 9) for i, t in enumerate(texts)}
    options = SearchConfig(candidates=5, sizes_per_matrix=2, random_candidates=3)
    chosen, controls = choose(candidates, predictions, options)
    assert [str(c.intervention) for c in chosen] == [
        "1.fc_out@0.2",
        "1.fc_out@0.4",
        "1.fc_up@0.2",
        "1.fc_up@0.4",
        "1.fc_in@0.2",
    ]
    assert len(controls) == 3
    assert not {str(c.intervention) for c in controls} & {str(c.intervention) for c in chosen}
    assert choose(candidates, predictions, options)[1] == controls
    assert choose(candidates, predictions, replace(options, seed=3))[1] != controls
    # What could not be screened may still be drawn.
    only = {t: p for t, p in predictions.items() if t.startswith("0.fc_in")}
    assert {c.matrix.id for c in choose(candidates, only, options)[0]} == {"0.fc_in"}


def test_a_large_spread_over_the_examples_makes_the_screen_expect_less() -> None:
    assert Prediction(-1.0, 2.0, 100).expected == pytest.approx(1.0)
    assert Prediction(-1.0, 0.2, 100).expected == pytest.approx(-0.98)
    assert Prediction(-1.0, None, 100).expected == -1.0
    assert Prediction(-1.0, 2.0, 100).error == pytest.approx(0.2)


class Table:
    """Trials whose scores stand in a table: loss of each candidate on each example."""

    def __init__(self, losses: dict[str, list[float]], failing: dict[str, int] | None = None) -> None:
        self.losses = losses
        self.failing = failing or {}
        self.scores: dict[str, Evaluation] = {}
        self.failed: dict[str, str] = {}
        self.split = losses[""]
        self.asked: list[tuple[list[str], int]] = []

    def n(self, intervention: Intervention) -> int:
        result = self.scores.get(str(intervention))
        return result.n if result else 0

    def fails(self, intervention: Intervention, stop: int) -> bool:
        return str(intervention) in self.failed and self.n(intervention) < stop

    def first(self, intervention: Intervention, n: int) -> Evaluation:
        result = self.scores[str(intervention)]
        return replace(result, scores=result.scores[:n])

    def extend(self, interventions: list[Intervention], stop: int, **_: Any) -> None:
        self.asked.append(([str(i) for i in interventions], stop))
        for text in (str(i) for i in interventions if self.n(i) < stop):
            if stop > self.failing.get(text, 10**9):
                self.failed[text] = "no"
            else:
                self.scores[text] = make_evaluation([False] * stop, self.losses[text][:stop])


def run(
    table: Table,
    candidates: list[Candidate],
    entered: list[str],
    is_allowed: Callable[[Intervention], bool] = lambda _: True,
    **options: float,
) -> list[RungReport]:
    by_text = {str(c.intervention): c for c in candidates}
    arguments: dict[str, float] = {"first": 8, "keep": 0.5, "delta": 0.05, **options}
    settings = SearchConfig(first_rung=int(arguments["first"]), keep=arguments["keep"], delta=arguments["delta"])
    trials: ScoreLedger = table  # type: ignore[assignment]
    return list(race(trials, [by_text[t] for t in entered], candidates, "loss", settings, is_allowed=is_allowed))


def noisy(mean: float, seed: int, n: int = 64, spread: float = 0.2) -> list[float]:
    draw = random.Random(seed)
    return [mean + draw.gauss(0, spread) for _ in range(n)]


def test_harmful_leaders_drop_nobody_and_take_no_place(candidates: list[Candidate]) -> None:
    texts = [str(c.intervention) for c in candidates]
    harmful = texts[:12]  # far better on the questions than all others, and more than a rung keeps
    losses = {"": noisy(3, 0)} | {t: noisy(1 if t in harmful else 2.8, i) for i, t in enumerate(texts, 1)}
    losses[texts[20]] = noisy(2, 99)
    asked: list[str] = []

    def is_allowed(intervention: Intervention) -> bool:
        asked.append(str(intervention))
        return str(intervention) not in harmful

    rungs = run(Table(losses), candidates, texts, is_allowed, keep=0.25)
    assert {r.leader for r in rungs} == {texts[20]}
    assert [r.harmful for r in rungs][:2] == [12, 0]
    assert len(set(asked)) < len(texts)  # the harm of what leaves anyhow is not measured


def test_what_is_significantly_worse_leaves_at_once_and_the_best_stays(candidates: list[Candidate]) -> None:
    texts = [str(c.intervention) for c in candidates]
    losses = {"": noisy(3, 0)} | {t: noisy(5.0, i) for i, t in enumerate(texts, 1)} | {"1.fc_up@0.6": noisy(2, 99)}
    table = Table(losses)
    rungs = run(table, candidates, texts, keep=1)
    assert rungs[0] == RungReport(8, 24, 23, 0, 0, 0, "1.fc_up@0.6")
    assert [r.entered for r in rungs] == [24, 1, 1, 1]
    assert rungs[-1].leader == "1.fc_up@0.6"
    assert table.asked[-1] == (["", "1.fc_up@0.6"], 64)


def test_half_leave_without_proof_and_neighbours_of_the_leader_join(candidates: list[Candidate]) -> None:
    texts = [str(c.intervention) for c in candidates]
    losses = {"": noisy(3, 0)} | {t: noisy(2.9, i, spread=3) for i, t in enumerate(texts, 1)}
    losses |= {"0.fc_in@0.6": [2.0] * 64, "0.fc_in@0.4": [1.5] * 64, "0.fc_in@0.2": [1.4] * 64}
    entered = ["0.fc_in@0.6", "1.fc_in@0.6", "1.fc_up@0.6", "1.fc_out@0.6"]
    rungs = run(Table(losses), candidates, entered, delta=1e-9)
    assert (rungs[0].leader, rungs[0].pruned, rungs[0].added) == ("0.fc_in@0.6", 2, 2)
    assert rungs[1].leader == "0.fc_in@0.4"
    assert rungs[-1].leader == "0.fc_in@0.2"
    assert all(r.entered <= 4 for r in rungs)


def test_no_more_than_the_share_go_on_where_it_is_no_whole_number(candidates: list[Candidate]) -> None:
    losses = {"": noisy(3, 0)} | {str(c.intervention): noisy(2.9, i, spread=3) for i, c in enumerate(candidates, 1)}
    rungs = run(Table(losses), candidates, ["0.fc_in@0.6", "1.fc_in@0.6", "1.fc_up@0.6"], delta=1e-9)
    assert (rungs[0].entered, rungs[0].pruned) == (3, 2)


def test_the_error_probability_is_shared_among_candidates_and_rungs(candidates: list[Candidate]) -> None:
    difference = [0.35, 0.1, 0.3, -0.1, 0.4, 0.2, -0.05, 0.3]
    p = stats.ttest_1samp(difference, 0, alternative="greater").pvalue
    shared = 0.05 / (25 * 4)  # 24 candidates and the unchanged model, four rungs
    assert shared < p < 0.05
    losses = {str(c.intervention): [9.0] * 64 for c in candidates} | {"": [9.0] * 64, "0.fc_in@0.6": [2.0] * 64}
    losses["1.fc_in@0.6"] = [2 + d for d in difference] * 8
    entered = ["0.fc_in@0.6", "1.fc_in@0.6"]
    assert run(Table(losses), candidates, entered, keep=1)[0].eliminated == 0
    assert run(Table(losses), candidates, entered, keep=1, delta=0.9999)[0].eliminated == (p <= 0.9999 / 100)


def test_the_unchanged_model_runs_along_and_may_lead(candidates: list[Candidate]) -> None:
    texts = [str(c.intervention) for c in candidates]
    table = Table({"": noisy(1, 0)} | {t: noisy(5.0, i) for i, t in enumerate(texts, 1)})
    rungs = run(table, candidates, texts)
    assert [(r.entered, r.leader) for r in rungs] == [(24, ""), (0, ""), (0, ""), (0, "")]
    assert table.scores[""].n == 64


def test_a_candidate_that_fails_on_the_way_is_out(candidates: list[Candidate]) -> None:
    texts = ["0.fc_in@0.6", "1.fc_in@0.6", "1.fc_up@0.6"]
    every = [c for c in candidates if str(c.intervention) in texts]
    losses = {"": noisy(3, 0)} | {t: noisy(2.0, i) for i, t in enumerate(texts, 1)} | {texts[0]: noisy(1.0, 9)}
    rungs = run(Table(losses, {texts[0]: 8}), every, texts, keep=1, delta=1e-12)
    assert rungs[0].leader == texts[0]
    assert rungs[1].failed == 1
    assert rungs[-1].leader in texts[1:]


@pytest.mark.parametrize("known", range(0, 25, 2))
def test_scores_of_later_rungs_do_not_change_the_race(known: int, candidates: list[Candidate]) -> None:
    texts = [str(c.intervention) for c in candidates]
    losses = {"": noisy(3, 0)} | {t: noisy(2.9 - i / 40, i, spread=1) for i, t in enumerate(texts, 1)}
    entered = [t for t in texts if t.endswith(("@0.6", "@0.2"))]
    failing = {texts[-1]: 16, texts[5]: 8}
    undisturbed = run(Table(losses, failing), candidates, entered)
    table = Table(losses, failing)
    for i, text in enumerate(["", *texts][:known]):
        n = min([64, 16, 8][i % 3], failing.get(text, 64))
        table.scores[text] = make_evaluation([False] * n, losses[text][:n])
        if failing.get(text) == n:
            table.failed[text] = "no"
    assert run(table, candidates, entered) == undisturbed


def test_options_that_mean_nothing_are_refused() -> None:
    for wrong, message in (
        ({"first_rung": 0}, "first_rung 0 leaves a search with nothing to do"),
        ({"candidates": 0}, "candidates 0"),
        ({"sizes_per_matrix": 0}, "sizes_per_matrix 0"),
        ({"screen_examples": 0}, "screen_examples 0"),
        ({"keep": 1.5}, "keep and delta from 0 to 1"),
        ({"delta": -0.1}, "keep and delta from 0 to 1"),
        ({"random_candidates": -1}, "random_candidates must be 0 or more"),
        ({"strategy": "luck"}, "no strategy 'luck'; there are strengths, components, race, exhaustive, compose"),
        ({"mode": "any"}, "no mode 'any'; there are joint, greedy"),
        ({"metric": "speed"}, "no metric 'speed'; there are accuracy, loss"),
        ({"width": 3}, "a search has no setting 'width'; it has strategy, grid"),
        ({"effort": "huge"}, "no effort 'huge'; there are quick, normal, thorough"),
    ):
        with pytest.raises(ScoringError, match=message):
            SearchConfig.of(**wrong)  # type: ignore[arg-type]


def test_an_effort_sets_only_what_no_option_sets() -> None:
    assert SearchConfig.of() == SearchConfig.of("normal") == SearchConfig()
    quick, thorough = SearchConfig.of("quick"), SearchConfig.of("thorough")
    for name in ("candidates", "sizes_per_matrix", "screen_examples", "first_rung", "keep"):
        assert getattr(quick, name) < getattr(SearchConfig(), name) < getattr(thorough, name)
    assert SearchConfig.of("quick", candidates=99, metric="loss").candidates == 99


def test_an_effort_next_to_a_config_is_refused_and_not_dropped(llama: LanguageModel, task: Task) -> None:
    with pytest.raises(ScoringError, match=r"exclude each other; write SearchConfig\.of\('quick', \.\.\.\)"):
        search(llama, task, SearchConfig(), effort="quick")


def test_a_wide_race_without_halving_finds_what_an_exhaustive_search_finds(llama: LanguageModel, tmp_path: Path) -> None:
    draw = random.Random(1)
    rows = [
        Example(
            f"{i}", f"The city {draw.choice('abcdef')} near {draw.choice('uvwxyz')} is", draw.choice(["Paris", "Rome", "Oslo"])
        )
        for i in range(200)
    ]
    task = Task.of("example", rows, scorer="answer")
    task = replace(task, test=task.test.limit(30))
    for metric in ("accuracy", "loss"):
        chosen: Metric = metric  # type: ignore[assignment]
        full = search(llama, task, strategy="exhaustive", grid="all.mlp@0.5,0.2", metric=chosen)
        options = SearchConfig(candidates=99, keep=1, first_rung=8)
        store = tmp_path / f"{metric}.db"
        result = search(llama, task, grid="all.mlp@0.5,0.2", metric=chosen, config=options, store=store)
        assert result.best == full.best
        assert result.test.corrected == full.test.corrected
        assert result.validation.n == full.validation.n
        with Store.open(store) as results:
            on_test = {t.intervention for t in results.trials(result.run) if t.split == "test"}
        assert on_test == {"", str(result.best)}
        screened = result.screened
        assert screened is not None
        assert (screened.candidates, screened.chosen, screened.controls) == (18, 18, 0)
        assert set(screened.measured) == set(screened.expected)


def test_trials_keep_what_they_have(llama: LanguageModel, tmp_path: Path) -> None:
    split = Split(
        "example", "validation", tuple(Example(str(i), "The river " * (i + 1) + "is", "long") for i in range(6)), "answer"
    )
    parts = [Intervention(), Intervention.parse("2.fc_in@0.5"), Intervention.parse("1.fc_out@0.5")]
    with Store.open(tmp_path / "runs.db") as store:
        work = {"kind": "search", "key": "k", "settings": {"model": "m", "task": "t"}, "provenance": {}}
        with store.run(**work) as run_:  # type: ignore[arg-type]
            rows = encode(llama, split.examples, "answer")
            encoded = EncodedSplit(split, rows, "answer")
            local = LocalExecutor(PrefixScorer(llama, {"example": encoded}))
            trials = ScoreLedger(llama, run_, "example", encoded, local)
            trials.extend(parts, 2)
            trials.extend(parts[:2], 5)
            assert [trials.n(i) for i in parts] == [5, 5, 2]
            trials.extend(parts, 6)
            stepwise = trials.scores
            # Of three blocks: all for the unchanged model, two above block 0, one above block 1.
            assert trials.cost == pytest.approx(6 * (1 + 1 / 3 + 2 / 3))
        with store.run(**{**work, "key": "other"}) as run_:  # type: ignore[arg-type]
            at_once = ScoreLedger(llama, run_, "example", encoded, local)
            at_once.extend(parts[::-1], 6)
            for text, result in at_once.scores.items():
                assert [s.logprob for s in stepwise[text].scores] == pytest.approx([s.logprob for s in result.scores], abs=1e-5)
    assert torch.is_grad_enabled()
