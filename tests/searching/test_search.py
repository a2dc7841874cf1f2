from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import laserlm.searching.driver as module
from laserlm.editing import applied
from laserlm.errors import MatrixError, ScoringError
from laserlm.models import LanguageModel
from laserlm.results import Store
from laserlm.scoring.evaluate import compare, evaluate, evaluate_rows
from laserlm.searching import Step, expand, search
from laserlm.searching.frontier import Frontier
from laserlm.tasks import Example, Task

Make = Callable[..., LanguageModel]
GRID = "0-1.mlp@0.5,0.1"


@pytest.fixture
def task() -> Task:
    cities = ["Paris", "Rome", "Oslo", "Lisbon", "Madrid"]
    rows = [
        Example(f"{i}", f"The capital of {a} and {b} is", cities[(i * 7 + j) % 5], fact=f"{i}")
        for i, (a, b) in enumerate((x, y) for x in "abcdef" for y in "uvwxyz")
        for j in [0]
    ]
    return Task.of("made", rows, scorer="first_token")


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


@pytest.mark.parametrize("metric", ["accuracy", "loss"])
def test_the_best_on_validation_wins_and_only_it_meets_the_test_split(
    metric: str, llama: LanguageModel, task: Task, tmp_path: Path
) -> None:
    found = search(llama, task, grid=GRID, metric=metric, store=tmp_path / "runs.db")  # type: ignore[arg-type]
    everything = {"": evaluate(llama, task.validation)}
    for candidate in expand(GRID, llama.matrices):
        with applied(llama, candidate.intervention):
            everything[str(candidate.intervention)] = evaluate(llama, task.validation)
    if metric == "accuracy":
        best = max(everything, key=lambda text: (everything[text].accuracy, -everything[text].loss))
    else:
        best = min(everything, key=lambda text: everything[text].loss)
    assert str(found.best) == best
    assert found.candidates == 12
    assert found.validation == compare(everything[""], everything[best])
    with applied(llama, best):
        edited = evaluate(llama, task.test)
    assert found.test == compare(evaluate(llama, task.test), edited)
    with Store.open(tmp_path / "runs.db") as store:
        trials = store.trials(found.run)
    assert sorted(t.intervention for t in trials if t.split == "test") == sorted({"", best})
    assert len([t for t in trials if t.split == "validation"]) == 13


def test_the_unchanged_model_can_win(llama: LanguageModel, task: Task) -> None:
    rows = [replace(e, answer="x") for e in task.every]
    best = {s.id: s.predicted for s in evaluate(llama, replace(task.every, examples=tuple(rows))).scores}
    easy = Task.of("easy", [replace(e, answer=best[e.id]) for e in rows if best[e.id].strip()], scorer="next_token")
    found = search(llama, easy, grid="0-1.mlp@0")
    assert str(found.best) == ""
    assert found.test.gain == found.validation.gain == 0
    assert found.test.mcnemar_p == 1
    assert found.as_dict()["best"] == ""


def test_an_interrupted_search_goes_on_and_scores_nothing_twice(
    llama: LanguageModel, task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = search(llama, task, grid=GRID, store=tmp_path / "whole.db")
    scored: list[str] = []

    def counted(run: Callable[..., Any]) -> Callable[..., Any]:
        def count(lm: LanguageModel, *args: Any, **kwargs: Any) -> Any:
            if len(scored) == 5:
                scored.append("stopped")
                raise KeyboardInterrupt
            scored.append(lm.intervention)
            return run(lm, *args, **kwargs)

        return count

    monkeypatch.setattr(module, "evaluate", counted(evaluate))
    monkeypatch.setattr(module, "evaluate_rows", counted(evaluate_rows))
    with pytest.raises(KeyboardInterrupt):
        search(llama, task, grid=GRID, store=tmp_path / "runs.db")
    assert llama.intervention == ""
    found = search(llama, task, grid=GRID, store=tmp_path / "runs.db")
    assert scored.count("stopped") == 1
    assert len(scored) == 1 + 13 + 2  # baseline and candidates on validation, two on test
    assert (found.best, found.validation, found.test) == (whole.best, whole.validation, whole.test)
    again = search(llama, task, grid=GRID, store=tmp_path / "runs.db")
    assert len(scored) == 16
    assert (again.run, again.best, again.test) == (found.run, found.best, found.test)
    fresh = search(llama, task, grid=GRID, store=tmp_path / "runs.db", restart=True)
    assert fresh.run != found.run
    assert len(scored) == 31


def test_other_weights_rows_or_grids_are_another_search(make: Make, task: Task, tmp_path: Path) -> None:
    store = tmp_path / "runs.db"
    shorter = replace(task, validation=task.validation.limit(3))
    runs = {
        search(make("llama"), task, grid="1.fc_in@0.5", store=store).run,
        search(make("llama", seed=1), task, grid="1.fc_in@0.5", store=store).run,
        search(make("llama"), shorter, grid="1.fc_in@0.5", store=store).run,
        search(make("llama"), task, grid="1.fc_in@0.6", store=store).run,
        search(make("llama"), task, grid="1.fc_in@0.5", metric="loss", store=store).run,
        search(make("llama"), task, grid="1.fc_in@0.50", store=store).run,
    }
    assert len(runs) == 5


def test_a_candidate_that_fails_is_recorded_and_passed_over(
    llama: LanguageModel, task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(lm: LanguageModel, *args: Any, **kwargs: Any) -> Any:
        if lm.intervention == "0.fc_up@0.5":
            raise ScoringError("a log-probability of nan")
        if lm.intervention == "1.fc_up@0.1":
            raise ScoringError("no room")
        return evaluate_rows(lm, *args, **kwargs)

    monkeypatch.setattr(module, "evaluate_rows", broken)
    found = search(llama, task, grid=GRID, store=tmp_path / "runs.db")
    assert found.failed == {
        "0.fc_up@0.5": "ScoringError: a log-probability of nan",
        "1.fc_up@0.1": "ScoringError: no room",
    }
    with Store.open(tmp_path / "runs.db") as store:
        assert {t.intervention for t in store.trials(found.run) if t.status == "failed"} == set(found.failed)


def test_memory_that_runs_out_halves_the_batch_and_loses_nothing(
    llama: LanguageModel, task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = search(llama, task, grid=GRID)
    run = Frontier.run
    tried: list[int] = []

    def tight(self: Frontier) -> Any:
        tried.append(max(len(b.rows) for b in self._batches))
        if tried[-1] > 2:
            raise torch.OutOfMemoryError("no room")
        return run(self)

    monkeypatch.setattr(Frontier, "run", tight)
    found = search(llama, task, grid=GRID, batch_size=7)
    assert tried[:3] == [7, 3, 1]
    assert set(tried[2:]) == {1}
    assert (found.best, found.validation.corrected, found.failed) == (expected.best, expected.validation.corrected, {})


def test_steps_are_told(llama: LanguageModel, task: Task) -> None:
    steps: list[Step] = []
    search(llama, task, grid="1.fc_in@0.5,0.1", on_step=steps.append)
    best = steps[-1].best.intervention
    tried = ["", "1.fc_in@0.5", "1.fc_in@0.1", best]  # after the unchanged model on test
    assert [(s.done, s.total, s.last) for s in steps] == [(i + 2, 5, text) for i, text in enumerate(tried)]


def test_rows_that_cannot_be_scored_on_test_are_told_before_the_search(llama: LanguageModel, task: Task) -> None:
    long = replace(task.test, examples=(*task.test.examples, Example("x", "The" + " capital" * 200, "Paris")))
    steps: list[Step] = []
    with pytest.raises(ScoringError, match="example 'x'"):
        search(llama, replace(task, test=long), grid=GRID, on_step=steps.append)
    assert steps == []


def test_a_matrix_that_cannot_be_decomposed_is_passed_over(llama: LanguageModel, task: Task) -> None:
    layer = llama.model.model.layers[1]
    with torch.no_grad():
        layer.mlp.gate_proj.weight[0, 0] = float("inf")
    layer.mlp.act_fn = torch.nn.Sigmoid()  # keeps infinity out of the scores
    found = search(llama, task, grid="1.mlp@0.5+0.fc_in@0.5")
    assert list(found.failed) == ["1.fc_in@0.5"]
    assert "NaN or inf" in found.failed["1.fc_in@0.5"]
    assert found.candidates == 4


def test_where_the_boundary_does_not_fit_passes_are_whole(
    llama: LanguageModel, task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = search(llama, task, grid=GRID)
    sizes: list[int] = []

    def full(self: Frontier, target: int) -> str | None:
        sizes.append(self._batches[0].targets.shape[0])
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(Frontier, "_move", full)
    found = search(llama, task, grid=GRID, batch_size=4)
    assert sizes == [4, 2, 1]
    assert (found.best, found.validation.corrected, found.failed) == (expected.best, expected.validation.corrected, {})


def test_a_search_begins_with_the_unchanged_model(llama: LanguageModel, task: Task, tmp_path: Path) -> None:
    search(llama, task, grid="1.fc_in@0.5", store=tmp_path / "runs.db")
    with applied(llama, "0.mlp@0.1"), pytest.raises(ScoringError, match=r"changed by 0\.mlp@0\.1"):
        search(llama, task, grid="1.fc_in@0.5", store=tmp_path / "runs.db")


def test_tied_blocks_are_one_candidate_and_one_edit(llama: LanguageModel) -> None:
    llama.model.model.layers[2] = llama.model.model.layers[1]
    assert texts("all.fc_in@0.5", llama) == ["0.fc_in@0.5", "1.fc_in@0.5"]


def test_a_search_needs_both_splits(llama: LanguageModel) -> None:
    with pytest.raises(ScoringError, match="needs both"):
        search(llama, Task.of("one", [Example("1", "Oslo is", "a city")]), grid=GRID)
