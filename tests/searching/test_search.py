from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from shutil import rmtree
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from families import TOKENIZERS, UNUSUAL, build
from searching.conftest import BeforeScoring
from searching.support import EVERY, build_task, harm_on

from laserlm.edit import applied
from laserlm.edit.decomposition_cache import DecompositionCache
from laserlm.errors import MatrixError, ScoringError
from laserlm.linalg.decomposition import Decomposition
from laserlm.models import LanguageModel
from laserlm.scoring.evaluate import compare, evaluate
from laserlm.searching import SearchConfig, SearchProgress, SearchResult, expand
from laserlm.searching import search as search_
from laserlm.searching.config import OF_COMPONENTS
from laserlm.searching.guard import guards_of
from laserlm.searching.screen import OUT_OF_TIME
from laserlm.store import Store
from laserlm.tasks import Decoding, Example, Split, Task
from laserlm.tasks import task as by_name

Make = Callable[..., LanguageModel]
GRID = "0-1.mlp@0.5,0.1"


MOST_HARMS = 3


@pytest.fixture(autouse=True)
def few_harms(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a race and an exhaustive search measure the harm of few candidates, for searches that are made again and again."""
    monkeypatch.setattr("laserlm.searching.session.MAX_HARMS", MOST_HARMS)


def texts(grid: str, lm: LanguageModel) -> list[str]:
    return [str(candidate.intervention) for candidate in expand(grid, lm.matrices)]


def test_a_grid_means_each_matrix_at_each_rank_once(make: Make) -> None:
    lm = make("llama")
    assert texts("1.attn@0.5,r3", lm) == [
        f"1.{m}@{size}" for m in ("q_proj", "k_proj", "v_proj", "out_proj") for size in ("0.5", "r3")
    ]
    # Of 32 singular values 0.02 and 0.01 keep none, 1 keeps all; k and v have 16.
    assert texts("2.fc_in@1,0.02,0.01,0.5", lm) == ["2.fc_in@0.02", "2.fc_in@0.5"]
    assert texts("2.k_proj@0.5+top1.k_proj@r8,r9", lm) == [
        "2.k_proj@0.5",
        "2.k_proj@r9",
    ]
    assert len(expand("paper", lm.matrices)) == 3 * 2 * 8
    assert str(expand("1.fc_in@r3:bottom", lm.matrices)[0].intervention) == "1.fc_in@r3:bottom"
    with pytest.raises(MatrixError, match="keeps every matrix whole"):
        expand("all.all@1", lm.matrices)


def test_experts_and_stacks_are_candidates_of_their_own(make: Make) -> None:
    assert texts("1.fc_up@0.5", make("mixtral")) == [f"1.experts.{e}.fc_up@0.5" for e in range(3)]
    assert texts("decoder.top1.cross_q_proj@0.5", make("t5")) == ["decoder.1.cross_q_proj@0.5"]


def search(lm: LanguageModel, task: Task, **options: Any) -> SearchResult:
    """Search exhaustively unless told otherwise."""
    return search_(lm, task, **({"strategy": "exhaustive", "grid": GRID} | options))


def brute_force(lm: LanguageModel, split: Split, interventions: list[str]) -> dict[str, Any]:
    """Score every intervention in whole passes of its own, in an order of the split's own."""
    values = {}
    for text in interventions:
        with applied(lm, text):
            values[text] = evaluate(lm, split)
    return values


@pytest.mark.parametrize("metric", ["accuracy", "loss"])
def test_the_best_on_validation_wins_and_only_it_meets_the_test_split(
    metric: str, llama: LanguageModel, task: Task, tmp_path: Path
) -> None:
    result = search(llama, task, metric=metric, store=tmp_path / "runs.db")
    everything = brute_force(llama, task.validation, ["", *texts(GRID, llama)])
    if metric == "accuracy":
        best = max(everything, key=lambda text: (everything[text].accuracy, -everything[text].loss))
    else:
        best = min(everything, key=lambda text: everything[text].loss)
    assert str(result.best) == best
    assert (result.candidates, result.scored, result.complete) == (12, 12, True)
    expected = compare(everything[""], everything[best])
    assert (result.validation.corrected, result.validation.broken) == (expected.corrected, expected.broken)
    assert result.validation.edited_loss == pytest.approx(expected.edited_loss, abs=1e-5)
    assert result.validation.interval == expected.interval
    with applied(llama, best):
        edited = evaluate(llama, task.test)
    assert result.test.edited == edited.accuracy
    assert result.test.edited_loss == pytest.approx(edited.loss, abs=1e-5)
    with Store.open(tmp_path / "runs.db") as store:
        trials = store.trials(result.run)
    assert sorted(t.intervention for t in trials if t.split == "test") == sorted({"", best})
    assert len([t for t in trials if t.split == "validation"]) == 13


@pytest.mark.parametrize("memory", [2**30, 4000])
def test_every_score_is_that_of_brute_force(memory: int, llama: LanguageModel, task: Task, tmp_path: Path) -> None:
    result = search(llama, task, memory=memory, store=tmp_path / "runs.db")
    everything = brute_force(llama, task.validation, ["", *texts(GRID, llama)])
    with Store.open(tmp_path / "runs.db") as store:
        for text, full in everything.items():
            scored = store.evaluation(result.run, "validation", text)
            assert scored is not None
            ours = {s.id: s for s in scored.scores}
            assert len(ours) == len(task.validation)
            for s in full.scores:
                assert ours[s.id].correct == s.correct
                assert ours[s.id].logprob == pytest.approx(s.logprob, abs=1e-4)
    assert result.boundary_bytes <= memory


def test_a_bound_on_memory_is_kept_by_smaller_chunks(llama: LanguageModel, task: Task) -> None:
    full = search(llama, task, grid="2.fc_in@0.5")
    small = search(llama, task, grid="2.fc_in@0.5", memory=full.boundary_bytes // 3)
    assert 0 < small.boundary_bytes <= full.boundary_bytes // 3
    assert (small.best, small.validation.corrected) == (full.best, full.validation.corrected)


def easy(lm: LanguageModel, task: Task) -> Task:
    """Return a task whose answers are what the unchanged model says."""
    rows = [replace(e, answer="x") for e in task.every]
    best = {s.id: s.predicted for s in evaluate(lm, replace(task.every, examples=tuple(rows))).scores}
    return Task.of("easy", [replace(e, answer=best[e.id]) for e in rows if best[e.id].strip()], scorer="next_token")


@pytest.mark.parametrize("strategy", ["race", "exhaustive", "compose"])
def test_the_unchanged_model_can_win(strategy: str, llama: LanguageModel, task: Task) -> None:
    result = search(llama, easy(llama, task), strategy=strategy, grid="0-1.mlp@0")
    assert str(result.best) == ""
    assert result.test.gain == result.validation.gain == 0
    assert result.test.mcnemar_p == 1
    assert result.as_dict()["best"] == ""


@pytest.mark.parametrize("family", [*EVERY, *(pytest.param(family, marks=pytest.mark.slow) for family in UNUSUAL)])
def test_a_race_runs_on_every_family(family: str, make: Make, task: Task) -> None:
    lm = make(family)
    options = SearchConfig(first_rung=3, candidates=6, random_candidates=2)
    result = search(lm, task, strategy="race", grid="all.all@0.6,0.3", metric="loss", config=options, scorer="answer")
    assert result.failed == {}
    assert result.complete
    full = brute_force(lm, replace(task.validation, scorer="answer"), ["", str(result.best)])
    assert result.validation.base_loss == pytest.approx(full[""].loss, abs=1e-4)
    assert result.validation.edited_loss == pytest.approx(full[str(result.best)].loss, abs=1e-4)
    assert result.validation.edited_loss <= result.validation.base_loss


STRATEGIES: dict[str, dict[str, Any]] = {
    "exhaustive": {"strategy": "exhaustive", "grid": "0-1.fc_in@0.5,0.1"},
    "small memory": {"strategy": "exhaustive", "grid": "1.fc_in@0.5,0.1", "memory": 9000},
    "race": {
        "strategy": "race", "grid": "all.mlp@0.5,0.1", "candidates": 4, "first_rung": 2, "random_candidates": 1,
        "metric": "loss",
    },
    "greedy": {
        "strategy": "compose", "mode": "greedy", "grid": "1-2.fc_in@0.5,0.1", "first_rung": 2, "metric": "loss",
    },
    "joint": {
        "strategy": "compose", "mode": "joint", "grid": "all.mlp@0.5,0.1", "first_rung": 2, "candidates": 4,
        "metric": "loss",
    },
    "components": {
        "strategy": "components", "grid": "0-1.mlp@0.5", "max_harm": 1.0, "delta": 1.0, "steps": 2, "metric": "loss",
    },
    "strengths": {"strategy": "strengths", "grid": "0-1.mlp@0.5", "max_harm": 1.0, "delta": 1.0, "metric": "loss"},
}  # fmt: skip


def short_task() -> Task:
    """Return the task with few examples to test on."""
    task = build_task()
    return replace(task, test=task.test.limit(6))


@cache
def undisturbed(name: str) -> tuple[SearchResult, list[Any]]:
    """Return what a strategy finds on the usual model and the short task, and all that it scored."""
    return exported(build("llama"), **STRATEGIES[name])


def exported(lm: LanguageModel, **options: Any) -> tuple[SearchResult, list[Any]]:
    """Return a search's result and all scores in the order of their computation, none of which come from the cache."""
    with TemporaryDirectory() as folder:
        result = search(lm, short_task(), store=Path(folder) / "runs.db", restart=True, **options)
        with Store.open(Path(folder) / "runs.db") as store:
            trials = store.export(result.run)["trials"]
    return result, [(t["intervention"], t["split"], t["scores"]) for t in trials]


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in OF_COMPONENTS)) for n in STRATEGIES])
def test_an_interrupted_search_goes_on_and_scores_nothing_twice(
    name: str, llama: LanguageModel, tmp_path: Path, before_scoring: BeforeScoring
) -> None:
    options, (full, needed), task = STRATEGIES[name], undisturbed(name), short_task()
    scored: list[tuple[str, ...]] = []
    stops: list[int] = []

    def count(text: str, split: Split) -> None:
        if stops and len(scored) == stops[0]:
            stops.pop(0)
            raise KeyboardInterrupt
        scored.append((text, split.name, *(e.id for e in split)))

    before_scoring(count)
    search(llama, task, store=tmp_path / "count.db", restart=True, **options)
    count_needed = len(scored)
    assert count_needed >= len(needed) > 3
    scored.clear()
    rmtree(llama.cache / "scores")
    # After every single evaluation there is.
    stops += range(1, count_needed)
    for _ in range(1, count_needed):
        with pytest.raises(KeyboardInterrupt):
            search(llama, task, store=tmp_path / "runs.db", **options)
        assert llama.intervention == ""
    result = search(llama, task, store=tmp_path / "runs.db", **options)
    assert len(scored) == count_needed
    pairs = [(text, split, id) for text, split, *ids in scored for id in ids]
    assert len(pairs) == len(set(pairs))
    own: dict[str, Any] = {"run": "", "seconds": 0, "screened": None, "boundary_bytes": 0, "decomposition_bytes": 0}
    assert replace(result, **own) == replace(full, **own)
    count_before = len(scored)
    again = search(llama, task, store=tmp_path / "runs.db", **options)
    assert len(scored) == count_before
    assert again == result
    fresh = search(llama, task, store=tmp_path / "runs.db", restart=True, **options)
    assert fresh.run != result.run
    assert len(scored) == 2 * count_before


def test_an_interruption_within_a_pass_or_after_a_step_loses_nothing(llama: LanguageModel, tmp_path: Path) -> None:
    (full, _), task = undisturbed("race"), short_task()
    passes: list[int] = []
    limit = [1]

    def interrupt(*_: Any) -> None:
        passes.append(0)
        if len(passes) == limit[0]:
            raise KeyboardInterrupt

    inner = llama.model.model.layers[2].register_forward_pre_hook(interrupt)
    while not (result := _tried(llama, task, tmp_path / "passes.db")):
        assert llama.intervention == ""
        assert not any("forward" in module.__dict__ for module in llama.model.modules())
        assert all(p.grad is None for p in llama.model.parameters())
        limit[0] += 7
        passes.clear()
    inner.remove()
    assert limit[0] > 14
    messages: list[SearchResult | None] = []

    def after_the_first(step: SearchProgress) -> None:
        if step.stage != "screen":  # which is told when it begins
            raise KeyboardInterrupt

    while not messages or (messages[-1] is None and len(messages) < 100):
        messages.append(_tried(llama, task, tmp_path / "steps.db", on_step=after_the_first))
    own: dict[str, Any] = {"run": "", "seconds": 0, "screened": None, "boundary_bytes": 0, "decomposition_bytes": 0}
    assert len(messages) > 6
    for each in (result, messages[-1]):
        assert replace(each, **own) == replace(full, **own)


def _tried(lm: LanguageModel, task: Task, store: Path, **options: Any) -> SearchResult | None:
    try:
        return search(lm, task, store=store, **STRATEGIES["race"], **options)
    except KeyboardInterrupt:
        return None


@pytest.mark.parametrize("name", ["exhaustive", "race", "greedy"])
def test_a_seed_gives_the_same_search_again(name: str, make: Make) -> None:
    _, first = undisturbed(name)
    assert exported(make("llama"), **STRATEGIES[name])[1] == first
    assert exported(make("llama"), seed=1, **STRATEGIES[name])[1] != first


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_result_survives_json(name: str) -> None:
    result, _ = undisturbed(name)
    assert SearchResult.from_dict(json.loads(json.dumps(result.as_dict()))) == result


def test_other_weights_rows_or_grids_are_another_search(make: Make, task: Task, tmp_path: Path) -> None:
    store = tmp_path / "runs.db"
    task = replace(task, validation=task.validation.limit(4), test=task.test.limit(2))
    shorter = replace(task, validation=task.validation.limit(3))
    # The same tokens, and another answer that counts as right.
    aliased = tuple(replace(e, aliases=("other",)) for e in task.validation)
    runs = {
        search(make("llama"), task, grid="1.fc_in@0.5", store=store).run,
        search(make("llama", seed=1), task, grid="1.fc_in@0.5", store=store).run,
        search(make("llama"), shorter, grid="1.fc_in@0.5", store=store).run,
        search(make("llama"), task, grid="1.fc_in@0.6", store=store).run,
        search(make("llama"), task, grid="1.fc_in@0.5", metric="loss", store=store).run,
        search(make("llama"), task, grid="1.fc_in@0.50", store=store).run,
        search(make("llama"), task, grid="1.fc_in@0.5", strategy="race", store=store).run,
        search(make("llama"), task, grid="1.fc_in@0.5", strategy="race", keep=1, store=store).run,
        search(make("llama"), task, grid="1.fc_in@0.5", seed=1, store=store).run,
        search(
            make("llama"), replace(task, validation=replace(task.validation, examples=aliased)), grid="1.fc_in@0.5", store=store
        ).run,
    }
    assert len(runs) == 9


@pytest.mark.parametrize("strategy", ["race", "exhaustive", "compose"])
def test_a_candidate_that_fails_is_recorded_and_passed_over(
    strategy: str, llama: LanguageModel, task: Task, tmp_path: Path, before_scoring: BeforeScoring
) -> None:
    def broken(text: str, split: Split) -> None:
        if split.name == "validation" and "0.fc_up@0.5" in text:
            raise ScoringError("a log-probability of nan")
        if split.name == "validation" and "1.fc_up@0.1" in text and len(split) != 4:
            raise ScoringError("no room")

    before_scoring(broken)
    result = search(llama, task, strategy=strategy, store=tmp_path / "runs.db", first_rung=4, keep=1)
    if strategy == "compose":
        assert any("0.fc_up@0.5" in text and "nan" in reason for text, reason in result.failed.items())
    else:
        assert result.failed == {
            "0.fc_up@0.5": "ScoringError: a log-probability of nan",
            "1.fc_up@0.1": "ScoringError: no room",
        }
    assert not {"0.fc_up@0.5", "1.fc_up@0.1"} & set(str(result.best).split("+"))
    with Store.open(tmp_path / "runs.db") as store:
        assert {t.intervention for t in store.trials(result.run) if t.status == "failed"} == set(result.failed)


def test_memory_that_runs_out_halves_the_batch_and_loses_nothing(llama: LanguageModel, task: Task) -> None:
    expected = search(llama, task)
    tried: list[int] = []

    def tight(_module: Any, _args: Any, inputs: dict[str, Any]) -> None:
        tried.append(len(inputs["input_ids"]))
        if tried[-1] > 2:
            raise torch.OutOfMemoryError("no room")

    llama.shares_prompts = False  # so that each question is a row
    with llama.model.register_forward_pre_hook(tight, with_kwargs=True):
        result = search(llama, task, batch_size=7)
    assert max(tried) > 3
    assert 3 in tried
    assert max(tried[-9:]) <= 2
    assert (result.best, result.validation.corrected, result.failed) == (expected.best, expected.validation.corrected, {})


def test_memory_that_runs_out_in_the_screen_halves_its_batch(llama: LanguageModel, task: Task) -> None:
    options: dict[str, Any] = {"strategy": "race", "metric": "loss", "first_rung": 3}
    expected = search(llama, task, **options)
    tried: list[int] = []
    most = [2]

    def tight(_module: Any, args: tuple[torch.Tensor, ...]) -> None:
        if torch.is_grad_enabled():  # on the gradient's way back
            tried.append(len(args[0]))
            if tried[-1] > most[0]:
                raise torch.OutOfMemoryError("no room")

    with llama.model.model.layers[2].mlp.register_forward_pre_hook(tight):
        result = search(llama, task, batch_size=8, **options)
        assert max(tried) > 2 >= tried[-1]
        assert result.best == expected.best
        assert all(p.grad is None for p in llama.model.parameters())
        most[0] = 0
        with pytest.raises(ScoringError, match="a single row does not fit"):
            search(llama, task, **options)


def test_where_the_boundary_does_not_fit_passes_are_full(
    llama: LanguageModel, task: Task, before_scoring: BeforeScoring
) -> None:
    expected = search(llama, task)
    scoring: list[str] = []
    sizes: list[int] = []
    lowest: list[str] = []

    def tight(_module: Any, _args: Any, inputs: dict[str, Any]) -> None:
        if scoring:
            return
        # Outside of scoring, the model is run to move the boundary, and before that in twos, to see whether it can be.
        sizes.append(len(inputs["input_ids"]))
        if sizes[-1] > 2 or len(sizes) > 6:
            raise torch.OutOfMemoryError("no room")

    before_scoring(lambda text, split: scoring.append(text), scoring.clear)
    with (
        llama.model.register_forward_pre_hook(tight, with_kwargs=True),
        llama.model.model.layers[0].mlp.register_forward_hook(lambda *_: lowest.append(llama.intervention)),
    ):
        result = search(llama, task, batch_size=4)
    assert {4, 2, 1} <= set(sizes)
    assert (result.best, result.validation.corrected, result.failed) == (expected.best, expected.validation.corrected, {})
    assert texts(GRID, llama)[-1] in lowest  # in block 1, yet block 0 was run


def test_steps_are_reported(llama: LanguageModel, task: Task) -> None:
    steps: list[SearchProgress] = []
    result = search(llama, task, grid="1.fc_in@0.5,0.1", on_step=steps.append)
    n, m = len(task.validation), len(task.test)
    best = [] if not result.best else ["test"]
    assert [s.stage for s in steps if s.stage != "harm"] == ["test", *["exhaustive"] * 3, *best]
    assert [s.last for s in steps][:4] == ["", "", "1.fc_in@0.5", "1.fc_in@0.1"]
    assert [s.scored for s in steps][:4] == [m, m + n, m + 2 * n, m + 3 * n]
    # Of three blocks, those above the first are run.
    assert [s.done for s in steps][:4] == pytest.approx([m, m + n, m + n * 5 / 3, m + n * 7 / 3])
    assert steps[1].total == steps[2].total > m + n * 7 / 3  # the test and the harm of the best follow
    assert steps[-1].done == pytest.approx(steps[-1].total)
    assert all(s.done < s.total for s in steps[:-1])
    assert steps[0].best is None
    assert steps[3].best is not None
    assert steps[3].best.intervention == str(result.best)


@pytest.mark.parametrize("strategy", ["race", "compose", "exhaustive", "components", "strengths"])
def test_every_stage_is_reported_when_it_begins_and_the_work_ends_with_the_last(
    strategy: str, llama: LanguageModel, task: Task
) -> None:
    stages: list[SearchProgress] = []
    steps: list[SearchProgress] = []
    options = {"strategy": strategy, "grid": "all.mlp@0.5,0.1", "metric": "loss"}
    options |= {} if strategy in OF_COMPONENTS else {"first_rung": 2}
    result = search(llama, task, on_stage=stages.append, on_step=steps.append, **options)
    names = [s.stage for s in stages]
    assert names[:2] == ["guards", "test"]
    assert names[-1] == "harm"
    assert {s.stage for s in steps} <= set(names)
    assert ("screen" in names) == (strategy in ("race", "compose"))
    assert names.count("test") == 1 + bool(result.best)
    assert steps[-1].done == pytest.approx(steps[-1].total)
    assert all(s.done < s.total for s in steps[:-1])


def test_the_work_of_a_search_that_writes_ends_with_its_last_stage(llama: LanguageModel, task: Task) -> None:
    steps: list[SearchProgress] = []
    search(llama, task, scorer="contains", grid="1.fc_in@0.5,0.1", strategy="exhaustive", on_step=steps.append)
    assert [s.stage for s in steps if s.stage == "finalists"]
    assert steps[-1].done == pytest.approx(steps[-1].total)
    assert all(s.done < s.total for s in steps[:-1])


def test_a_race_tells_its_rungs(llama: LanguageModel, task: Task) -> None:
    steps: list[SearchProgress] = []
    options = SearchConfig(first_rung=2, candidates=6, random_candidates=2)
    result = search(llama, task, strategy="race", grid="all.all@0.5,0.1", metric="loss", config=options, on_step=steps.append)
    rungs = [s for s in steps if s.stage.startswith("rung")]
    assert list(dict.fromkeys(s.stage for s in rungs))[:2] == ["rung 1 of 2", "rung 2 of 2"]
    assert rungs[0].alive == 9  # the unchanged model among them
    assert [r.examples for r in result.rungs][:2] == [2, len(task.validation)]
    assert steps[1].stage == "screen"


@pytest.mark.parametrize("strategy", ["race", "exhaustive", "compose"])
def test_a_search_out_of_time_measures_the_best_so_far(
    strategy: str,
    llama: LanguageModel,
    task: Task,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    before_scoring: BeforeScoring,
) -> None:
    clock = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    scored: list[str] = []

    def timed(text: str, split: Split) -> None:
        clock[0] += 60
        scored.append(split.name)

    before_scoring(timed)
    options = {"strategy": strategy, "budget": 5, "metric": "loss", "first_rung": 3}
    result = search(llama, task, store=tmp_path / "runs.db", **options)
    assert not result.complete
    assert 5 <= scored.count("validation") <= 6
    assert result.validation.n == (len(task.validation) if strategy != "race" else 3)
    assert result.test.n == len(task.test)
    assert sum(result.phases.values()) == pytest.approx(result.seconds)
    count = len(scored)
    assert search(llama, task, store=tmp_path / "runs.db", **options) == result
    assert len(scored) == count


def test_out_of_time_in_the_first_rung_the_best_is_compared_with_the_unchanged_model(
    llama: LanguageModel, task: Task, monkeypatch: pytest.MonkeyPatch, before_scoring: BeforeScoring
) -> None:
    clock, scored = [0.0], list[str]()

    def timed(text: str, split: Split) -> None:
        clock[0] += 60
        scored.append(f"{split.name} {text}")

    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    before_scoring(timed)
    result = search(llama, easy(llama, task), strategy="race", grid="0-1.mlp@0", budget=3.5)
    assert (result.complete, str(result.best)) == (False, "")
    assert sum(result.phases.values()) == pytest.approx(result.seconds) == 60 * len(scored)
    assert scored[1].startswith("validation ")
    assert scored[1] != "validation "


def test_one_batch_of_the_test_split_is_scored_before_the_search_and_the_rest_after_it(
    llama: LanguageModel, task: Task, before_scoring: BeforeScoring
) -> None:
    sizes: list[tuple[str, int]] = []
    before_scoring(lambda text, split: sizes.append((text, len(split))) if split.name == "test" else None)
    result = search(llama, task, grid="1.fc_in@0.5,0.1", metric="loss", batch_size=2)
    assert result.best
    n = len(task.test) - 2
    assert sizes == [("", 2), (str(result.best), 2), (str(result.best), n), ("", n)]
    assert set(result.phases) == {"start", "test", "exhaustive", "harm"}


@pytest.mark.parametrize("strategy", ["race", "exhaustive", "compose", "components", "strengths"])
def test_without_any_time_the_unchanged_model_is_measured(strategy: str, llama: LanguageModel, task: Task) -> None:
    result = search(llama, task, strategy=strategy, budget=0)
    assert (str(result.best), result.complete, result.scored) == ("", False, 0)
    assert result.validation.gain == 0
    assert result.verdict()[0].startswith("No candidate was tried: the time was used up")
    assert ("by the screen" in result.verdict()[0]) == (strategy == "race")


def test_rows_that_cannot_be_scored_on_test_are_reported_before_the_search(llama: LanguageModel, task: Task) -> None:
    long = replace(task.test, examples=(*task.test.examples, Example("x", "The" + " capital" * 200, "Paris")))
    steps: list[SearchProgress] = []
    with pytest.raises(ScoringError, match="example 'x'"):
        search(llama, replace(task, test=long), on_step=steps.append)
    assert steps == []


def test_a_leader_that_fails_later_is_not_what_is_found_when_time_is_up(
    llama: LanguageModel, task: Task, monkeypatch: pytest.MonkeyPatch, before_scoring: BeforeScoring
) -> None:
    options = SearchConfig(first_rung=3, keep=1)
    settings: dict[str, Any] = {"strategy": "race", "metric": "loss", "grid": "0.mlp@0.5,0.1", "config": options}
    leader = search(llama, task, **settings).rungs[0].leader
    assert leader
    clock = [0.0]

    def broken(text: str, split: Split) -> None:
        if split.name == "validation" and len(split) > 3 and text:
            # In the second rung time is up as soon as the leader has failed.
            clock[0] += 1e6 if text == leader else 0
            if text == leader:
                raise ScoringError("a log-probability of nan")

    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    before_scoring(broken)
    result = search(llama, task, budget=1, **settings)
    assert not result.complete
    assert leader in result.failed
    assert str(result.best) != leader


def test_an_unchanged_model_that_cannot_be_scored_is_reported(
    llama: LanguageModel, task: Task, tmp_path: Path, before_scoring: BeforeScoring
) -> None:
    def broken(text: str, split: Split) -> None:
        if split.name == "validation" and not text:
            raise ScoringError("a log-probability of nan")

    before_scoring(broken)
    for strategy in ("race", "exhaustive", "compose", "race"):
        with pytest.raises(ScoringError, match="the unchanged model cannot be scored on validation"):
            search(llama, task, strategy=strategy, store=tmp_path / "runs.db")


def test_splits_that_share_examples_are_refused(llama: LanguageModel, task: Task) -> None:
    with pytest.raises(ScoringError, match="share 1 examples"):
        search(llama, replace(task, test=replace(task.test, examples=(*task.test.examples, task.validation.examples[0]))))
    with pytest.raises(ScoringError, match="give two splits"):
        search(llama, replace(task, test=replace(task.test, name="validation")))


def test_splits_with_equal_questions_are_refused_unless_they_are_published(
    llama: LanguageModel, task: Task, caplog: pytest.LogCaptureFixture
) -> None:
    asked = task.validation.examples[0]
    twin = replace(asked, id="twin", prompt=f" {asked.prompt}\n", fact="own")
    leaking = replace(task, test=replace(task.test, examples=(*task.test.examples, twin)))
    with pytest.raises(ScoringError, match=r"share 1 questions with equal prompt and answer, such as .*; give two splits"):
        search_(llama, leaking, grid="1.fc_in@0.5")
    assert search_(llama, replace(leaking, split_by="paper"), grid="1.fc_in@0.5").test.n == len(task.test) + 1
    assert "1 questions of example are both in the validation and in the test split, as published" in caplog.text


def test_the_store_keeps_the_facts_of_scores(llama: LanguageModel, tmp_path: Path) -> None:
    examples = [Example(f"{i}", f"The capital of {i} is", "Rome", fact=f"f{i // 3}") for i in range(30)]
    result = search_(llama, Task.of("example", examples), grid="1.fc_in@0.5", metric="loss", store=tmp_path / "runs.db")
    assert (result.validation.n, result.validation.facts, result.test.n, result.test.facts) == (6, 2, 24, 8)
    with Store.open(tmp_path / "runs.db") as results:
        base, edited = (results.evaluation(result.run, "test", text) for text in ("", "1.fc_in@0.5"))
    assert base is not None
    assert edited is not None
    assert sorted(set(base.facts)) == sorted({e.fact for e in Task.of("example", examples).test})
    if result.best:
        assert compare(base, edited) == result.test


def test_another_tokenizer_or_config_is_another_search(make: Make, task: Task, tmp_path: Path) -> None:
    runs = set()
    for change in ("none", "config", "tokenizer"):
        lm = make("llama")
        if change == "config":
            lm.model.config.rms_norm_eps = 1e-3
        if change == "tokenizer":
            lm.tokenizer = TOKENIZERS["masked"]()
        runs.add(search(lm, task, grid="1.fc_in@0.5", store=tmp_path / "runs.db").run)
    assert len(runs) == 3


def test_a_winner_that_fails_on_test_is_reported(llama: LanguageModel, task: Task, before_scoring: BeforeScoring) -> None:
    def broken(text: str, split: Split) -> None:
        if split.name == "test" and text:
            raise ScoringError("a log-probability of nan")

    before_scoring(broken)
    with pytest.raises(ScoringError, match="cannot be scored on the test split: ScoringError: a log-probability of nan"):
        search(llama, task, metric="loss")


def test_a_matrix_that_cannot_be_decomposed_is_passed_over(llama: LanguageModel, task: Task) -> None:
    layer = llama.model.model.layers[1]
    with torch.no_grad():
        layer.mlp.gate_proj.weight[0, 0] = float("inf")
    layer.mlp.act_fn = torch.nn.Sigmoid().eval()  # keeps infinity out of the scores
    result = search(llama, task, strategy="race", grid="1.mlp@0.5+0.fc_in@0.5")
    assert list(result.failed) == ["1.fc_in@0.5"]
    assert "NaN or inf" in result.failed["1.fc_in@0.5"]
    assert result.candidates == 4
    assert result.screened is not None
    assert (result.screened.candidates, result.screened.unranked) == (2, 2)
    # Infinity in the weights spoils the gradient that passes them.
    assert list(result.screened.reasons.values()) == [1, 1]
    assert any("NaN or inf" in reason for reason in result.screened.reasons)
    assert "2 candidates could not be ranked" in result.screened.warnings()[0]
    assert SearchResult.from_dict(json.loads(json.dumps(result.as_dict()))) == result


@pytest.mark.parametrize("strategy", ["race", "compose"])
def test_a_screen_that_ranks_nothing_ends_the_search(strategy: str, llama: LanguageModel, task: Task) -> None:
    def spoil(_module: object, _args: object, output: torch.Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda d: d * float("nan"))

    llama.model.model.norm.register_forward_hook(spoil)
    with pytest.raises(
        ScoringError, match=r"none of the 12 candidates: its gradient is not finite in float32 \(12 candidates\)"
    ):
        search(llama, task, strategy=strategy)


@pytest.mark.parametrize("strategy", ["race", "exhaustive"])
def test_where_all_candidates_fail_none_is_reported_as_lost(
    strategy: str, llama: LanguageModel, task: Task, before_scoring: BeforeScoring
) -> None:
    def broken(text: str, split: Split) -> None:
        if split.name == "validation" and text:
            raise ScoringError("a log-probability of nan")

    before_scoring(broken)
    result = search(llama, task, strategy=strategy)
    assert result.scored == len(result.failed) > 0
    assert result.verdict() == [
        f"No candidate could be compared: all {result.scored} that were tried failed, such as with "
        "ScoringError: a log-probability of nan"
    ]


def test_a_screen_that_is_cut_off_ranks_what_it_has(llama: LanguageModel, task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    decompose = DecompositionCache.get

    def slow(cache: DecompositionCache, weight: torch.Tensor) -> Decomposition:
        clock[0] += 10
        return decompose(cache, weight)

    monkeypatch.setattr(DecompositionCache, "get", slow)
    options = SearchConfig(first_rung=3, candidates=2, random_candidates=0, budget=1.5)
    result = search(llama, task, strategy="race", grid="all.mlp@0.5", metric="loss", config=options)
    assert result.screened is not None
    # 67 of 90 seconds are for the screen: the last two blocks, and not all of the first.
    assert (result.screened.candidates, result.screened.unranked) == (6, 3)
    assert list(result.screened.reasons) == [OUT_OF_TIME]
    assert {text.partition(".")[0] for text in result.screened.expected} <= {"1", "2"}


def test_a_search_begins_with_the_unchanged_model(llama: LanguageModel, task: Task, tmp_path: Path) -> None:
    search(llama, task, grid="1.fc_in@0.5", store=tmp_path / "runs.db")
    with applied(llama, "0.mlp@0.1"), pytest.raises(ScoringError, match=r"changed by 0\.mlp@0\.1"):
        search(llama, task, grid="1.fc_in@0.5", store=tmp_path / "runs.db")


def test_tied_blocks_are_one_candidate_and_one_edit(llama: LanguageModel) -> None:
    llama.model.model.layers[2] = llama.model.model.layers[1]
    assert texts("all.fc_in@0.5", llama) == ["0.fc_in@0.5", "1.fc_in@0.5"]


def test_a_search_needs_both_splits(llama: LanguageModel) -> None:
    with pytest.raises(ScoringError, match="needs both"):
        search(llama, Task.of("one", [Example("1", "Oslo is", "a city")]))


@pytest.mark.parametrize("wrong", [{"metric": "f1"}, {"strategy": "sweep"}, {"mode": "up"}])
def test_a_word_that_means_nothing_is_reported_with_those_that_do(
    wrong: dict[str, Any], llama: LanguageModel, task: Task
) -> None:
    ((name, value),) = wrong.items()
    with pytest.raises(ScoringError, match=f"no {name} {value!r}; there are"):
        search(llama, task, **wrong)


@pytest.mark.parametrize("strategy", ["race", "exhaustive", "compose"])
@pytest.mark.parametrize("metric", ["accuracy", "loss"])
def test_where_the_model_writes_the_loss_ranks_and_writing_decides(
    strategy: Any, metric: Any, llama: LanguageModel, task: Task, tmp_path: Path
) -> None:
    how = Decoding(new_tokens=3)
    task = replace(task, test=task.test.limit(7))
    splits = {name: replace(getattr(task, name), scorer="contains", decoding=how) for name in ("validation", "test", "every")}
    questions = replace(task, **splits)
    small = SearchConfig(candidates=6, first_rung=3)
    store = tmp_path / "runs.db"
    steps: list[SearchProgress] = []
    result = search_(
        llama, questions, strategy=strategy, metric=metric, grid=GRID, store=store, config=small, on_step=steps.append
    )
    assert {"finalists", "test"} <= {s.stage for s in steps}
    assert str(result.best) in result.finalists
    assert "" in result.finalists
    if metric == "accuracy":
        assert result.finalists[str(result.best)] == max(result.finalists.values())
        assert len(result.finalists) > 2 or strategy == "compose"
    for split, values in ((questions.validation, result.validation), (questions.test, result.test)):
        base = evaluate(llama, split)
        with applied(llama, result.best):
            edited = evaluate(llama, split)
        assert (values.split, values.base, values.edited) == (split.name, base.accuracy, edited.accuracy)
    for text, accuracy in result.finalists.items():
        with applied(llama, text):
            assert evaluate(llama, questions.validation).accuracy == accuracy
    if strategy == "exhaustive":
        # All are ranked by the loss of the right answers; the best four of them write.
        losses = {}
        for text in texts(GRID, llama):
            with applied(llama, text):
                losses[text] = evaluate(llama, questions.validation, scorer="answer").loss
        best = sorted(losses, key=losses.__getitem__)[: 4 if metric == "accuracy" else 1]
        assert set(best) <= set(result.finalists)
    assert SearchResult.from_dict(json.loads(json.dumps(result.as_dict()))) == result
    again = search_(llama, questions, strategy=strategy, metric=metric, grid=GRID, store=store, config=small)
    assert again == result


def test_what_is_written_at_another_length_is_another_search(llama: LanguageModel, tmp_path: Path) -> None:
    runs = set()
    for tokens in (1, 2, 1):
        how = Decoding(new_tokens=tokens)
        task = short_task()
        validation = replace(task.validation, scorer="contains", decoding=how)
        questions = replace(task, validation=validation, test=replace(task.test, scorer="contains"))
        runs.add(search(llama, questions, grid="2.fc_in@0.5", store=tmp_path / "runs.db").run)
    assert len(runs) == 2


def test_a_perplexity_is_searched_by_its_loss(llama: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("laserlm.scoring.tokenize.WINDOW_TOKENS", 64)
    monkeypatch.setattr("laserlm.scoring.tokenize.STRIDE_TOKENS", 48)
    words = "Paris Rome Oslo Lisbon Madrid is the capital of Norway and a city in Italy".split()
    lines = [" ".join(words[(i * j) % len(words)] for j in range(1, 30)) + ".\n" for i in range(1, 150)]
    (tmp_path / "text.txt").write_text("".join(lines))
    path = by_name(f"perplexity:{tmp_path / 'text.txt'}")
    assert len(path.validation) >= 1
    result = search_(llama, path, strategy="exhaustive", grid="2.fc_in@0.5,0.1")
    losses = {"": evaluate(llama, path.validation).loss}
    for text in texts("2.fc_in@0.5,0.1", llama):
        with applied(llama, text):
            losses[text] = evaluate(llama, path.validation).loss
    assert str(result.best) == min(losses, key=losses.__getitem__)
    assert result.validation.edited_loss == pytest.approx(min(losses.values()), abs=1e-4)
    with pytest.raises(ScoringError, match="a perplexity has no accuracy"):
        search_(llama, path, metric="accuracy")
    assert search_(llama, path, grid="2.fc_in@0.5,0.1").screened is not None


@pytest.fixture
def upper(llama: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """What is held against the bound, of each candidate: its harm on what a search chooses by, and one standard error more."""
    monkeypatch.setattr("laserlm.searching.guard.PASSAGES", 12)
    (guard,) = guards_of(llama, None)
    harms = {text: harm_on(llama, guard, guard.choosing, text) for text in texts(GRID, llama)}
    return {"": 0.0} | {text: harm.change + harm.error for text, harm in harms.items()}


@pytest.mark.parametrize("strategy", ["race", "exhaustive"])
def test_the_best_within_the_bound_on_harm_wins(
    strategy: Any, llama: LanguageModel, task: Task, upper: dict[str, float]
) -> None:
    options: dict[str, Any] = {"strategy": strategy, "metric": "loss", "first_rung": 100, "random_candidates": 100}
    losses = {text: e.loss for text, e in brute_force(llama, task.validation, [*upper]).items()}
    unbound = search(llama, task, **options)
    assert str(unbound.best) == min(losses, key=losses.__getitem__)
    assert [p.intervention for p in unbound.points] == sorted(losses.keys() - {""}, key=losses.__getitem__)[:MOST_HARMS]
    for point in unbound.points:
        (harm,) = point.harms
        assert harm.change + harm.error == pytest.approx(upper[point.intervention], abs=1e-4)
    unguarded = search(llama, task, guards=(), **options)
    assert (unguarded.points, unguarded.harms) == ((), ())
    for name in ("best", "validation", "test", "rungs", "scored"):
        assert getattr(unguarded, name) == getattr(unbound, name)
    bounds = [x for x in sorted(upper.values()) if x > 0]
    for bound in (bounds[len(bounds) // 2] - 1e-3, upper[str(unbound.best)] - 1e-3):
        allowed = [text for text in upper if upper[text] <= bound]
        result = search(llama, task, max_harm=math.expm1(bound), **options)
        assert str(result.best) == min(allowed, key=losses.__getitem__)
        assert sum(rung.harmful for rung in result.rungs) == (len(upper) - len(allowed) if strategy == "race" else 0)
        for point in result.points:
            (harm,) = point.harms
            assert harm.change + harm.error == pytest.approx(upper[point.intervention], abs=1e-4)
            assert point.comparison.edited_loss == pytest.approx(losses[point.intervention], abs=1e-4)
        assert SearchResult.from_dict(json.loads(json.dumps(result.as_dict()))) == result
    assert str(result.best) != str(unbound.best)


def test_a_race_over_several_rungs_and_a_composition_keep_within_the_bound(
    llama: LanguageModel, task: Task, upper: dict[str, float]
) -> None:
    bound = sorted(upper.values())[len(upper) // 2]
    options: dict[str, Any] = {"metric": "loss", "first_rung": 2, "max_harm": math.expm1(bound), "delta": 1.0}
    raced = search(llama, task, strategy="race", keep=0.8, **options)
    assert upper[str(raced.best)] <= bound
    assert sum(rung.harmful for rung in raced.rungs) > 0
    composed = search(llama, task, strategy="compose", mode="greedy", **options)
    held = {p.intervention: p.harms[0].change + p.harms[0].error for p in composed.points}
    assert held
    assert all(held[step.intervention] <= bound for step in composed.steps)
    assert str(composed.best) == (composed.steps[-1].intervention if composed.steps else "")


def test_harm_of_what_another_candidate_clearly_beats_is_not_measured_further(
    llama: LanguageModel, task: Task, monkeypatch: pytest.MonkeyPatch, before_scoring: BeforeScoring
) -> None:
    looked_at = Counter[str]()
    monkeypatch.setattr("laserlm.searching.guard.PASSAGES", 24)
    monkeypatch.setattr("laserlm.searching.session.MAX_HARMS", 100)
    monkeypatch.setattr("laserlm.searching.session.FIRST_HARM_EXAMPLES", 8)
    before_scoring(lambda text, split: looked_at.update({text: len(split)} if split.name == "guard 0 choosing" else {}))
    with monkeypatch.context() as patched:
        patched.setattr("laserlm.searching.session.HARM_DELTA", -1.0)
        whole = search(llama, task, metric="loss")
    assert {n for text, n in looked_at.items() if text} == {24}
    looked_at.clear()
    monkeypatch.setattr("laserlm.searching.session.HARM_DELTA", 0.1)
    result = search(llama, task, metric="loss")
    points = {p.intervention for p in result.points}
    left_out = {p.intervention for p in whole.points} - points
    assert left_out
    assert [p.intervention for p in result.pareto] == [p.intervention for p in whole.pareto]
    assert (result.best, result.harms[0].comparison.n) == (whole.best, whole.harms[0].comparison.n)
    assert {text: n for text, n in looked_at.items() if text} == dict.fromkeys(left_out, 8) | dict.fromkeys(points, 24)
    looked_at.clear()
    bound = search(llama, task, metric="loss", max_harm=1e-6)  # asks for the harm of some before
    assert {p.intervention for p in bound.points} == {text for text, n in looked_at.items() if text and n == 24}


@pytest.mark.parametrize("strategy", ["race", "exhaustive"])
def test_harm_that_no_time_is_left_for_leaves_the_choice_as_it_is(
    strategy: Any,
    llama: LanguageModel,
    task: Task,
    upper: dict[str, float],
    monkeypatch: pytest.MonkeyPatch,
    before_scoring: BeforeScoring,
    caplog: pytest.LogCaptureFixture,
) -> None:
    clock, looked_at = [0.0], list[str]()

    def timed(text: str, split: Split) -> None:
        if split.name == "guard 0 choosing":
            looked_at.append(text)
            clock[0] += 600 * (len(looked_at) == 2)

    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    before_scoring(timed)
    options: dict[str, Any] = {"strategy": strategy, "metric": "loss", "first_rung": 3}
    result = search(llama, task, budget=8, **options)
    assert result.complete
    assert len(looked_at) == 3  # two of them and the unchanged model, which they are compared with
    assert {p.intervention for p in result.points} == {*looked_at} - {""}
    missing = MOST_HARMS - len(result.points)
    assert f"the harm of {missing} of the {MOST_HARMS} best candidates is not measured: the time" in caplog.text
    clock[0] = 0.0
    whole = search(llama, task, **options)
    assert len(whole.points) == MOST_HARMS
    assert (whole.best, whole.validation, whole.test) == (result.best, result.validation, result.test)


@pytest.mark.parametrize("strategy", ["race", "exhaustive"])
def test_a_candidate_whose_harm_cannot_be_measured_is_no_point(
    strategy: Any,
    llama: LanguageModel,
    task: Task,
    upper: dict[str, float],
    before_scoring: BeforeScoring,
    caplog: pytest.LogCaptureFixture,
) -> None:
    options: dict[str, Any] = {"strategy": strategy, "metric": "loss"}
    best, second, *_ = (p.intervention for p in search(llama, task, **options).points)

    def fail(text: str, split: Split) -> None:
        if text == second and split.name == "guard 0 choosing":
            raise ScoringError("a log-probability is not a number")

    before_scoring(fail)
    result = search(llama, task, **options)
    assert str(result.best) == best
    assert second not in [p.intervention for p in result.points]
    assert len(result.points) == MOST_HARMS - 1
    assert f"the harm of 1 of the {MOST_HARMS} best candidates" in caplog.text
    assert "not a number" in caplog.text


@pytest.mark.parametrize("strategy", ["race", "exhaustive"])
def test_out_of_time_the_best_so_far_is_within_the_bound(
    strategy: Any,
    llama: LanguageModel,
    task: Task,
    upper: dict[str, float],
    monkeypatch: pytest.MonkeyPatch,
    before_scoring: BeforeScoring,
) -> None:
    clock = [0.0]
    losses = {text: e.loss for text, e in brute_force(llama, task.validation, [*upper]).items()}
    tried: list[str] = []

    def timed(text: str, split: Split) -> None:
        if split.name == "validation":
            clock[0] += 60
            tried.append(text)

    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    before_scoring(timed)
    bound = sorted(upper.values())[len(upper) // 2]
    options: dict[str, Any] = {"strategy": strategy, "metric": "loss", "first_rung": 3, "max_harm": math.expm1(bound)}
    result = search(llama, task, budget=8, **options)
    assert not result.complete
    assert upper[str(result.best)] <= bound
    assert min(map(upper.__getitem__, tried)) <= bound < max(map(upper.__getitem__, tried))
    if strategy == "exhaustive":
        assert str(result.best) == min((t for t in tried if upper[t] <= bound), key=losses.__getitem__)
