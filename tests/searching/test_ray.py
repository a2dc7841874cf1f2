"""A search on a real Ray cluster on this machine, and that the stand-in for Ray behaves as Ray does."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from searching.fake_ray import FakeRay, here
from searching.support import GIVEN, Scored, same, scores, search

from laserlm.models import LanguageModel
from laserlm.searching import Ray, SearchResult
from laserlm.searching.config import OF_COMPONENTS
from laserlm.store import Store
from laserlm.tasks import Decoding, Task

pytestmark = [
    pytest.mark.ray,
    pytest.mark.skipif(not importlib.util.find_spec("ray"), reason="a cluster needs Ray: pip install 'laserlm[cluster]'"),
    # Ray leaves its log files to the garbage collector, and uses what Python is about to change.
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A Ray cluster: a head that no worker fits on, and a node with four CPUs."""
    import ray
    from ray.cluster_utils import Cluster

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    cluster.add_node(num_cpus=4)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@contextmanager
def connected(cluster: Any, **options: Any) -> Iterator[Any]:
    import ray

    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR", **options)
    try:
        yield ray
    finally:
        ray.shutdown()


def behaviour(ray: Any, die: Callable[[], None]) -> dict[str, Any]:  # noqa: C901 - one script that Ray and its stand-in both run
    """Return what Ray, or its stand-in, does in the calls that a search makes; four CPUs have to be free."""

    class Actor:
        def __init__(self) -> None:
            self.messages: list[Any] = []

        def keep(self, shared: list[int], value: Any) -> tuple[list[int], Any]:
            shared.append(len(self.messages))
            self.messages.append(value)
            return shared, self.messages

        def fail(self) -> None:
            raise ZeroDivisionError("a defect")

        def end(self) -> None:
            die()

        def count(self, to: int, then: str) -> Iterator[list[Any]]:
            import time

            for i in range(to):
                yield [i]
            if then == "fail":
                raise ZeroDivisionError("a defect")
            if then == "end":
                time.sleep(0.5)  # what was yielded is on its way
                die()
            while then == "hear" and not self.messages:
                time.sleep(0.01)

        def hear(self, value: Any) -> None:
            self.messages.append(value)

    def error_of(ref: Any) -> tuple[str, str, str] | None:
        try:
            ray.get(ref)
        except ray.exceptions.RayError as error:
            cause = getattr(error, "cause", None)
            values = isinstance(cause, BaseException)
            return ("raised", type(cause).__name__, str(cause)) if values else ("ended", "", "")
        return None

    def first_error_of(call: Callable[[], Any]) -> tuple[str, str, str] | None:
        """Ray ends an actor some time after it is asked to: a call may still come through."""
        for _ in range(600):
            if error := error_of(call()):
                return error
            time.sleep(0.1)
        return None

    def all_of(stream: Any) -> list[Any]:
        replies: list[Any] = []
        for ref in stream:
            error = error_of(ref)
            replies.append(error or ray.get(ref))
        return replies

    make = ray.remote(num_cpus=1, num_gpus=0, max_restarts=0, max_task_retries=0, concurrency_groups={"control": 1})(Actor)
    by_name: dict[str, Any] = {"connected": ray.is_initialized()}
    shared, sent = ray.put([7]), [1]
    actor = make.remote()
    by_name["values are copies"] = [ray.get(actor.keep.remote(shared, sent)), ray.get(shared), sent]
    sent.append(2)
    by_name["calls come in order"] = [ray.get(actor.keep.remote(shared, n)) for n in (3, 4)]
    by_name["an error"] = error_of(actor.fail.remote())
    count = actor.count.options(num_returns="streaming")
    by_name["a stream"] = [all_of(count.remote(3, "")), all_of(count.remote(0, ""))]
    by_name["a stream with an error"] = all_of(count.remote(2, "fail"))

    other = make.remote()
    stream = other.count.options(num_returns="streaming").remote(1, "hear")
    there, rest = ray.wait([stream], timeout=60, fetch_local=False)
    by_name["something has come"] = [there == [stream], rest, stream.next_ready()]
    by_name["it is the first"] = ray.get(next(stream))
    there, rest = ray.wait([stream], num_returns=1, timeout=0, fetch_local=False)
    by_name["nothing more has come"] = [there, rest == [stream], stream.next_ready()]
    waits = actor.hear.remote(1)
    by_name["one of two"] = [x == [waits] for x in ray.wait([stream, waits], timeout=60, fetch_local=False)]
    other.hear.options(concurrency_group="control").remote("stop")
    there, _ = ray.wait([stream], timeout=60, fetch_local=False)
    by_name["it was heard"] = [there == [stream], stream.next_ready(), next(stream, "over")]

    stream = other.count.options(num_returns="streaming").remote(2, "end")
    by_name["a stream that ends with its worker"] = all_of(stream)
    by_name["a call to one that has ended"] = error_of(other.hear.remote(1))
    by_name["an end in a call"] = error_of(make.remote().end.remote())

    ray.kill(actor)
    by_name["a killed one"] = first_error_of(lambda: actor.hear.remote(1))
    every = [make.remote() for _ in range(5)]
    calls = {one.keep.remote(shared, i): one for i, one in enumerate(every)}
    there, rest = ray.wait(list(calls), num_returns=4, timeout=60, fetch_local=False)
    by_name["room"] = [len(there), len(rest), ray.wait(rest, timeout=1, fetch_local=False)[0]]
    ray.kill(calls[there[0]])
    by_name["room after an end"] = ray.wait(rest, timeout=60, fetch_local=False)[0] == rest
    for one in every:
        ray.kill(one)
    # Last, for Ray may cancel an actor that starts after an object that it could not send.
    try:
        ray.put(threading.Lock())
    except TypeError:
        by_name["what cannot be sent"] = "TypeError"
    by_name["no source"] = ray.wait([], timeout=0, fetch_local=False)
    by_name["CPUs"] = [ray.cluster_resources()["CPU"], sorted(n["Resources"].get("CPU", 0) for n in ray.nodes() if n["Alive"])]
    return by_name


def behaviour_of(cluster: Any, die: Callable[[], None]) -> dict[str, Any]:
    """Return what Ray does; a busy machine may end an actor of a test before it has started."""
    reasons: list[str] = []
    for _ in range(5):
        with connected(cluster) as ray:
            try:
                return behaviour(ray, die)
            except ray.exceptions.RayActorError as error:
                reasons.append(str(error))
        time.sleep(5)
    pytest.xfail(f"Ray ended actors of this test in each of {len(reasons)} attempts: {reasons}")


def test_the_stand_in_behaves_as_ray_does(cluster: Any) -> None:
    # The first test: where other clusters started and ended on the machine, Ray may cancel an actor before it has started.
    def killed() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def ended() -> None:
        from searching.fake_ray import die

        assert here() is not None
        die()

    real = behaviour_of(cluster, killed)
    fake = FakeRay(0, 4)
    fake.init(address="auto")
    try:
        assert behaviour(fake, ended) == real
    finally:
        fake.close()
    assert not fake.is_initialized()
    assert real["a stream that ends with its worker"] == [[0], [1], ("ended", "", "")]


def test_the_winner_and_every_score_are_those_of_one_process(
    cluster: Any, lm: LanguageModel, task: Task, tmp_path: Path, alone: dict[str, Scored]
) -> None:
    with connected(cluster):
        for name, options in GIVEN.items():
            expected, scored = alone[name]
            result, ours = search(lm, task, tmp_path / f"{name}.db", executor=Ray(workers=2), **options)
            assert (result.best, result.failed, result.complete) == (expected.best, {}, True)
            assert result.rungs == expected.rungs
            assert [p.intervention for p in result.points] == [p.intervention for p in expected.points]
            assert result.points or name not in OF_COMPONENTS
            for harm, of_one in zip(result.harms, expected.harms, strict=True):
                assert harm.change == pytest.approx(of_one.change, abs=1e-5)
            same(ours, scored)
        cities = ("Paris", "Rome", "Oslo", "Lisbon", "Madrid")
        rows = [replace(e, choices=cities) for e in task.every]
        questions = Task.of("written", rows, scorer="contains", decoding=Decoding(new_tokens=3))
        options = {"grid": "0-2.mlp@0.5", "candidates": 4, "first_rung": 3}
        expected, scored = search(lm, questions, tmp_path / "local.db", **options)
        result, ours = search(lm, questions, tmp_path / "written.db", executor=Ray(workers=2), **options)
    assert (result.best, result.finalists) == (expected.best, expected.finalists)
    same(ours, scored)
    assert {k: v.scores[0].predicted for k, v in ours.items()} == {k: v.scores[0].predicted for k, v in scored.items()}


def test_a_killed_worker_loses_nothing(cluster: Any, lm: LanguageModel, task: Task, tmp_path: Path, local: Scored) -> None:
    killed = tmp_path / "killed"

    def hook() -> None:
        """In a worker: end it where it runs the model under an intervention, unless another one ended there before."""
        import laserlm.models

        load = laserlm.models.load

        def loaded(*arguments: Any, **options: Any) -> LanguageModel:
            lm = load(*arguments, **options)

            def kill(*_: Any) -> None:
                if lm.intervention == "1.fc_up@0.3" and not killed.exists():
                    killed.touch()
                    os.kill(os.getpid(), signal.SIGKILL)

            lm.model.register_forward_pre_hook(kill)
            return lm

        laserlm.models.load = loaded

    with connected(cluster, runtime_env={"worker_process_setup_hook": hook}):
        result, ours = search(lm, task, tmp_path / "ray.db", executor=Ray(workers=2), **GIVEN["exhaustive"])
    assert killed.exists()
    assert (result.best, result.failed) == (local[0].best, {})
    same(ours, local[1])


DRIVER = """
import json, sys
sys.path.insert(0, {tests!r})
from searching.support import GIVEN, build_task
from laserlm.models import load
from laserlm.searching import Ray, search

lm = load({folder!r}, cache={cache!r}, device="cpu")
result = search(
    lm, build_task(), metric="loss", store={store!r}, executor=Ray({address!r}, workers=2), **GIVEN["exhaustive"],
    on_step=lambda step: print("" if step.stage == "harm" else step.last, flush=True),  # a guard scores them again
)
print(json.dumps(result.as_dict()))
"""


def test_a_killed_driver_goes_on_where_it_was(cluster: Any, folder: Path, tmp_path: Path, local: Scored) -> None:
    store = tmp_path / "ray.db"
    names = {"folder": str(folder), "cache": str(tmp_path / "cache"), "store": str(store)}
    script = tmp_path / "driver.py"
    script.write_text(DRIVER.format(tests=str(Path(__file__).parents[1]), address=cluster.address, **names))
    first = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True)
    assert first.stdout is not None
    for _ in range(6):
        assert first.stdout.readline()
    first.kill()
    first.communicate()
    with Store.open(store) as results:
        (run,) = results.runs()
        before = results.evaluations(run.id, "validation")
        assert run.status == "interrupted"
    second = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert second.returncode == 0, second.stderr
    *steps, last = second.stdout.splitlines()
    values = SearchResult.from_dict(json.loads(last))
    assert values.run == run.id
    ours = scores(store, values)
    assert {text: ours["validation", text] for text in before} == before
    assert not set(steps) & (set(before) - {"", str(values.best)})
    same(ours, local[1])


def test_without_an_address_a_cluster_is_started_and_ended(
    lm: LanguageModel, task: Task, tmp_path: Path, local: Scored
) -> None:
    import ray

    assert not ray.is_initialized()
    result, ours = search(lm, task, tmp_path / "ray.db", executor=Ray(workers=2), **GIVEN["exhaustive"])
    assert not ray.is_initialized()
    same(ours, local[1])
    with Store.open(tmp_path / "ray.db") as store:
        assert store.find(result.run).provenance["ray"] == {"address": None, "workers": 2, "cpus": 1.0, "gpus": None}
