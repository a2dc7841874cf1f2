"""A search on a Ray cluster: its workers do what the schedule gives them, and this process alone keeps the results.

Ray holds the cluster, places the workers and carries what is sent; https://docs.ray.io tells how to start one.
"""

from __future__ import annotations

import logging
import math
import os
import platform
import re
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import count
from pickle import PicklingError
from typing import TYPE_CHECKING, Any

import torch

from laserlm.errors import LaserError, MissingExtraError, ModelError, ScoringError
from laserlm.models.language_model import LanguageModel
from laserlm.out_of_memory import is_out_of_memory
from laserlm.searching.config import SearchConfig
from laserlm.searching.executors import IsCancelled, OutOfTimeError, Speculate
from laserlm.searching.hardware import hardware_of
from laserlm.searching.schedule import MAX_TRIES, Schedule
from laserlm.searching.scorer import BlockOrder, EncodedSplit, Failure, PrefixScorer
from laserlm.searching.work import OrderTask, WorkItem

if TYPE_CHECKING:
    from types import ModuleType

__all__ = ["Ray", "on_ray"]

log = logging.getLogger(__name__)
POLL_SECONDS = 0.2
"""Seconds after which an idle worker is asked again whether there is something to do."""
REMINDER_SECONDS = 60.0
"""Seconds between two warnings that no worker has a place."""
SIGN_OF_LIFE_SECONDS = 0.5
"""Seconds in which a sign of life reaches the driver."""
RETRY_SECONDS = 30.0
"""Seconds until another worker is tried in the place of one that could not start, while others work."""


@dataclass(frozen=True)
class Ray:
    """Which Ray cluster to search on, and with how many workers.

    Args:
        address: ``auto`` for the cluster that this machine is part of, ``HOST:PORT`` for the one that this head leads; None
            starts one on this machine, for this search.
        workers: processes that hold the model; None takes as many as there is room for.
        cpus: cores of each; a fraction lets several share one.
        gpus: GPUs of each; the model is spread over several. None gives each worker one if the cluster has GPUs, and a
            part of one if there are fewer GPUs than ``workers``.
    """

    address: str | None = None
    workers: int | None = None
    cpus: float = 1.0
    gpus: float | None = None

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 1:
            raise ScoringError(
                f"{self.workers} workers can do nothing; write 1 or more, or leave it out for all there is room for"
            )
        if self.cpus <= 0 or (self.gpus or 0) < 0:
            raise ScoringError(f"a worker needs some of a CPU, and no GPU or some; got cpus {self.cpus}, gpus {self.gpus}")
        if self.address is not None and self.address.startswith("ray://"):
            raise ScoringError(
                f"no search through {self.address}: Ray's client does not stream results; run the search on a node of the "
                "cluster, with --address auto"
            )

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON values."""
        return asdict(self)


class OtherWeightsError(ModelError):
    """Report a model that is not the one that is searched."""


class UnfitError(Exception):
    """Ends a worker whose process cannot go on, though another one may."""


@dataclass
class _Unit:
    """What a worker has in hand."""

    number: int
    items: list[WorkItem]
    stream: Any
    begun: bool = False
    stopped: bool = False


@dataclass(frozen=True)
class _Usage:
    """What a worker needed so far: see ``Executor``."""

    batch_size: int
    activation_bytes: int
    decomposition_bytes: int


@contextmanager
def on_ray(how: Ray, lm: LanguageModel, splits: Mapping[str, EncodedSplit], config: SearchConfig) -> Iterator[RayExecutor]:
    """Yield an executor whose workers end with the context, and so does the cluster where it was started for this.

    Raises:
        MissingExtraError: if Ray is not installed.
        ModelError: if workers cannot load the model by themselves.
        ScoringError: if the cluster cannot be reached, or has no room for a single worker.
    """
    ray = _ray()
    if lm.loaded is None:
        raise ModelError(
            f"{lm.name} was made in this process, where no worker can fetch it; save it with save_pretrained, in a folder that "
            "every node sees, and load it from there"
        )
    ours = not ray.is_initialized()
    if ours:
        _connect(ray, how)
    try:
        how = _with_gpus(ray, how)
        room = _room(ray, how)
        # A cluster of others may grow; this one will not.
        if room < 1 and (how.workers is None or (ours and how.address is None)):
            raise ScoringError(
                f"a worker needs {_needs(how)} on one machine, and {_shown(ray.cluster_resources())} are all there is in the "
                "cluster; ask for less"
            )
        executor = RayExecutor(ray, how, how.workers or room, lm, splits, config)
        try:
            yield executor
        finally:
            executor.close()
    finally:
        if ours:
            ray.shutdown()


class RayExecutor:
    """Give items of work to the workers, and replace those that end."""

    def __init__(
        self,
        ray: ModuleType,
        how: Ray,
        workers: int,
        lm: LanguageModel,
        splits: Mapping[str, EncodedSplit],
        config: SearchConfig,
    ) -> None:
        self.workers = workers
        self.batch_size = config.batch_size
        self.activation_bytes = 0
        self.decomposition_bytes = 0
        self.hardware: dict[str, Any] = {}  # of the first worker that is ready
        self._ray = ray
        self._how = how
        self._schedule = Schedule(workers)
        self._block_orders: dict[str, BlockOrder] = {}
        self._starting: dict[Any, Any] = {}  # by the reference that tells that a worker is ready
        self._later: list[float] = []  # when to try others
        self._ready: list[Any] = []
        self._units: dict[Any, _Unit] = {}
        self._numbers = count()
        self._failures = 0  # workers in a row that were never ready
        self._reminder = time.monotonic() + REMINDER_SECONDS
        needs: dict[str, Any] = {"num_cpus": how.cpus, "num_gpus": how.gpus, "max_restarts": 0, "max_task_retries": 0}
        # The second group lets a worker hear that it may stop while it works.
        self._actor = ray.remote(**needs, concurrency_groups={"beside": 1})(_Worker)
        place = {"device_map": "auto"} if (how.gpus or 0) > 1 else {"device": "cuda" if how.gpus else "cpu"}
        options = {"batch_size": config.batch_size, "memory": config.memory, "seed": config.seed}
        try:
            shared = ray.put(dict(splits))
        except (TypeError, AttributeError, PicklingError) as error:
            raise ScoringError(f"the task cannot be sent to other processes ({error}); search on this machine alone") from error
        self._set_up = ((lm.loaded or {}) | place, lm.name, lm.hash, shared, options, max(1, int(how.cpus)))
        for _ in range(workers):
            self._start()

    def close(self) -> None:
        """End the workers."""
        for worker in [*self._ready, *self._starting.values()]:
            self._ray.kill(worker)

    def block_order(self, split: str) -> BlockOrder:
        """Return the blocks in the order in which the model runs them.

        Raises:
            ScoringError: if the workers end at the first passes.
        """
        if split not in self._block_orders:
            ((_, result),) = self.run([OrderTask(split)], is_cancelled=lambda _: False)
            if isinstance(result, Failure):
                raise ScoringError(
                    f"the model cannot be run: {result.reason}; give workers more memory, or take a smaller --batch-size"
                )
            self._block_orders[split] = result
        return self._block_orders[split]

    def free(self, split: str) -> None:
        """Free the cached activations of a split that is not asked for again soon."""
        for worker in self._ready:
            worker.free.remote(split)

    def run(
        self,
        items: Sequence[WorkItem],
        *,
        is_cancelled: IsCancelled,
        deadline: float = math.inf,
        speculate: Speculate | None = None,
    ) -> Iterator[tuple[Any, Any]]:
        """Yield each item with its result; see ``Executor``.

        Raises:
            LaserError: what a worker raised.
        """
        schedule = self._schedule
        yield from schedule.want(items)
        answers: list[tuple[Any, Any]] = []
        while schedule.open or answers:
            late = time.monotonic() > deadline
            if not late:
                self._hand_out(is_cancelled, speculate)
            yield from answers  # recorded while the workers are at the next units already
            if late and schedule.open:
                schedule.want([])
                raise OutOfTimeError
            answers = self._listen() if schedule.open else []

    def _hand_out(self, is_cancelled: IsCancelled, speculate: Speculate | None) -> None:
        now = time.monotonic()
        while self._later and self._later[0] < now:
            self._later.pop(0)
            self._start()
        likely: list[Sequence[WorkItem]] = []

        def guess() -> Sequence[WorkItem]:
            if not likely:
                likely.append(speculate() if speculate else ())
            return likely[0]

        work = True
        for worker in self._ready:
            unit = self._units.get(worker)
            if unit is not None:
                if not unit.stopped and self._schedule.useless(worker):
                    unit.stopped = True
                    worker.stop.options(concurrency_group="beside").remote(unit.number)
            elif work:
                items = self._schedule.take(worker, now, is_cancelled, guess)
                work = bool(items)  # what there is not for one there is not for the next
                if items:
                    number = next(self._numbers)
                    pause = SIGN_OF_LIFE_SECONDS if self._schedule.suspected(items[0]) else 0.0
                    stream = worker.run.options(num_returns="streaming").remote(number, items, pause)
                    self._units[worker] = _Unit(number, items, stream)

    def _listen(self) -> list[tuple[Any, Any]]:
        """Wait for something to come, and return the answers in it that are wanted."""
        self._remind()
        sources = {**dict.fromkeys(self._starting), **{unit.stream: worker for worker, unit in self._units.items()}}
        # One is waited for, all that came are taken.
        self._ray.wait(list(sources), timeout=POLL_SECONDS, fetch_local=False)
        there, _ = self._ray.wait(list(sources), num_returns=len(sources), timeout=0, fetch_local=False)
        found: list[tuple[Any, Any]] = []
        for source in there:
            worker = sources[source]
            if worker is None:
                self._welcome(source)
                continue
            found += self._read(worker)
            while worker in self._units and source.next_ready():
                found += self._read(worker)
        return found

    def _welcome(self, ref: Any) -> None:
        """Take in a worker that is ready, or have another one tried later in place of one that never was."""
        worker = self._starting.pop(ref)
        try:
            hardware = self._ray.get(ref)
        except self._ray.exceptions.RayError as error:
            cause = _cause(error)
            if isinstance(cause, OtherWeightsError):
                raise cause from error
            self._failures += 1
            if not self._ready and (isinstance(cause, LaserError) or self._failures >= MAX_TRIES):
                if isinstance(cause, LaserError):
                    raise cause from error
                raise ScoringError(
                    f"{self._failures} workers in a row ended before they had the model: {_reason(cause)}; see that a node has "
                    "the memory for it, and laserlm as it is here"
                ) from error
            log.warning("a worker could not start, another one is tried: %s", _reason(cause))
            self._ray.kill(worker)
            self._later.append(time.monotonic() + (RETRY_SECONDS if self._ready else 0))
            return
        self._failures = 0
        self.hardware = self.hardware or hardware
        self._ready.append(worker)

    def _read(self, worker: Any) -> list[tuple[Any, Any]]:
        """Take the next answer of a worker, or that it has ended its unit or itself."""
        unit = self._units[worker]
        try:
            answer = self._ray.get(next(unit.stream))
        except StopIteration:
            del self._units[worker]
            self._schedule.finish(worker)
            return []
        except self._ray.exceptions.RayError as error:
            cause = _cause(error)
            if isinstance(cause, UnfitError | self._ray.exceptions.RayError):
                return self._replace(worker, _reason(cause))
            raise cause from error
        if answer is None:
            unit.begun = True
            return []
        index, result, usage = answer
        self.batch_size = min(self.batch_size, usage.batch_size)
        self.activation_bytes = max(self.activation_bytes, usage.activation_bytes)
        self.decomposition_bytes = max(self.decomposition_bytes, usage.decomposition_bytes)
        wanted = self._schedule.answer(worker, unit.items[index], result, time.monotonic())
        return [(unit.items[index], result)] if wanted else []

    def _replace(self, worker: Any, reason: str) -> list[tuple[Any, Any]]:
        """Start a worker in the place of one that ended; return what is given up because of that."""
        unit = self._units.pop(worker)
        self._ready.remove(worker)
        self._ray.kill(worker)
        self._start()
        gave_up = self._schedule.lose(worker, begun=unit.begun)
        if gave_up is None:
            log.warning("a worker ended, another one starts in its place: %s", reason)
            return []
        log.warning("%d workers ended at the same item, which is given up: %s", MAX_TRIES, reason)
        return [(gave_up, Failure(f"{MAX_TRIES} workers ended at it; the last because {reason}", of_workers=True))]

    def _start(self) -> None:
        worker = self._actor.remote()
        self._starting[worker.set_up.remote(*self._set_up)] = worker

    def _remind(self) -> None:
        """Say now and then that workers are waiting for a place."""
        if self._starting and time.monotonic() > self._reminder:
            self._reminder = time.monotonic() + REMINDER_SECONDS
            log.warning(
                "%d of %d workers are not ready; each needs %s, and %s are free in the cluster",
                len(self._starting),
                self.workers,
                _needs(self._how),
                _shown(self._ray.available_resources()),
            )


class _Worker:
    """A process of the cluster: it loads the model once, and does the units that it is given."""

    def __init__(self) -> None:
        self._scorer: PrefixScorer | None = None
        self._stopped = -1

    def set_up(
        self,
        loaded: dict[str, Any],
        name: str,
        expected: str,
        splits: dict[str, EncodedSplit],
        options: dict[str, Any],
        threads: int,
    ) -> dict[str, Any]:
        """Load the model, see that it is the one that is searched, and return what it runs on."""
        from laserlm.models import load

        torch.set_num_threads(threads)
        lm = load(**loaded)
        if lm.hash != expected:
            raise OtherWeightsError(
                f"{loaded['name']} on {platform.node()} has other weights than where the search was started; copy these there"
            )
        self._scorer = PrefixScorer(lm, splits, **options)
        return hardware_of(lm)

    def run(self, unit: int, items: Sequence[WorkItem], pause: float) -> Iterator[tuple[int, Any, _Usage] | None]:
        """Yield None as a sign of life, and after a pause the index, the result and the needs of each item."""
        if self._scorer is None:
            raise AssertionError("a worker is set up first")
        yield None
        time.sleep(pause)
        for index, item in enumerate(items):
            if self._stopped >= unit:
                return
            try:
                result = item.execute(self._scorer)
            except (MemoryError, RuntimeError) as error:
                # After an error of its own, a GPU does nothing more for this process.
                if is_out_of_memory(error) or isinstance(error, torch.AcceleratorError):
                    raise UnfitError(f"{type(error).__name__}: {error}") from error
                raise
            scorer = self._scorer
            yield index, result, _Usage(scorer.batch_size, scorer.peak_bytes, scorer.decompositions.peak)

    def stop(self, unit: int) -> None:
        """Begin no other item of a unit, nor of earlier ones."""
        self._stopped = unit

    def free(self, split: str) -> None:
        """Free the cached activations of a split."""
        if self._scorer is not None:
            self._scorer.free(split)


def _ray() -> ModuleType:
    # Usage reports would leave the machine; those who want to send them say so to Ray.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise MissingExtraError(
            "a search on a cluster needs Ray: pip install 'laserlm[cluster]'; or leave out --executor ray"
        ) from error
    return ray


def _connect(ray: ModuleType, how: Ray) -> None:
    given: dict[str, Any] = {"logging_level": logging.WARNING, "log_to_driver": True}
    if how.address is None:
        given |= {"address": "local", "include_dashboard": False}
        if torch.cuda.is_available():  # Ray may not find every kind of GPU by itself
            given["num_gpus"] = torch.cuda.device_count()
        if how.workers is not None:
            given["num_cpus"] = math.ceil(how.workers * how.cpus)
    else:
        given["address"] = how.address
    try:
        if how.address not in (None, "auto"):
            host, _, port = str(how.address).rpartition(":")
            socket.create_connection((host, int(port)), timeout=10).close()  # Ray would try again for minutes
        ray.init(**given)
    except (OSError, ValueError, RuntimeError) as error:
        raise ScoringError(
            f"no Ray cluster at {how.address or 'this machine'}: {error}; start one with 'ray start --head', or leave out "
            "--address"
        ) from error


def _with_gpus(ray: ModuleType, how: Ray) -> Ray:
    """Return how many GPUs a worker gets where that was not given; with fewer GPUs than workers, some share one."""
    if how.gpus is not None:
        return how
    found = sum(int(node["Resources"].get("GPU", 0)) for node in ray.nodes() if node["Alive"])
    return replace(how, gpus=1 / math.ceil((how.workers or 1) / found) if found else 0.0)


def _room(ray: ModuleType, how: Ray) -> int:
    """Return how many workers have room; each has to be on one node."""
    needs = [(name, each) for name, each in (("CPU", how.cpus), ("GPU", how.gpus)) if each]
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    # A tenth of a CPU is a bit more than that in binary.
    return sum(int(min(node.get(name, 0) / each for name, each in needs) + 1e-9) for node in nodes)


def _needs(how: Ray) -> str:
    return _shown({"CPU": how.cpus, "GPU": how.gpus or 0})


def _shown(resources: Mapping[str, float]) -> str:
    return ", ".join(f"{resources.get(name, 0):g} {name}" for name in ("CPU", "GPU"))


def _cause(error: Any) -> BaseException:
    """Return what was raised in a worker, or the error itself where that is the worker's end."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, BaseException) else error


def _reason(error: BaseException) -> str:
    """Return in one line why a worker ended."""
    text = re.sub(r"\s+", " ", str(error)).strip()
    return text if len(text) < 500 else f"{text[:200]} ... {text[-300:]}"
