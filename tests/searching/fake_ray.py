"""A stand-in for the part of Ray that a search uses: its workers are threads of this process.

What goes from one to the other is pickled, so nobody sees what another one changes, and what cannot be sent is noticed. A
worker that ends, as ``SIGKILL`` ends a process, loses all that it had in hand. Its thread cannot be ended from outside: what
it still computes is thrown away, and it leaves at the next value that it gives out.
"""

from __future__ import annotations

import os
import pickle
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

_this_thread = threading.local()
_loading = threading.Lock()


class RayError(Exception):
    """As in Ray: what went wrong in a worker, or with it."""


class ActorDiedError(RayError):
    """As in Ray: the worker has ended."""


class OutOfMemoryError(RayError):
    """As in Ray: the worker was ended because its node had no memory left."""


class RayTaskError(RayError):
    """As in Ray: a worker raised ``cause``."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(f"{type(cause).__name__}: {cause}")
        self.cause = cause


class _Ended(BaseException):
    """Leaves the thread of a worker that has ended."""


class Ref:
    """The value that a call returns, or the error that it ends with, as soon as it is there."""

    def __init__(self, news: threading.Condition) -> None:
        self.ready = False
        self._news = news
        self._sent = b""
        self._error: RayError | None = None

    def give(self, sent: bytes) -> None:
        self.ready, self._sent = True, sent

    def fail(self, error: RayError) -> None:
        self.ready, self._error = True, error

    def get(self) -> Any:
        with self._news:
            self._news.wait_for(lambda: self.ready)
        if self._error is not None:
            raise self._error
        return pickle.loads(self._sent)


class Stream:
    """References to the values that a call yields; an error comes as the last of them."""

    def __init__(self, news: threading.Condition) -> None:
        self.over = False
        self._news = news
        self._refs: deque[Ref] = deque()

    @property
    def ready(self) -> bool:
        return self.over or bool(self._refs)

    def give(self, sent: bytes) -> None:
        self._refs.append(Ref(self._news))
        self._refs[-1].give(sent)

    def fail(self, error: RayError) -> None:
        self._refs.append(Ref(self._news))
        self._refs[-1].fail(error)
        self.over = True

    def next_ready(self) -> bool:
        with self._news:
            return bool(self._refs)

    def __iter__(self) -> Iterator[Ref]:
        return self

    def __next__(self) -> Ref:
        with self._news:
            self._news.wait_for(lambda: self.ready)
            if not self._refs:
                raise StopIteration
            return self._refs.popleft()


Call = tuple[str, list[Any], Ref | Stream]
"""Name of a method, what it is given, and what comes of it."""


class Node:
    """A machine of the cluster."""

    def __init__(self, cpus: float, gpus: float = 0) -> None:
        self.alive, self.cpus, self.free = True, cpus, cpus
        self.gpus = self.free_gpus = gpus


class Worker:
    """An actor: what Ray runs as a process.

    Attributes:
        node: where it runs; None until there is room for it.
        ended: is set when it ends.
    """

    def __init__(self, ray: FakeRay, make: Callable[[], Any], cpus: float, gpus: float, groups: list[str]) -> None:
        self.ray, self.cpus, self.gpus = ray, cpus, gpus
        self.node: Node | None = None
        self.ended = threading.Event()
        self.error: RayError = ActorDiedError("the worker has ended")
        self.threads: list[threading.Thread] = []
        self._make = make
        self._lock = threading.Lock()
        self._instance: Any = None
        self._calls: dict[str, deque[Call]] = {group: deque() for group in groups}
        self._open: list[Ref | Stream] = []

    def start(self, node: Node) -> None:
        self.node = node
        node.free -= self.cpus
        node.free_gpus -= self.gpus
        self.threads = [threading.Thread(target=self._work, args=(calls,), daemon=True) for calls in self._calls.values()]
        for thread in self.threads:
            thread.start()

    def call(self, name: str, group: str, streaming: bool, arguments: tuple[Any, ...]) -> Ref | Stream:
        sent = [one if isinstance(one, Ref) else pickle.dumps(one) for one in arguments]
        with self.ray.news:
            result = Stream(self.ray.news) if streaming else Ref(self.ray.news)
            if self.ended.is_set():
                result.fail(self.error)
            else:
                self._open.append(result)
                self._calls[group].append((name, sent, result))
            self.ray.news.notify_all()
        return result

    def end(self, error: RayError | None = None) -> None:
        """End it at once: all that it has in hand is lost."""
        with self.ray.news:
            if self.ended.is_set():
                return
            self.ended.set()
            self.error = error or self.error
            for result in self._open:
                result.fail(self.error)
            if self.node is not None:
                self.node.free += self.cpus
                self.node.free_gpus += self.gpus
            self.ray.place()
            self.ray.news.notify_all()

    def _work(self, calls: deque[Call]) -> None:
        _this_thread.worker = self
        while True:
            with self.ray.news:
                self.ray.news.wait_for(lambda: calls or self.ended.is_set())
                if self.ended.is_set():
                    return
                name, sent, result = calls.popleft()
            try:
                self._do(name, sent, result)
            except _Ended:
                return

    def _do(self, name: str, sent: list[Any], results: Ref | Stream) -> None:
        with self._lock:
            self._instance = self._instance or self._make()
        arguments = [one.get() if isinstance(one, Ref) else pickle.loads(one) for one in sent]
        try:
            result = getattr(self._instance, name)(*arguments)
            if isinstance(results, Ref):
                self._tell(results, partial(results.give, pickle.dumps(result)))
                return
            for value in result:
                self._tell(results, partial(results.give, pickle.dumps(value)), last=False)
            self._tell(results, partial(setattr, results, "over", True))
        except Exception as error:  # noqa: BLE001 - whatever it is, the driver is told
            self._tell(results, partial(results.fail, RayTaskError(pickle.loads(pickle.dumps(error)))))

    def _tell(self, results: Ref | Stream, do: Callable[[], None], *, last: bool = True) -> None:
        """Hand something on to the driver, unless this worker has ended."""
        with self.ray.news:
            if self.ended.is_set():
                raise _Ended
            do()
            if last:
                self._open.remove(results)
            self.ray.news.notify_all()


class Handle:
    """What the driver holds of a worker: its methods have ``remote`` and ``options``."""

    def __init__(self, worker: Worker, group: str) -> None:
        self.worker, self._group = worker, group

    def __getattr__(self, name: str) -> Any:
        def method(group: str, streaming: bool) -> Any:
            def options(*, concurrency_group: str = group, num_returns: Any = 1) -> Any:
                return method(concurrency_group, num_returns == "streaming")

            remote = lambda *arguments: self.worker.call(name, group, streaming, arguments)  # noqa: E731
            return SimpleNamespace(remote=remote, options=options)

        return method(self._group, False)


class FakeRay:
    """What ``import ray`` gives a test: a cluster of nodes with so many CPUs each, or none until one is started.

    Attributes:
        news: notified of all that changes.
        workers: all that there ever were.
    """

    exceptions = SimpleNamespace(RayError=RayError)

    def __init__(self, *cpus: float) -> None:
        self.news = threading.Condition(threading.RLock())
        self.workers: list[Worker] = []
        self.machines = [Node(each) for each in cpus]
        self._connected = self._own = False

    def init(self, address: str | None = None, num_cpus: float | None = None, **_: Any) -> None:
        if address == "local":
            self._own, self.machines = True, [Node(num_cpus or 2)]
        elif not self.machines:
            raise ConnectionError("could not find any running Ray instance")
        self._connected = True

    def is_initialized(self) -> bool:
        return self._connected

    def shutdown(self) -> None:
        for worker in self.workers:
            worker.end()
        self.machines = [] if self._own else self.machines
        self._connected = self._own = False

    def nodes(self) -> list[dict[str, Any]]:
        return [
            {"Alive": node.alive, "Resources": {"CPU": node.cpus} | ({"GPU": node.gpus} if node.gpus else {})}
            for node in self.machines
        ]

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": sum(node.cpus for node in self.machines if node.alive)}

    def available_resources(self) -> dict[str, float]:
        return {"CPU": sum(node.free for node in self.machines if node.alive)}

    def put(self, value: Any) -> Ref:
        ref = Ref(self.news)
        ref.give(pickle.dumps(value))
        return ref

    def get(self, ref: Ref) -> Any:
        return ref.get()

    def wait(
        self, sources: list[Any], *, num_returns: int = 1, timeout: float | None = None, fetch_local: bool = True
    ) -> tuple[list[Any], list[Any]]:
        with self.news:
            self.news.wait_for(lambda: sum(source.ready for source in sources) >= num_returns, timeout)
            there = [source for source in sources if source.ready][:num_returns]
        return there, [source for source in sources if source not in there]

    def remote(self, *, num_cpus: float, num_gpus: float = 0, concurrency_groups: dict[str, int], **_: Any) -> Any:
        def built(cls: type) -> Any:
            def start() -> Handle:
                worker = Worker(self, cls, num_cpus, num_gpus, ["", *concurrency_groups])
                with self.news:
                    self.workers.append(worker)
                    self.place()
                return Handle(worker, "")

            return SimpleNamespace(remote=start)

        return built

    def kill(self, handle: Handle) -> None:
        handle.worker.end()

    def place(self) -> None:
        """Start workers for which there is room."""
        for worker in self.workers:
            free = [node for node in self.machines if node.alive and node.free >= worker.cpus]
            room = next((node for node in free if node.free_gpus + 1e-9 >= worker.gpus), None)
            if worker.node is None and room is not None and not worker.ended.is_set():
                worker.start(room)

    def add_node(self, cpus: float, gpus: float = 0) -> Node:
        with self.news:
            self.machines.append(Node(cpus, gpus))
            self.place()
            return self.machines[-1]

    def remove_node(self, node: Node) -> None:
        """Let a node go, and all that runs on it."""
        node.alive = False
        for worker in self.workers:
            if worker.node is node:
                worker.end()

    def close(self) -> None:
        """End all workers, and wait for their threads."""
        self.shutdown()
        for worker in self.workers:
            for thread in worker.threads:
                thread.join(60)
                assert not thread.is_alive()


def here() -> Worker | None:
    """Return the worker whose thread this is; None in the driver, and in a process of the real Ray."""
    return getattr(_this_thread, "worker", None)


def die(error: RayError | None = None) -> None:
    """End the worker that calls this, as ``SIGKILL`` ends a process, which it does in one of the real Ray."""
    worker = here()
    if worker is None:
        os.kill(os.getpid(), signal.SIGKILL)
    else:
        worker.end(error)
        raise _Ended


def hang() -> None:
    """Do nothing until this worker ends."""
    worker = here()
    assert worker is not None
    assert worker.ended.wait(60)
    raise _Ended


@contextmanager
def instead_of_ray(patch: pytest.MonkeyPatch, *cpus: float) -> Iterator[FakeRay]:
    """Let ``import ray`` find this for the rest of the test, and end its workers with the context; see ``FakeRay``."""
    import laserlm.models

    ray, threads, load = FakeRay(*cpus), torch.get_num_threads(), laserlm.models.load

    def in_turn(*arguments: Any, **options: Any) -> Any:
        # While a model is loaded, the whole process's standard error is caught.
        with _loading:
            return load(*arguments, **options)

    patch.setitem(sys.modules, "ray", ray)
    patch.setattr(laserlm.models, "load", in_turn)
    try:
        yield ray
    finally:
        ray.close()
        torch.set_num_threads(threads)
