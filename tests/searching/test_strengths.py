"""The choice of strengths on known derivatives, and a whole search on a tiny model."""

from __future__ import annotations

import itertools
import math
import random
import runpy
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from searching.test_components import drawn, questions
from torch import Tensor

from laserlm.edit import applied
from laserlm.errors import ScoringError
from laserlm.models import LanguageModel
from laserlm.reductions import Intervention
from laserlm.scoring.evaluate import evaluate
from laserlm.scoring.records import Evaluation, ExampleScore
from laserlm.scoring.statistics import mean_test
from laserlm.searching import SearchConfig, SearchProgress, SearchResult, expand, search, strengths
from laserlm.searching.components import ComponentPool, derivatives_of, separate_matrices
from laserlm.searching.executors import LocalExecutor
from laserlm.searching.guard import guards_of
from laserlm.searching.scorer import PrefixScorer
from laserlm.searching.strengths import SMALLER, STEP, choose_strengths, cross_fitted_level, expected_harm


def gain(c: Tensor, taken: Tensor) -> float:
    """Return how much the mean loss is expected to fall: by the mean of the sum, less half its variance."""
    x = c @ taken
    return float(x.mean() - x.var() / 2)


def separate(harm: Tensor) -> list[Tensor]:
    """Return gradients of passages of which each sees one component."""
    return [(2 * harm).sqrt().diag()]


def chosen(c: Tensor, harm: Tensor, allowed: float, passages: list[Tensor] | None = None) -> Tensor:
    return choose_strengths(c, c.mean(0), harm, passages or separate(harm), allowed=allowed)


@pytest.mark.parametrize("seed", range(4))
def test_strengths_are_about_as_good_as_the_best_of_a_fine_grid(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    c = drawn(300, 4, seed, (0.3 * torch.rand(4, generator=generator)).tolist(), 0.2)
    harm, allowed = 0.01 + 0.05 * torch.rand(4, generator=generator), 0.02
    taken = chosen(c, harm, allowed)
    assert bool(((taken >= 0) & (taken <= 1)).all())
    torch.testing.assert_close(taken / STEP, (taken / STEP).round())
    assert expected_harm(separate(harm), taken) <= allowed + 1e-6
    grid = [torch.tensor(d) for d in itertools.product([i / 10 for i in range(11)], repeat=4)]
    best = max(gain(c, d) for d in grid if expected_harm(separate(harm), d) <= allowed)
    assert gain(c, taken) >= 0.85 * best > 0.01


def test_without_a_gain_or_without_room_nothing_is_taken() -> None:
    c, harm = drawn(200, 5, 0, 0.1, 0.01), torch.full((5,), 0.01)
    assert bool(chosen(c, harm, 0.1).any())
    assert not bool(chosen(c, harm, 0.0).any())
    nothing = choose_strengths(c, torch.zeros(5), harm, separate(harm), allowed=0.1)
    assert not bool(nothing.any())


def test_small_changes_that_add_up_for_a_passage_count_together() -> None:
    """Each of 100 components costs little, and a passage feels the sum of all."""
    c, harm = drawn(300, 100, 0, 0.05, 0.01), torch.full((100,), 0.001)
    together = [(2 * harm).sqrt()[None]]
    apart, summed = chosen(c, harm, 0.02), chosen(c, harm, 0.02, passages=together)
    assert expected_harm(together, apart) > 0.1
    assert expected_harm(together, summed) <= 0.02 + 1e-6
    assert 0 < float(summed.sum()) < float(apart.sum())


def strengths_search(lm: LanguageModel, **settings: Any) -> SearchResult:
    usual = {"strategy": "strengths", "grid": "all.mlp@0.5", "metric": "loss", "max_harm": 0.2}
    return search(lm, questions(), **usual | settings)


def test_a_search_weakens_components_within_the_bound(llama: LanguageModel, tmp_path: Path) -> None:
    result = strengths_search(llama, store=tmp_path / "runs.db")
    assert (result.strategy, result.unit, result.failed) == ("strengths", "components", {})
    values = [s for r in result.best.reductions for s in (r.size.strengths or {}).values()]
    assert any(0 < s < 1 for s in values)
    assert all(0 <= s < 1 for s in values)
    with applied(llama, Intervention.parse(str(result.best))):
        edited = evaluate(llama, questions().validation)
    assert result.validation.edited_loss == pytest.approx(edited.loss, abs=1e-4)
    assert result.validation.edited_loss < result.validation.base_loss
    (point,) = [p for p in result.points if p.intervention == str(result.best)]
    (harm,) = point.harms
    # The measured harm is within the bound, and uses most of it.
    assert 0.5 * math.log(1.2) < harm.change + harm.error <= math.log(1.2)
    # The list has strengths for less harm, too.
    assert len(result.points) == 1 + len(SMALLER)
    assert result.points[-1] == point
    assert sorted(p.change for p in result.points) == [p.change for p in result.points]
    assert strengths_search(llama, store=tmp_path / "runs.db") == result


def test_one_gradient_over_the_own_text_serves_every_search(llama: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[tuple[str, bool]] = []
    contributions = PrefixScorer.contributions

    def watched(scorer: PrefixScorer, split: str, *rest: Any, **options: Any) -> dict[str, Tensor]:
        taken.append((split, options["both"]))
        return contributions(scorer, split, *rest, **options)

    monkeypatch.setattr(PrefixScorer, "contributions", watched)
    first = strengths_search(llama)
    assert taken == [(taken[0][0], True), ("validation", False)]
    assert taken[0][0] != "validation"
    del taken[:]
    again = strengths_search(llama)
    assert taken == [("validation", False)]
    assert (again.best, again.points) == (first.best, first.points)


def test_what_is_kept_of_an_own_text_is_what_two_gradients_return(llama: LanguageModel, tmp_path: Path) -> None:
    (guard,) = guards_of(llama, None)
    encoded = guard.choosing
    scorer = PrefixScorer(llama, {"own": encoded})
    ledger: Any = SimpleNamespace(
        lm=llama, name="own", encoded=encoded, split=encoded.split, executor=LocalExecutor(scorer), deadline=math.inf, cost=0.0
    )
    session: Any = SimpleNamespace(
        config=SearchConfig(grid="all.mlp@0.5"),
        on_validation=SimpleNamespace(split=range(9)),
        guards=[SimpleNamespace(guard=guard, choosing=ledger)],
        begin=lambda *_, **__: None,
        report_progress=lambda _: None,
    )
    pool = ComponentPool(separate_matrices(expand("all.mlp@0.5", llama.matrices)))
    harm, (passages,) = pool.harm_and_passages(session)
    n, tokens = len(encoded.split), len(encoded.sequences[0].targets)
    assert {len(s.targets) for s in encoded.sequences} == {tokens}
    plain, squares = (
        derivatives_of(ledger, range(n), Intervention(), pool.matrices, squared=squared) for squared in (False, True)
    )
    torch.testing.assert_close(harm, squares[0] / (n * tokens) / 2, rtol=1e-6, atol=0)
    torch.testing.assert_close(passages, plain * (tokens / n) ** 0.5, rtol=1e-4, atol=1e-9)
    kept = pool.harm_and_passages(session)
    assert torch.equal(kept[0], harm)
    assert torch.equal(kept[1][0], passages)


@pytest.mark.parametrize("max_harm", [0.02, 0.5])
def test_an_interrupted_search_has_the_same_result(max_harm: float, llama: LanguageModel, tmp_path: Path) -> None:
    """Also after the strengths were noted, when their harm is not measured again."""
    complete = strengths_search(llama, max_harm=max_harm)
    assert complete.best
    results: list[SearchResult | None] = []

    def interrupt(progress: SearchProgress) -> None:
        if not progress.stage.startswith(("gradient", "harm")):
            raise KeyboardInterrupt

    while not results or (results[-1] is None and len(results) < 40):
        try:
            results.append(strengths_search(llama, max_harm=max_harm, store=tmp_path / "runs.db", on_step=interrupt))
        except KeyboardInterrupt:
            results.append(None)
    assert len(results) > 3
    assert results[-1] is not None
    assert (results[-1].best, results[-1].points, results[-1].test) == (complete.best, complete.points, complete.test)


def test_strengths_are_the_same_under_every_bound_of_memory_that_has_room_for_the_derivatives(
    llama: LanguageModel, caplog: pytest.LogCaptureFixture
) -> None:
    """The least one holds the derivatives of 30 questions by 288 components, in four bytes each, four times."""
    least = 16 * 30 * 288
    found = {memory: strengths_search(llama, memory=memory, gradient_examples=30) for memory in (2**30, 2**20, least)}
    assert not [r for r in caplog.records if r.levelname == "WARNING"]
    for memory, result in found.items():
        assert result.boundary_bytes + result.decomposition_bytes <= memory
        assert (result.best, result.points) == (found[2**30].best, found[2**30].points)
        assert result.test.edited_loss == pytest.approx(found[2**30].test.edited_loss, abs=1e-6)
    assert found[least].decomposition_bytes < found[2**30].decomposition_bytes


def test_strengths_that_break_the_model_are_followed_by_weaker_ones() -> None:
    """The first ones cannot be scored on the guard."""
    tried: list[float] = []

    def choose(allowed: float) -> Intervention:
        tried.append(allowed)
        return Intervention.parse(f"0.fc_in@scale0={len(tried) / 10}")

    guard = SimpleNamespace(choosing=SimpleNamespace(failed={"0.fc_in@scale0=0.1": "not finite"}))

    def used(intervention: Intervention) -> float:
        if str(intervention) in guard.choosing.failed:
            raise ScoringError("cannot be scored")
        return 0.09

    session: Any = SimpleNamespace(config=SimpleNamespace(harm_bound=0.1), guards=[guard], harm_used=used)
    assert strengths._allowed(session, choose) == tried[-1] < tried[0]


def test_each_part_is_scored_under_strengths_that_it_had_no_part_in_choosing(
    llama: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing passes the test here, so it looks at all parts, and the search keeps the model."""
    asked: list[int] = []
    looks: list[tuple[int, float]] = []

    def choose(contributions: Tensor, *rest: Any, **options: Any) -> Tensor:
        asked.append(len(contributions))
        return choose_strengths(contributions, *rest, **options)

    def refused(after: Evaluation, before: Evaluation, metric: str, level: float) -> bool:
        looks.append((after.n, level))
        assert any(a.loss != b.loss for a, b in zip(after.scores[-15:], before.scores[-15:], strict=True))
        return False

    monkeypatch.setattr(strengths, "choose_strengths", choose)
    monkeypatch.setattr(strengths, "is_significantly_worse", refused)
    result = strengths_search(llama)
    others, smaller = [30, 30, 30], [45] * len(SMALLER)
    assert asked[-5:] == [*others, *smaller]
    assert set(asked[:-5]) == {45}
    assert looks == [(15, 0.2 * 0.05), (45, cross_fitted_level(0.8 * 0.05))]
    assert not result.best


def test_useless_strengths_are_accepted_no_more_often_than_stated() -> None:
    """Questions whose derivatives have the mean 0 choose a step along their mean, and the left-out ones are changed by it."""
    generator, E, runs = torch.Generator().manual_seed(0), 60, 400
    parts = torch.arange(E).reshape(3, -1)
    p_values = []
    for _ in range(runs):
        c = torch.randn(E, 40, generator=generator)
        changes = torch.cat([-c[part] @ (c.sum(0) - c[part].sum(0)) for part in parts])
        p_values.append(mean_test((-changes).tolist(), [str(i) for i in range(E)]))
    allowance = 2 * (0.05 * 0.95 * runs) ** 0.5
    assert 0 < sum(p <= cross_fitted_level(0.05) for p in p_values) <= 0.05 * runs + allowance
    assert sum(p <= 0.05 for p in p_values) > 0.05 * runs + allowance  # the allowance for twice the variance is needed


def test_strengths_that_help_nobody_are_seldom_accepted_where_questions_share_facts() -> None:
    """At the level of 5 % (``scripts/acceptance_rate.py``), and much more often if the questions are taken as independent."""
    script = runpy.run_path(str(Path(__file__).parents[2] / "scripts" / "acceptance_rate.py"))
    runs, rate = 60, script["acceptance_rate"]
    allowance = 2 * (0.05 * 0.95 / runs) ** 0.5
    assert rate("loss", 12, 1.0, runs, is_shrunk=False) <= 0.05 + allowance
    assert rate("loss", 12, 1.0, runs, is_shrunk=False, by_fact=False) > 0.05 + allowance


def test_changes_that_are_clear_in_the_first_part_are_not_looked_at_further() -> None:
    looked: list[int] = []
    parts = [range(0, 30), range(30, 60), range(60, 90)]
    draw = random.Random(0)
    losses = [draw.gauss(3, 1) for _ in range(90)]
    ledger = _Ledger(losses, [loss - draw.gauss(0.3, 0.3) for loss in losses])
    session: Any = SimpleNamespace(
        on_validation=ledger,
        config=SimpleNamespace(delta=0.05),
        between_choices=False,
        begin=lambda _stage, _tried, stop, **_: looked.append(stop),
    )
    assert strengths.passes_cross_fitting(session, parts, [Intervention.parse("0.fc_in@drop0")] * 3)
    assert looked == [30]


class _Ledger:
    """Losses of the unchanged model and of any intervention."""

    def __init__(self, before: Sequence[float], after: Sequence[float]) -> None:
        self.before, self.after = before, after
        self.split = range(len(before))

    def extend(self, interventions: Sequence[Intervention], stop: int) -> None:
        """Score nothing, for all is known."""

    def fails(self, intervention: Intervention, stop: int) -> bool:
        return False

    def first(self, intervention: Intervention, n: int) -> Evaluation:
        losses = (self.after if intervention else self.before)[:n]
        scores = [ExampleScore(str(i), False, -loss, 1, "a", "b") for i, loss in enumerate(losses)]
        return Evaluation("m", "example", "validation", "answer", str(intervention), tuple(scores), 0.0)
