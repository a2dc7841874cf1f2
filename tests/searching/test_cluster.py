"""A search on a Ray cluster of several nodes on this machine: the same scores, whatever happens to its workers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from laserlm.errors import MissingExtraError, ModelError, ScoringError
from laserlm.models import LanguageModel, load
from laserlm.results import Store
from laserlm.searching import Found, RaceOptions, Ray
from laserlm.searching import search as search_
from laserlm.tasks import Decoding, Example, Task

ray = pytest.importorskip("ray", reason="a cluster needs Ray: pip install 'laserlm[cluster]'")

pytestmark = [
    pytest.mark.slow,
    # Ray leaves its log files to the garbage collector, and uses what Python is about to change.
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]

Scores = dict[tuple[str, str], Any]
"""Evaluations by split and intervention."""
Scored = tuple[Found, Scores]
GRID = "0-2.mlp@0.5,0.3,0.1"
GIVEN: dict[str, dict[str, Any]] = {
    "exhaustive": {"strategy": "exhaustive", "grid": GRID},
    "race": {"strategy": "race", "grid": "all.all@0.5,0.3,0.1", "options": RaceOptions(width=8, first=2, controls=2)},
}


def made_task() -> Task:
    cities = ["Paris", "Rome", "Oslo", "Lisbon", "Madrid"]
    pairs = [(x, y) for x in "abcdef" for y in "uvwxyz"]
    rows = [Example(f"{i}", f"The capital of {a} and {b} is", cities[i * 7 % 5], fact=f"{i}") for i, (a, b) in enumerate(pairs)]
    return Task.of("made", rows, scorer="first_token")


@pytest.fixture
def task() -> Task:
    return made_task()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model as every worker finds it."""
    from families import build

    folder = tmp_path_factory.mktemp("cluster") / "llama"
    lm = build("llama")
    lm.model.save_pretrained(folder)
    lm.need_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def lm(folder: Path, tmp_path: Path) -> LanguageModel:
    return load(folder, cache=tmp_path / "cache", device="cpu")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A Ray cluster: a head that no worker fits on, and a node with four CPUs."""
    from ray.cluster_utils import Cluster

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    cluster.add_node(num_cpus=4)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


Fault = Callable[[str], None]


@contextmanager
def connected(cluster: Any, fault: Fault | None = None) -> Iterator[None]:
    """Connect to the cluster; in its workers, ``fault`` is called with each intervention before it is scored."""

    def hook() -> None:
        from laserlm.searching.desk import Bench

        score = Bench.score

        def scored(self: Any, intervention: Any, start: int, stop: int) -> Any:
            if fault is not None:
                fault(str(intervention))
            return score(self, intervention, start, stop)

        Bench.score = scored  # type: ignore[method-assign]

    given: dict[str, Any] = {"runtime_env": {"worker_process_setup_hook": hook}} if fault else {}
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR", **given)
    try:
        yield
    finally:
        ray.shutdown()


def scores(store: Path, found: Found) -> Scores:
    with Store.open(store) as results:
        return {
            (split, text): evaluation
            for split in ("validation", "test")
            for text, evaluation in results.evaluations(found.run, split).items()
        }


def same(ours: Scores, theirs: Scores) -> None:
    assert ours.keys() == theirs.keys()
    for key, evaluation in ours.items():
        other = theirs[key]
        assert [s.id for s in evaluation.scores] == [s.id for s in other.scores]
        assert [s.correct for s in evaluation.scores] == [s.correct for s in other.scores]
        assert [s.logprob for s in evaluation.scores] == pytest.approx([s.logprob for s in other.scores], rel=1e-5, abs=1e-5)


def search(lm: LanguageModel, task: Task, store: Path, **given: Any) -> Scored:
    found = search_(lm, task, metric="loss", store=store, **given)
    return found, scores(store, found)


@pytest.fixture
def local(lm: LanguageModel, task: Task, tmp_path: Path) -> Scored:
    """What the exhaustive search finds in this process."""
    return search(lm, task, tmp_path / "local.db", **GIVEN["exhaustive"])


@pytest.fixture
def on_cluster(cluster: Any, lm: LanguageModel, task: Task, tmp_path: Path) -> Callable[..., Scored]:
    """Make the exhaustive search on the cluster, with a fault."""

    def run(fault: Fault | None, workers: int = 2, **given: Any) -> Scored:
        with connected(cluster, fault):
            return search(lm, task, tmp_path / "ray.db", executor=Ray(workers=workers), **GIVEN["exhaustive"], **given)

    return run


@pytest.fixture
def once(tmp_path: Path) -> Callable[[str], bool]:
    """Tell whether nobody asked for this name before, in whatever process."""

    def first(name: str) -> bool:
        try:
            os.close(os.open(tmp_path / name, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        return True

    return first


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_the_winner_and_every_score_are_those_of_one_process(
    workers: int, cluster: Any, lm: LanguageModel, task: Task, tmp_path: Path
) -> None:
    with connected(cluster):
        for name, given in GIVEN.items():
            alone, expected = search(lm, task, tmp_path / f"{name}-local.db", **given)
            found, ours = search(lm, task, tmp_path / f"{name}-ray.db", executor=Ray(workers=workers), **given)
            assert (found.best, found.failed, found.complete) == (alone.best, {}, True)
            assert found.rungs == alone.rungs
            same(ours, expected)
            assert found.boundary_bytes > 0
            assert found.decomposition_bytes > 0


def test_what_the_model_writes_and_choices_of_several_rows_are_the_same(
    cluster: Any, lm: LanguageModel, task: Task, tmp_path: Path
) -> None:
    cities = ("Paris", "Rome", "Oslo", "Lisbon", "Madrid")
    chosen = Task.of("chosen", [replace(e, choices=cities) for e in task.every], scorer="choice")
    written = Task.of("written", list(task.every), scorer="contains", decoding=Decoding(new_tokens=3))
    given: dict[str, Any] = {"grid": "0-2.mlp@0.5", "options": RaceOptions(width=4, first=3)}
    with connected(cluster):
        for made in (chosen, written):
            alone, expected = search(lm, made, tmp_path / f"{made.name}-local.db", **given)
            found, ours = search(lm, made, tmp_path / f"{made.name}-ray.db", executor=Ray(workers=2), **given)
            assert (found.best, found.finalists) == (alone.best, alone.finalists)
            same(ours, expected)
            assert {k: v.scores[0].predicted for k, v in ours.items()} == {
                k: v.scores[0].predicted for k, v in expected.items()
            }


def test_a_search_goes_on_with_another_executor(
    cluster: Any, lm: LanguageModel, task: Task, tmp_path: Path, local: Scored
) -> None:
    steps: list[str] = []

    def stop_at_five(step: Any) -> None:
        steps.append(step.last)
        if len(steps) == 5:
            raise KeyboardInterrupt

    store = tmp_path / "ray.db"
    with connected(cluster):
        with pytest.raises(KeyboardInterrupt):
            search(lm, task, store, executor=Ray(workers=2), on_step=stop_at_five, **GIVEN["exhaustive"])
        deadline = time.monotonic() + 30
        while ray.available_resources().get("CPU") != 4 and time.monotonic() < deadline:
            time.sleep(0.2)
        assert ray.available_resources()["CPU"] == 4
    found, ours = search(lm, task, store, **GIVEN["exhaustive"])
    assert found.best == local[0].best
    same(ours, local[1])


def test_a_killed_worker_loses_nothing(on_cluster: Any, local: Scored, tmp_path: Path, once: Callable[[str], bool]) -> None:
    def kill(text: str) -> None:
        if text == "1.fc_up@0.3" and once("killed"):
            os.kill(os.getpid(), signal.SIGKILL)

    found, ours = on_cluster(kill)
    assert (tmp_path / "killed").exists()
    assert (found.best, found.failed) == (local[0].best, {})
    same(ours, local[1])


def test_what_ends_every_worker_is_given_up_with_its_reason_and_the_rest_goes_on(
    on_cluster: Any, local: Scored, tmp_path: Path
) -> None:
    def poison(text: str) -> None:
        if text == "1.fc_up@0.3":
            with (tmp_path / "met").open("a") as file:
                file.write(f"{os.getpid()}\n")
            os.kill(os.getpid(), signal.SIGKILL)

    found, ours = on_cluster(poison)
    assert len(set((tmp_path / "met").read_text().split())) == 3
    assert list(found.failed) == ["1.fc_up@0.3"]
    assert found.failed["1.fc_up@0.3"].startswith("3 workers ended at it; the last because")
    with Store.open(tmp_path / "ray.db") as store:
        (failed,) = [t for t in store.trials(found.run) if t.status == "failed"]
        assert failed.reason == found.failed["1.fc_up@0.3"]
    same(ours, {key: e for key, e in local[1].items() if key != ("validation", "1.fc_up@0.3")})


def test_a_worker_out_of_memory_is_replaced(
    on_cluster: Any, local: Scored, tmp_path: Path, once: Callable[[str], bool]
) -> None:
    def fill(text: str) -> None:
        if text == "1.fc_up@0.3" and once("filled"):
            torch.empty(2**55)

    found, ours = on_cluster(fill)
    assert (tmp_path / "filled").exists()
    assert found.failed == {}
    same(ours, local[1])


def test_a_worker_that_its_node_has_no_memory_for_is_replaced(
    cluster: Any, lm: LanguageModel, task: Task, tmp_path: Path, local: Scored, once: Callable[[str], bool]
) -> None:
    from ray.cluster_utils import Cluster

    psutil = pytest.importorskip("psutil")
    memory = psutil.virtual_memory()
    if memory.available < 10 * 2**30:
        pytest.skip("less than 10 GiB of memory are free")
    # Ray's own monitor ends a worker that takes 5 GiB where there are 3 to spare.
    threshold = (memory.total - memory.available + 3 * 2**30) / memory.total
    system = {"memory_usage_threshold": threshold, "memory_monitor_refresh_ms": 100}
    own = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False, "_system_config": system})

    def fill(text: str) -> None:
        if text == "1.fc_up@0.3" and once("filled"):
            taken = bytearray(b"1") * (5 * 2**30)
            time.sleep(60)
            del taken

    try:
        with connected(own, fill):
            found, ours = search(lm, task, tmp_path / "ray.db", executor=Ray(workers=2), **GIVEN["exhaustive"])
    finally:
        own.shutdown()
    assert (tmp_path / "filled").exists()
    assert found.failed == {}
    same(ours, local[1])


def test_a_worker_whose_batch_does_not_fit_halves_it_and_the_run_keeps_that(
    cluster: Any, lm: LanguageModel, task: Task, tmp_path: Path, local: Scored
) -> None:
    def hook() -> None:
        from laserlm.searching.frontier import Frontier

        run = Frontier.run

        def tight(self: Any) -> Any:
            if max(len(b.rows) for b in self._batches) > 2:
                raise torch.OutOfMemoryError("no room")
            return run(self)

        Frontier.run = tight  # type: ignore[method-assign]

    ray.init(address=cluster.address, log_to_driver=False, runtime_env={"worker_process_setup_hook": hook})
    try:
        given = {**GIVEN["exhaustive"], "batch_size": 7}
        found, ours = search(lm, task, tmp_path / "ray.db", executor=Ray(workers=2), **given)
    finally:
        ray.shutdown()
    assert found.failed == {}
    same(ours, local[1])
    with Store.open(tmp_path / "ray.db") as store:
        assert store.notes(found.run)["batch_size"] in (1, 3)


def test_a_slow_workers_pieces_are_given_to_others(
    on_cluster: Any, local: Scored, tmp_path: Path, once: Callable[[str], bool]
) -> None:
    def slow(text: str) -> None:
        if text == "1.fc_up@0.3" and once("slow"):
            (tmp_path / "slow").write_text(str(time.time()))
            time.sleep(120)

    found, ours = on_cluster(slow)
    assert time.time() - float((tmp_path / "slow").read_text()) < 60
    assert found.failed == {}
    same(ours, local[1])


def test_a_node_that_goes_takes_nothing_with_it_and_one_that_comes_is_used(
    cluster: Any, lm: LanguageModel, task: Task, tmp_path: Path, local: Scored
) -> None:
    from ray.cluster_utils import Cluster

    own = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    nodes = [own.add_node(num_cpus=1), own.add_node(num_cpus=1)]
    scored = tmp_path / "scored"

    def tell(text: str) -> None:
        with scored.open("a") as file:
            file.write(f"{ray.get_runtime_context().get_node_id()} {text}\n")
        time.sleep(0.2)

    gone: list[str] = []

    def on_step(step: Any) -> None:
        lines = [line.split() for line in scored.read_text().splitlines()] if scored.exists() else []
        busy = {line[0] for line in lines}
        if not gone and len(busy) == 2:
            gone.append(nodes[0].node_id)
            own.remove_node(nodes[0])
            own.add_node(num_cpus=1)

    try:
        with connected(own, tell):
            found, ours = search(lm, task, tmp_path / "ray.db", executor=Ray(workers=2), on_step=on_step, **GIVEN["exhaustive"])
    finally:
        own.shutdown()
    where = [line.split()[0] for line in scored.read_text().splitlines()]
    assert gone
    assert gone[0] in where
    assert found.failed == {}
    same(ours, local[1])


DRIVER = """
import json, sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from test_cluster import GIVEN, made_task
from laserlm.models import load
from laserlm.searching import Ray, search

lm = load({folder!r}, cache={cache!r}, device="cpu")
found = search(
    lm, made_task(), metric="loss", store={store!r}, executor=Ray({address!r}, workers=2), **GIVEN["exhaustive"],
    on_step=lambda step: print(step.last, flush=True),
)
print(json.dumps(found.as_dict()))
"""


def test_a_killed_driver_goes_on_where_it_was(cluster: Any, folder: Path, tmp_path: Path, local: Scored) -> None:
    store = tmp_path / "ray.db"
    names = {"tests": str(Path(__file__).parent), "folder": str(folder), "cache": str(tmp_path / "cache"), "store": str(store)}
    script = tmp_path / "driver.py"
    script.write_text(DRIVER.format(address=cluster.address, **names))
    paths = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths}
    first = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True, env=environment)
    assert first.stdout is not None
    for _ in range(8):
        assert first.stdout.readline()
    first.kill()
    first.communicate()
    with Store.open(store) as results:
        (run,) = results.runs()
        before = results.evaluations(run.id, "validation")
        assert run.status == "interrupted"
    second = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment, check=False)
    assert second.returncode == 0, second.stderr
    *steps, said = second.stdout.splitlines()
    found = Found.from_dict(json.loads(said))
    assert found.run == run.id
    ours = scores(store, found)
    assert {text: ours["validation", text] for text in before} == before
    assert not set(steps) & (set(before) - {"", str(found.best)})
    same(ours, local[1])


def test_idle_workers_that_end_are_not_blamed_on_what_they_are_given_next(
    cluster: Any, lm: LanguageModel, task: Task, tmp_path: Path, once: Callable[[str], bool]
) -> None:
    def end_all_others(text: str) -> None:
        (tmp_path / f"{os.getpid()}.worker").touch()
        if "1.fc_up@0.3" in text and once("ended"):
            for file in tmp_path.glob("*.worker"):
                if int(file.stem) != os.getpid():
                    os.kill(int(file.stem), signal.SIGKILL)

    given: dict[str, Any] = {"strategy": "compose", "mode": "greedy", "grid": "1.fc_up@0.3+0-2.fc_in@0.5,0.3"}
    _, expected = search(lm, task, tmp_path / "local.db", **given)
    with connected(cluster, end_all_others):
        found, ours = search(lm, task, tmp_path / "ray.db", executor=Ray(workers=4), **given)
    assert (tmp_path / "ended").exists()
    assert found.failed == {}
    same(ours, expected)


def test_an_unchanged_model_that_ends_every_worker_is_told_and_can_go_on(
    on_cluster: Any, lm: LanguageModel, task: Task, tmp_path: Path, local: Scored
) -> None:
    def poison(text: str) -> None:
        if not text:
            os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(ScoringError, match=r"the unchanged model could not be scored on test: 3 workers ended at it.*goes on"):
        on_cluster(poison)
    _, ours = search(lm, task, tmp_path / "ray.db", **GIVEN["exhaustive"])
    same(ours, local[1])


def test_out_of_time_the_best_so_far_is_measured(cluster: Any, lm: LanguageModel, task: Task, tmp_path: Path) -> None:
    with connected(cluster, lambda text: time.sleep(1)):
        found, _ = search(lm, task, tmp_path / "ray.db", executor=Ray(workers=2), budget=0.2, **GIVEN["exhaustive"])
    assert not found.complete
    assert found.test.n == len(task.test)


def test_an_error_in_a_worker_ends_the_search_as_it_is(on_cluster: Any) -> None:
    def broken(text: str) -> None:
        if text == "1.fc_up@0.3":
            raise ZeroDivisionError("a defect")

    with pytest.raises(ZeroDivisionError, match="a defect"):
        on_cluster(broken)


def test_other_weights_than_the_searched_ones_are_refused(
    cluster: Any, lm: LanguageModel, task: Task, folder: Path, tmp_path: Path
) -> None:
    with torch.no_grad():
        next(iter(lm.model.parameters())).add_(1)
    with connected(cluster), pytest.raises(ModelError, match="has other weights than where the search was started"):
        search(lm, task, tmp_path / "ray.db", executor=Ray(workers=1), **GIVEN["exhaustive"])


def test_without_an_address_a_cluster_is_started_and_ended(
    lm: LanguageModel, task: Task, tmp_path: Path, local: Scored
) -> None:
    assert not ray.is_initialized()
    found, ours = search(lm, task, tmp_path / "ray.db", executor=Ray(workers=2), **GIVEN["exhaustive"])
    assert not ray.is_initialized()
    same(ours, local[1])
    with Store.open(tmp_path / "ray.db") as store:
        assert store.find(found.run).provenance["ray"] == {"address": None, "workers": 2, "cpus": 1.0, "gpus": 0.0}


def test_what_cannot_be_done_is_told(
    cluster: Any, llama: LanguageModel, lm: LanguageModel, task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for given, message in (({"workers": 0}, "0 workers"), ({"cpus": 0}, "some of a CPU"), ({"address": "ray://x:1"}, "client")):
        with pytest.raises(ScoringError, match=message):
            Ray(**given)
    with pytest.raises(ModelError, match="was made in this process"):
        search(llama, task, tmp_path / "a.db", executor=Ray(), **GIVEN["exhaustive"])
    with connected(cluster), pytest.raises(ScoringError, match="4 CPU, 0 GPU are all there is in the cluster; ask for less"):
        search(lm, task, tmp_path / "a.db", executor=Ray(gpus=1), **GIVEN["exhaustive"])
    with pytest.raises(ScoringError, match="a worker needs 1 CPU, 2 GPU on one machine"):
        search(lm, task, tmp_path / "a.db", executor=Ray(workers=1, gpus=2), **GIVEN["exhaustive"])
    os.environ.pop("RAY_ADDRESS", None)
    with pytest.raises(ScoringError, match=r"no Ray cluster at 127\.0\.0\.1:1"):
        search(lm, task, tmp_path / "a.db", executor=Ray("127.0.0.1:1"), **GIVEN["exhaustive"])
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError, match=r"laserlm\[cluster\]"):
        search(lm, task, tmp_path / "a.db", executor=Ray(), **GIVEN["exhaustive"])
