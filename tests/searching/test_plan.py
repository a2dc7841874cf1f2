"""What a search is expected to take, against what it took and against independent counts."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from searching.support import EVERY
from torch.utils.flop_counter import FlopCounterMode

from laserlm.models import LanguageModel
from laserlm.reductions import Intervention
from laserlm.scoring.forward import run_rows
from laserlm.searching import SearchConfig, SearchProgress, search
from laserlm.searching.driver import VALIDATION, encode_splits
from laserlm.searching.guard import PASSAGE_TOKENS, PASSAGES
from laserlm.searching.measured_cost import measure_cost
from laserlm.searching.plan import Plan, decomposition_flop, plan
from laserlm.searching.session import MAX_HARMS
from laserlm.searching.simulation import CostModel, simulate
from laserlm.searching.strategies import screen_size
from laserlm.searching.work import SCREEN_PASSES, ScoreTask
from laserlm.store import Store
from laserlm.tasks import Task

Make = Callable[..., LanguageModel]
GRID = "0-2.mlp@0.5,0.3,0.1"


def of(built: Plan, name: str) -> float:
    return sum(stage.passes for stage in built.stages if stage.name == name)


def test_an_exhaustive_search_takes_what_was_planned(llama: LanguageModel, task: Task) -> None:
    estimate = plan(llama, task, SearchConfig(strategy="exhaustive", grid=GRID, guards=()))
    steps: list[SearchProgress] = []
    result = search(llama, task, strategy="exhaustive", grid=GRID, metric="loss", guards=(), on_step=steps.append)
    assert (estimate.candidates, estimate.is_estimate, len(estimate.matrices)) == (27, False, 9)
    (best,) = result.best.reductions
    share = 1 - best.layers.first / 3  # type: ignore[operator]
    done = [s.done for s in steps if s.stage != "harm"][-1]
    assert done == pytest.approx(estimate.passes - of(estimate, "best on test") + share * len(task.test))
    assert list(estimate.phases) == ["scoring"]
    assert result.boundary_bytes <= estimate.memory.activations
    assert result.decomposition_bytes <= estimate.memory.decompositions
    assert estimate.memory.weights == sum(p.numel() * p.element_size() for p in llama.model.parameters())
    bound = plan(llama, task, SearchConfig(strategy="exhaustive", grid=GRID, guards=(), memory=4000))
    assert bound.memory.activations <= 4000
    assert bound.n_items > estimate.n_items
    assert bound.passes == pytest.approx(estimate.passes)


def test_a_race_takes_about_what_was_planned(llama: LanguageModel, task: Task) -> None:
    options: dict[str, Any] = {"grid": "all.all@0.5,0.3,0.1", "candidates": 8, "first_rung": 2, "random_candidates": 2}
    estimate = plan(llama, task, SearchConfig(**options, guards=()))
    steps: list[SearchProgress] = []
    search(llama, task, metric="loss", guards=(), on_step=steps.append, **options)
    assert estimate.is_estimate
    assert steps[-1].done == pytest.approx(estimate.passes, rel=0.3)
    names = [stage.name for stage in estimate.stages]
    assert names == [
        "unchanged model on test",
        "screen",
        "rung to example 2",
        "rung to example 7",
        "the leader's neighbours",
        "best on test",
    ]


@pytest.mark.parametrize("grid", ["0-1.mlp@0.5", "all.all@0.5,0.3"])
def test_the_harm_of_the_last_candidates_is_planned(grid: str, llama: LanguageModel, task: Task, tmp_path: Path) -> None:
    planned = plan(llama, task, SearchConfig(strategy="exhaustive", grid=grid)).stages[-1]
    result = search(llama, task, strategy="exhaustive", grid=grid, store=tmp_path / "runs.db")
    with Store.open(tmp_path / "runs.db") as store:
        measured = {part: store.evaluations(result.run, f"guard 0 {part}") for part in ("choosing", "measuring")}
    assert planned.name == "harm"
    # The unchanged model on both parts, the choice on the measuring one.
    assert len(measured["choosing"]) == 1 + min(MAX_HARMS, result.candidates)
    assert len(planned.items) == len(measured["choosing"]) + 2
    whole = sum(item.share == 1 for item in planned.items)
    assert 3 <= whole < len(planned.items)  # other passes begin at the block that changes


def test_what_is_there_at_the_same_time_is_added_up(llama: LanguageModel, task: Task) -> None:
    without = plan(llama, task, SearchConfig(strategy="exhaustive", grid=GRID))
    estimate = plan(llama, task, SearchConfig(grid=GRID))
    # Every block's input and the last one's output, of the screened questions.
    encoded, n = encode_splits(llama, task, SearchConfig())[VALIDATION], len(task.validation)
    _, rows = encoded.part(range(n - screen_size(n, SearchConfig()), n))
    assert estimate.phases["gradient"].activations == 4 * 32 * 4 * sum(len(row.ids) for row in rows)
    memory = estimate.as_dict()["memory"]
    assert memory["all"] == sum(memory[name] for name in ("weights", "boundary", "decompositions", "moment", "kept"))
    assert memory["all"] == max(estimate.as_dict()["memory_of_phases"].values())
    assert estimate.disk == without.disk == sum(4 * min(m.shape) ** 2 for m in estimate.matrices)
    assert estimate.as_dict()["disk"] == estimate.disk
    little = plan(llama, task, SearchConfig(grid=GRID, memory=2 * 4 * 32 * 4 * max(len(row.ids) for row in rows)))
    assert little.phases["gradient"].activations < estimate.phases["gradient"].activations
    # A pass with its gradient needs more than one without, in batches of one size.
    few = SearchConfig(grid=GRID, batch_size=2, guards=())
    scoring = plan(llama, task, replace(few, strategy="exhaustive")).memory
    assert plan(llama, task, few).phases["gradient"].work > scoring.work
    # The passages of a text guard are longer than the questions.
    assert plan(llama, task, replace(few, guards=("self",))).phases["scoring"].work > scoring.work


def test_a_disk_without_room_for_the_decompositions_is_reported(
    llama: LanguageModel, task: Task, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    needed = plan(llama, task, SearchConfig(grid=GRID)).disk
    assert not caplog.records
    for free, values in ((1.05 * needed, True), (1.15 * needed, False)):
        caplog.clear()
        monkeypatch.setattr("shutil.disk_usage", lambda _, free=free: _Usage(int(free)))
        plan(llama, task, SearchConfig(grid=GRID))
        assert ("free space there" in caplog.text) == values


@dataclass
class _Usage:
    free: int


def test_a_composition_is_planned_trial_by_trial(llama: LanguageModel, task: Task) -> None:
    for mode, trials in (("joint", 9), ("greedy", 27)):
        estimate = plan(llama, task, SearchConfig(strategy="compose", mode=mode, grid=GRID, candidates=8))  # type: ignore[arg-type]
        assert [stage.name for stage in estimate.stages].count("trial") == trials + (mode == "greedy")
        assert ("screen" in [stage.name for stage in estimate.stages]) == (mode == "joint")


def test_a_choice_of_components_is_planned_step_by_step(llama: LanguageModel, task: Task) -> None:
    config = SearchConfig(strategy="components", grid=GRID, steps=2)
    estimate = plan(llama, task, config)
    n = len(task.validation)
    assert [stage.name for stage in estimate.stages[1:-2]] == ["trial", "gradient", "trial", "gradient", "trial"]
    # The unchanged model, two steps, and a gradient on one part of the guard; the unchanged model and the choice on the other.
    tokens = sum(map(len, (s.ids for s in encode_splits(llama, task, config)[VALIDATION].sequences))) / n
    assert of(estimate, "harm") == (1 + 2 + SCREEN_PASSES + 2) * math.ceil(PASSAGES * PASSAGE_TOKENS / tokens)
    assert of(estimate, "trial") == 3 * n
    assert of(estimate, "gradient") == 2 * SCREEN_PASSES * (2 * n // 3)
    assert estimate.simulate(1, CostModel(work=1.0)).seconds == pytest.approx(estimate.passes, rel=0.2)
    assert 0 < estimate.screen_flop < estimate.flop


@pytest.mark.parametrize(("strategy", "finalists"), [("components", 1), ("race", 4)])
def test_the_texts_that_the_model_writes_are_planned_and_timed(
    strategy: Any, finalists: int, llama: LanguageModel, task: Task
) -> None:
    config = SearchConfig(strategy=strategy, grid=GRID, steps=1, scorer="contains", guards=(), candidates=4)
    estimate = plan(llama, task, config)
    assert of(estimate, "texts of the model") == (1 + finalists) * len(task.validation) + 2 * len(task.test)
    passes = estimate.simulate(1, CostModel(work=1.0)).seconds
    texts = estimate.simulate(1, CostModel(work=1.0, write=10.0)).seconds - passes
    assert texts == pytest.approx(10 * of(estimate, "texts of the model"))
    assert measure_cost(llama, estimate, task, config).write > 0


@pytest.mark.parametrize(
    ("family", "grid", "guards", "strategy"),
    [
        ("llama", "fine", None, "strengths"),
        ("llama", GRID, None, "race"),
        ("llama", "fine", (), "race"),
        ("bert", "fine", None, "race"),
    ],
)
def test_strengths_are_chosen_where_harm_is_measured_and_no_sizes_are_named(
    family: str, grid: str, guards: tuple[str, ...] | None, strategy: str, make: Make, task: Task
) -> None:
    assert plan(make(family), task, SearchConfig(grid=grid, guards=guards)).strategy == strategy


@pytest.mark.parametrize("family", EVERY)
def test_operations_of_a_pass_are_what_pytorch_counts(family: str, make: Make, task: Task) -> None:
    lm = make(family)
    task = replace(task, validation=replace(task.validation, scorer="answer"), test=replace(task.test, scorer="answer"))
    estimate = plan(lm, task, SearchConfig(strategy="exhaustive", grid="all.all@0.5"))
    rows = encode_splits(lm, task, SearchConfig())[VALIDATION].sequences
    if family == "mixtral":
        lm.model.set_experts_implementation("eager")  # the counter does not know the other ways
    run_rows(lm, rows, 1)  # whatever is found out at the first scoring
    with FlopCounterMode(display=False) as counter:
        run_rows(lm, rows, 1)
    counted = counter.get_total_flops() / len(task.validation)
    assert estimate.pass_flop == pytest.approx(counted, rel=0.25)


def test_operations_of_a_decomposition_hold_its_products(llama: LanguageModel) -> None:
    matrix = next(m for m in llama.matrices if m.name == "fc_in")
    m, n = matrix.shape
    k = min(m, n)
    with FlopCounterMode(display=False) as counter:
        torch.randn(k, max(m, n)) @ torch.randn(max(m, n), k)
        torch.randn(max(m, n), k) @ torch.randn(k, k)
    assert decomposition_flop(matrix) == counter.get_total_flops() + 9 * k**3


def test_a_unit_is_timed_and_nothing_is_left_behind(llama: LanguageModel, task: Task) -> None:
    estimate = plan(llama, task, SearchConfig(strategy="exhaustive", grid=GRID))
    pace = measure_cost(llama, estimate, task, SearchConfig())
    assert pace.work + pace.example > 0
    assert min(pace.work, pace.example) >= 0
    assert pace.decompose > 0
    assert pace.answer > 0
    assert not llama.active
    assert estimate.simulate(1, pace).seconds > 0


def test_a_pass_that_is_timed_goes_through_all_blocks(llama: LanguageModel, task: Task) -> None:
    """Not from the cached activations below the top block, where the candidates are."""
    config = SearchConfig(strategy="exhaustive", grid="2.mlp@0.5", guards=())
    passes: list[int] = []
    lowest: Any = llama.model.get_submodule("model.layers.0.mlp.down_proj")
    hook = lowest.register_forward_hook(lambda *_: passes.append(1))
    measure_cost(llama, plan(llama, task, config), task, config)
    hook.remove()
    assert len(passes) >= 8


def scores(n: int, examples: int = 10, share: float = 1.0, chunks: int = 1) -> list[ScoreTask]:
    """Return pieces of different matrices, so that each is a unit."""
    return [
        ScoreTask("m", c * examples, (c + 1) * examples, Intervention.parse(f"{i}.fc_in@0.5"), share)
        for c in range(chunks)
        for i in range(n)
    ]


def test_simulated_time_is_what_is_worked_out_by_hand() -> None:
    pace = CostModel(work=0.1, example=0.02, start=5, unit=1, answer=0.05)
    # A unit takes one second before it and 10 * 0.12 for its piece; its answer takes 10 * 0.05 to record.
    assert simulate([scores(4)], 1, pace).seconds == pytest.approx(5 + 4 * (2.2 + 0.5))
    assert simulate([scores(4)], 4, pace).seconds == pytest.approx(5 + 2.2 + 4 * 0.5)
    two = simulate([scores(4), scores(2)], 2, pace)
    assert two.units == 6
    # From a boundary half way up: the first pays for half a pass below it, each for half a pass above.
    halves = simulate([scores(3, share=0.5)], 1, CostModel(work=0.1))
    assert halves.seconds == pytest.approx(0.5 + 3 * 0.5)
    assert halves.busy == pytest.approx(1)
    needs = {"a": 7.0}
    assert simulate([scores(3)], 1, CostModel(0.1, decompose=2.0), decompositions=lambda _: needs).seconds == pytest.approx(
        3 + 14
    )


def test_a_simulated_driver_takes_one_answer_after_the_other() -> None:
    result = simulate([scores(200)], 100, CostModel(work=0.001, answer=0.1))
    assert result.seconds == pytest.approx(200, rel=0.01)
    assert result.driver == pytest.approx(1, rel=0.01)


@pytest.mark.parametrize("workers", [1, 3, 64])
def test_simulated_workers_that_end_are_replaced_and_all_is_done(workers: int) -> None:
    pace = CostModel(work=1, start=10)
    calm = simulate([scores(50, chunks=4)], workers, pace)
    stormy = simulate([scores(50, chunks=4)], workers, pace, failures=60)
    assert calm.lost == 0
    assert stormy.lost > 10
    assert calm.seconds < stormy.seconds < math.inf
    assert calm.seconds >= (200 * 10) / workers


def test_what_a_lost_worker_had_not_decomposed_is_decomposed_again() -> None:
    needs = {"a": 1.0}
    pace = CostModel(work=0.001, decompose=100.0)
    times = [simulate([scores(1)], 1, pace, decompositions=lambda _: needs, failures=30, seed=s) for s in range(20)]
    lost = [result.seconds for result in times if result.lost and not result.gave_up]
    assert lost
    assert min(lost) > 100


def test_beginning_the_next_stage_early_saves_time() -> None:
    stages = [scores(5), [replace(p, start=10, stop=20) for p in scores(3)]]
    pace = CostModel(work=1)
    assert simulate(stages, 4, pace).seconds == pytest.approx(30)
    assert simulate(stages, 4, pace, early=[1]).seconds == pytest.approx(20)
