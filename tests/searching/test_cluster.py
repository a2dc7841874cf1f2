"""A search on a cluster gives the same scores, whatever happens to its workers; Ray is played by this process."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from searching.conftest import BeforeScoring
from searching.fake_ray import FakeRay, OutOfMemoryError, die, hang, here
from searching.support import GIVEN, Scored, same, search

import laserlm.models
from laserlm.cli.search_options import ClusterOptions
from laserlm.errors import MissingExtraError, ModelError, ScoringError
from laserlm.models import LanguageModel
from laserlm.searching import Ray, cluster, schedule
from laserlm.searching.config import OF_COMPONENTS
from laserlm.store import Store
from laserlm.tasks import Decoding, Split, Task

MET = "1.fc_up@0.3"
"""An intervention at which something happens to the worker."""
Fault = Callable[[], object]
Meets = Callable[..., list[Any]]


@pytest.fixture(autouse=True)
def no_long_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker is slow after half a second, and a sign of life is with the driver at once."""
    monkeypatch.setattr(cluster, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(cluster, "SIGN_OF_LIFE_SECONDS", 0.0)
    monkeypatch.setattr(schedule, "PATIENCE_SECONDS", 0.5)


@pytest.fixture
def on_cluster(ray: FakeRay, lm: LanguageModel, task: Task, tmp_path: Path) -> Callable[..., Scored]:
    """Make the exhaustive search on the cluster."""

    def run(workers: int = 2, **options: Any) -> Scored:
        return search(lm, task, tmp_path / "ray.db", executor=Ray("auto", workers=workers), **GIVEN["exhaustive"] | options)

    return run


@pytest.fixture
def met(before_scoring: BeforeScoring) -> Meets:
    """Have something happen to workers at one intervention, the first time or each time; return those that met it."""

    def install(fault: Fault, *, once: bool = True, at: Callable[[str], bool] = MET.__eq__) -> list[Any]:
        workers: list[Any] = []
        turn = threading.Lock()

        def before(text: str, split: Split) -> None:
            if here() is None or not at(text):
                return
            with turn:
                if once and workers:
                    return
                workers.append(here())
            fault()

        before_scoring(before)
        return workers

    return install


def connected(ray: FakeRay) -> FakeRay:
    """Connect the driver to the cluster before the search does, which then leaves it connected."""
    ray.init(address="auto")
    return ray


@pytest.mark.parametrize("workers", [1, 2, 4])
@pytest.mark.parametrize("name", GIVEN)
def test_the_winner_and_every_score_are_those_of_one_process(
    name: str, workers: int, ray: FakeRay, lm: LanguageModel, task: Task, tmp_path: Path, alone: dict[str, Scored]
) -> None:
    result, ours = search(lm, task, tmp_path / "ray.db", executor=Ray("auto", workers=workers), **GIVEN[name])
    expected, scored = alone[name]
    assert len(ray.workers) == workers
    assert (result.best, result.failed, result.complete) == (expected.best, {}, True)
    assert result.rungs == expected.rungs
    same(ours, scored)
    assert result.boundary_bytes > 0 or name in OF_COMPONENTS  # which are changed from the first block on
    assert result.decomposition_bytes > 0


@pytest.mark.parametrize("scorer", ["choice", "contains"])
def test_what_the_model_writes_and_choices_of_several_rows_are_the_same(
    scorer: Any, ray: FakeRay, lm: LanguageModel, task: Task, tmp_path: Path
) -> None:
    cities = ("Paris", "Rome", "Oslo", "Lisbon", "Madrid")
    questions = {
        "choice": Task.of("chosen", [replace(e, choices=cities) for e in task.every], scorer="choice"),
        "contains": Task.of("written", list(task.every), scorer="contains", decoding=Decoding(new_tokens=3)),
    }[scorer]
    options: dict[str, Any] = {"grid": "0-2.mlp@0.5", "candidates": 4, "first_rung": 3}
    expected, scored = search(lm, questions, tmp_path / "local.db", **options)
    result, ours = search(lm, questions, tmp_path / "ray.db", executor=Ray("auto", workers=2), **options)
    assert (result.best, result.finalists) == (expected.best, expected.finalists)
    same(ours, scored)
    assert {k: v.scores[0].predicted for k, v in ours.items()} == {k: v.scores[0].predicted for k, v in scored.items()}


def test_a_search_goes_on_with_another_executor(
    ray: FakeRay, on_cluster: Callable[..., Scored], lm: LanguageModel, task: Task, tmp_path: Path, local: Scored
) -> None:
    steps: list[str] = []

    def stop_at_five(step: Any) -> None:
        steps.append(step.last)
        if len(steps) == 5:
            raise KeyboardInterrupt

    connected(ray)
    with pytest.raises(KeyboardInterrupt):
        on_cluster(on_step=stop_at_five)
    assert ray.available_resources()["CPU"] == 4
    assert ray.is_initialized()
    result, ours = search(lm, task, tmp_path / "ray.db", **GIVEN["exhaustive"])
    assert result.best == local[0].best
    same(ours, local[1])


def test_a_killed_worker_loses_nothing(on_cluster: Callable[..., Scored], local: Scored, met: Meets, ray: FakeRay) -> None:
    killed = met(die)
    result, ours = on_cluster()
    assert len(killed) == 1
    assert len(ray.workers) == 3
    assert (result.best, result.failed) == (local[0].best, {})
    same(ours, local[1])


def test_what_ends_every_worker_is_abandoned_with_its_reason_and_the_rest_goes_on(
    on_cluster: Callable[..., Scored], local: Scored, met: Meets, tmp_path: Path
) -> None:
    killed = met(die, once=False)
    result, ours = on_cluster()
    assert len(set(killed)) == 3
    assert list(result.failed) == [MET]
    assert result.failed[MET].startswith("3 workers ended at it; the last because")
    with Store.open(tmp_path / "ray.db") as store:
        (failed,) = [t for t in store.trials(result.run) if t.status == "failed"]
        assert failed.reason == result.failed[MET]
    same(ours, {key: e for key, e in local[1].items() if key != ("validation", MET)})


def no_memory() -> None:
    torch.empty(2**55)


def no_memory_for_python() -> None:
    raise MemoryError


def broken_gpu() -> None:
    raise torch.AcceleratorError("an illegal memory access")


def no_memory_on_the_node() -> None:
    die(OutOfMemoryError("Task was killed due to the node running low on memory."))


@pytest.mark.parametrize(
    ("fault", "workers"),
    # Where memory runs out in the worker itself, it frees some and goes on.
    [(no_memory, 2), (no_memory_for_python, 2), (broken_gpu, 3), (no_memory_on_the_node, 3)],
)
def test_a_worker_that_cannot_go_on_is_replaced(
    fault: Fault, workers: int, on_cluster: Callable[..., Scored], local: Scored, met: Meets, ray: FakeRay
) -> None:
    unfit = met(fault)
    result, ours = on_cluster()
    assert len(unfit) == 1
    assert len(ray.workers) == workers
    assert result.failed == {}
    same(ours, local[1])


def test_a_worker_whose_batch_does_not_fit_halves_it_and_the_run_keeps_that(
    on_cluster: Callable[..., Scored], tmp_path: Path, local: Scored, monkeypatch: pytest.MonkeyPatch
) -> None:
    result_there = laserlm.models.load
    tried: list[int] = []

    def tight(_module: Any, _args: Any, inputs: dict[str, Any]) -> None:
        tried.append(len(inputs["input_ids"]))
        if tried[-1] > 2:
            raise torch.OutOfMemoryError("no room")

    def loaded(*arguments: Any, **options: Any) -> LanguageModel:
        lm = result_there(*arguments, **options)
        lm.model.register_forward_pre_hook(tight, with_kwargs=True)
        return lm

    monkeypatch.setattr(laserlm.models, "load", loaded)
    result, ours = on_cluster(batch_size=7)
    assert max(tried) > 2
    assert result.failed == {}
    same(ours, local[1])
    with Store.open(tmp_path / "ray.db") as store:
        assert store.notes(result.run)["batch_size"] in (1, 3)


def test_a_slow_workers_pieces_are_given_to_others(
    on_cluster: Callable[..., Scored], local: Scored, met: Meets, ray: FakeRay
) -> None:
    slow = met(hang)  # until the search is over and ends it
    result, ours = on_cluster()
    assert len(slow) == 1
    assert len(ray.workers) == 2
    assert result.failed == {}
    same(ours, local[1])


def test_a_node_that_goes_takes_nothing_with_it_and_one_that_comes_is_used(
    ray: FakeRay, on_cluster: Callable[..., Scored], local: Scored, before_scoring: BeforeScoring
) -> None:
    ray.machines.clear()
    nodes = [ray.add_node(1), ray.add_node(1)]
    where: list[Any] = []
    both, gone = threading.Event(), threading.Event()

    def before(text: str, split: Split) -> None:
        worker = here()
        assert worker is not None
        where.append(worker.node)
        if len(set(where)) == 2:
            both.set()
        if split.name == "validation":  # nobody gets far before the node is gone
            assert both.wait(60)
        if worker.node is nodes[0] and split.name == "validation":
            gone.set()
            hang()
        if split.name == "validation":
            assert gone.wait(60)

    removed: list[Any] = []

    def on_step(step: Any) -> None:
        if gone.is_set() and not removed:
            removed.append(nodes[0])
            ray.remove_node(nodes[0])
            nodes.append(ray.add_node(1))

    before_scoring(before)
    result, ours = on_cluster(on_step=on_step)
    assert removed
    assert nodes[0] in where
    assert ray.workers[-1].node is nodes[2]
    assert result.failed == {}
    same(ours, local[1])


def test_idle_workers_that_end_are_not_blamed_on_what_they_are_given_next(
    ray: FakeRay,
    on_cluster: Callable[..., Scored],
    lm: LanguageModel,
    task: Task,
    tmp_path: Path,
    met: Meets,
) -> None:
    def end_all_others() -> None:
        for worker in list(ray.workers):
            if worker is not here():
                worker.end()

    options: dict[str, Any] = {"strategy": "compose", "mode": "greedy", "grid": f"{MET}+0-2.fc_in@0.5,0.3"}
    _, expected = search(lm, task, tmp_path / "local.db", **options)
    ended = met(end_all_others, at=lambda text: MET in text)
    result, ours = on_cluster(4, **options)
    assert len(ended) == 1
    assert result.failed == {}
    same(ours, expected)


def test_an_unchanged_model_that_ends_every_worker_is_reported_and_can_go_on(
    on_cluster: Callable[..., Scored],
    lm: LanguageModel,
    task: Task,
    tmp_path: Path,
    local: Scored,
    met: Meets,
) -> None:
    met(die, once=False, at="".__eq__)
    message = r"the unchanged model could not be scored on test: 3 workers ended at it.*continues"
    with pytest.raises(ScoringError, match=message):
        on_cluster()
    _, ours = search(lm, task, tmp_path / "ray.db", **GIVEN["exhaustive"])
    same(ours, local[1])


def test_workers_that_end_before_they_have_the_model_are_reported(
    on_cluster: Callable[..., Scored], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(laserlm.models, "load", lambda *_, **__: die())
    with pytest.raises(ScoringError, match="3 workers in a row ended before they had the model: the worker has ended; check"):
        on_cluster()


def test_a_worker_that_could_not_start_is_tried_again(
    on_cluster: Callable[..., Scored], local: Scored, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    result_there = laserlm.models.load
    tried: list[Any] = []

    def loaded(*arguments: Any, **options: Any) -> LanguageModel:
        tried.append(here())
        if len(tried) == 1:
            die()
        return result_there(*arguments, **options)

    monkeypatch.setattr(laserlm.models, "load", loaded)
    monkeypatch.setattr(cluster, "RETRY_SECONDS", 0.0)
    with caplog.at_level(logging.WARNING):
        _, ours = on_cluster()
    assert "a worker could not start, another one starts: the worker has ended" in caplog.text
    same(ours, local[1])


def test_out_of_time_the_best_so_far_is_measured(
    on_cluster: Callable[..., Scored], task: Task, before_scoring: BeforeScoring, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, now = [0.0], time.monotonic

    def before(text: str, split: Split) -> None:
        clock[0] += 60 if split.name == "validation" else 0

    before_scoring(before)
    monkeypatch.setattr("time.monotonic", lambda: now() + clock[0])
    result, ours = on_cluster(budget=5)
    assert not result.complete
    assert 1 <= len([text for split, text in ours if split == "validation"]) < result.candidates
    assert result.test.n == len(task.test)


def test_an_error_in_a_worker_ends_the_search_as_it_is(on_cluster: Callable[..., Scored], met: Meets) -> None:
    def broken() -> None:
        raise ZeroDivisionError("a defect")

    met(broken)
    with pytest.raises(ZeroDivisionError, match="a defect"):
        on_cluster()


def test_other_weights_than_the_searched_ones_are_refused(on_cluster: Callable[..., Scored], lm: LanguageModel) -> None:
    with torch.no_grad():
        next(iter(lm.model.parameters())).add_(1)
    with pytest.raises(ModelError, match="has other weights than where the search was started"):
        on_cluster(1)


def test_a_worker_with_other_weights_ends_the_search_where_others_are_ready(
    on_cluster: Callable[..., Scored], before_scoring: BeforeScoring, monkeypatch: pytest.MonkeyPatch
) -> None:
    models: list[LanguageModel] = []
    both_loaded = threading.Event()
    load_model = laserlm.models.load

    def load_other_weights_second(*arguments: Any, **options: Any) -> LanguageModel:
        lm = load_model(*arguments, **options)
        models.append(lm)
        if len(models) == 2:
            with torch.no_grad():
                next(iter(lm.model.parameters())).add_(1)
            both_loaded.set()
        return lm

    monkeypatch.setattr(laserlm.models, "load", load_other_weights_second)
    before_scoring(lambda *_: both_loaded.wait(30))
    with pytest.raises(ModelError, match="has other weights than where the search was started"):
        on_cluster(2)


def test_without_an_address_a_cluster_is_started_and_ended(
    ray: FakeRay, on_cluster: Callable[..., Scored], lm: LanguageModel, task: Task, tmp_path: Path, local: Scored
) -> None:
    ray.machines.clear()
    sizes: list[float] = []
    result, ours = search(
        lm, task, tmp_path / "ray.db", executor=Ray(workers=2),
        on_step=lambda _: sizes.append(ray.cluster_resources()["CPU"]), **GIVEN["exhaustive"],
    )  # fmt: skip
    assert set(sizes) == {2}
    assert not ray.is_initialized()
    assert ray.cluster_resources()["CPU"] == 0
    same(ours, local[1])
    with Store.open(tmp_path / "ray.db") as store:
        assert store.find(result.run).provenance["ray"] == {"address": None, "workers": 2, "cpus": 1.0, "gpus": None}


def test_as_many_workers_as_there_is_room_for_have_as_many_threads_as_cpus(
    ray: FakeRay, lm: LanguageModel, task: Task, tmp_path: Path, local: Scored, before_scoring: BeforeScoring
) -> None:
    ray.add_node(3)
    threads: list[int] = []
    before_scoring(lambda *_: threads.append(torch.get_num_threads()))
    _, ours = search(lm, task, tmp_path / "ray.db", executor=Ray("auto", cpus=2), **GIVEN["exhaustive"])
    assert len(ray.workers) == 3
    assert set(threads) == {2}
    same(ours, local[1])


def test_a_task_that_cannot_be_sent_is_reported(ray: FakeRay, lm: LanguageModel, task: Task, tmp_path: Path) -> None:
    bound = replace(task, validation=replace(task.validation, judge=threading.Lock()))  # type: ignore[arg-type]
    with pytest.raises(ScoringError, match=r"the task cannot be sent to other processes .* search on this machine alone"):
        search(lm, bound, tmp_path / "ray.db", executor=Ray("auto", workers=1), **GIVEN["exhaustive"])


def test_what_cannot_be_done_is_reported(
    ray: FakeRay, llama: LanguageModel, lm: LanguageModel, task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for options, message in (
        ({"workers": 0}, "0 workers"),
        ({"cpus": 0}, "cpus above 0"),
        ({"address": "ray://x:1"}, "client"),
    ):
        with pytest.raises(ScoringError, match=message):
            Ray(**options)
    with pytest.raises(ModelError, match="exists only in this process"):
        search(llama, task, tmp_path / "a.db", executor=Ray(), **GIVEN["exhaustive"])
    with pytest.raises(ScoringError, match="4 CPU, 0 GPU are all there is in the cluster; ask for less"):
        search(lm, task, tmp_path / "a.db", executor=Ray("auto", gpus=1), **GIVEN["exhaustive"])
    with pytest.raises(ScoringError, match="a worker needs 1 CPU, 2 GPU on one machine"):
        search(lm, task, tmp_path / "a.db", executor=Ray(workers=1, gpus=2), **GIVEN["exhaustive"])
    ray.machines.clear()
    with pytest.raises(ScoringError, match="no Ray cluster at auto"):
        search(lm, task, tmp_path / "a.db", executor=Ray("auto"), **GIVEN["exhaustive"])
    os.environ.pop("RAY_ADDRESS", None)
    with pytest.raises(ScoringError, match=r"no Ray cluster at 127\.0\.0\.1:1"):
        search(lm, task, tmp_path / "a.db", executor=Ray("127.0.0.1:1"), **GIVEN["exhaustive"])
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError, match=r"laserlm\[cluster\]"):
        search(lm, task, tmp_path / "a.db", executor=Ray(), **GIVEN["exhaustive"])


@pytest.mark.parametrize(
    ("inputs", "workers", "place"),
    [
        ({}, 2, {"device": "cuda"}),  # one GPU each
        ({"workers": 3}, 3, {"device": "cuda"}),  # two of them share one
        ({"gpus": 2}, 1, {"device_map": "auto"}),
        ({"gpus": 0}, 4, {"device": "cpu"}),
    ],
)
def test_workers_of_a_cluster_with_gpus_get_them_unless_asked_otherwise(
    inputs: dict[str, Any],
    workers: int,
    place: dict[str, str],
    ray: FakeRay,
    lm: LanguageModel,
    task: Task,
    tmp_path: Path,
    local: Scored,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ray.machines.clear()
    ray.add_node(4, gpus=2)
    places: list[dict[str, str]] = []
    load_model = laserlm.models.load

    def load_on_cpu(*arguments: Any, **options: Any) -> LanguageModel:
        places.append({name: options.pop(name) for name in ("device", "device_map") if name in options})
        return load_model(*arguments, **options, device="cpu")

    monkeypatch.setattr(laserlm.models, "load", load_on_cpu)
    _, ours = search(lm, task, tmp_path / "ray.db", executor=Ray("auto", **inputs), **GIVEN["exhaustive"])
    assert len(ray.workers) == workers
    assert all(worker.node is not None for worker in ray.workers)
    assert places
    assert all(one == place for one in places)
    same(ours, local[1])


def test_the_command_line_gives_workers_the_cpu_where_the_device_is_the_cpu() -> None:
    for options, device, gpus in (({}, None, None), ({}, "cpu", 0.0), ({"gpus_per_worker": 1.0}, "cpu", 1.0)):
        cluster_options = ClusterOptions(executor="ray", **options)
        result = cluster_options.cluster(device)
        assert result is not None
        assert result.gpus == gpus


def test_a_run_notes_what_its_workers_run_on(on_cluster: Callable[..., Scored], tmp_path: Path) -> None:
    result, _ = on_cluster(2)
    with Store.open(tmp_path / "ray.db") as store:
        expected = {"device": "cpu", "dtype": "float32", "attention": "sdpa", "batch_size": 32}
        assert store.notes(result.run)["computed_on"] == [expected]
