"""A search on a Ray cluster: workers score what the schedule hands out, and only this process keeps the results."""

from __future__ import annotations

import logging
import math
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pickle import PicklingError
from typing import TYPE_CHECKING, Any

from laserlm.errors import LaserError, ModelError, ScoringError
from laserlm.models.language_model import LanguageModel
from laserlm.searching.cluster_worker import OtherWeightsError, UnfitError, Worker
from laserlm.searching.config import SearchConfig
from laserlm.searching.executors import IsCancelled, OutOfTimeError, Speculate
from laserlm.searching.ray_cluster import Ray, connect, count_room, import_ray, needs_text, resources_text, with_gpus
from laserlm.searching.schedule import MAX_TRIES, Schedule
from laserlm.searching.scorer import BlockOrder, EncodedSplit, Failure
from laserlm.searching.work import OrderTask, WorkItem

if TYPE_CHECKING:
    from types import ModuleType

log = logging.getLogger(__name__)
POLL_SECONDS = 0.2
"""Seconds after which an idle worker is asked again whether there is something to do."""
REMINDER_SECONDS = 60.0
"""Seconds between two warnings that workers wait for room."""
SIGN_OF_LIFE_SECONDS = 0.5
"""Seconds until the first message of a worker reaches the driver."""
RETRY_SECONDS = 30.0
"""Seconds until another worker is tried in the place of one that could not start, while others work."""


@dataclass
class _Unit:
    """The work items that a worker runs now."""

    number: int
    items: list[WorkItem]
    stream: Any
    begun: bool = False
    stopped: bool = False


@contextmanager
def on_ray(cluster: Ray, lm: LanguageModel, splits: Mapping[str, EncodedSplit], config: SearchConfig) -> Iterator[RayExecutor]:
    """Yield an executor on the cluster. Its workers end with the context, and a cluster that it started ends too.

    Raises:
        MissingExtraError: if Ray is not installed.
        ModelError: if workers cannot load the model by themselves.
        ScoringError: if the cluster cannot be reached, or has no room for a single worker.
    """
    ray = import_ray()
    if lm.loaded is None:
        raise ModelError(
            f"{lm.name} exists only in this process, so no worker can load it; save it with save_pretrained in a folder that "
            "every node sees, and load it from there"
        )
    ours = not ray.is_initialized()
    if ours:
        connect(ray, cluster)
    try:
        cluster = with_gpus(ray, cluster)
        room = count_room(ray, cluster)
        # A cluster of others may grow; this one will not.
        if room < 1 and (cluster.workers is None or (ours and cluster.address is None)):
            raise ScoringError(
                f"a worker needs {needs_text(cluster)} on one machine, and {resources_text(ray.cluster_resources())} are all "
                "there is in the cluster; ask for less"
            )
        executor = RayExecutor(ray, cluster, cluster.workers or room, lm, splits, config)
        try:
            yield executor
        finally:
            executor.close()
    finally:
        if ours:
            ray.shutdown()


class RayExecutor:
    """Hands work items to the workers, and replaces workers that end."""

    def __init__(
        self,
        ray: ModuleType,
        cluster: Ray,
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
        self._cluster = cluster
        self._schedule = Schedule(workers)
        self._block_orders: dict[str, BlockOrder] = {}
        self._starting: dict[Any, Any] = {}  # by the reference that tells that a worker is ready
        self._later: list[float] = []  # when to try others
        self._ready: list[Any] = []
        self._units: dict[Any, _Unit] = {}
        self._numbers = count()
        self._failures = 0  # workers in a row that were never ready
        self._reminder = time.monotonic() + REMINDER_SECONDS
        needs: dict[str, Any] = {"num_cpus": cluster.cpus, "num_gpus": cluster.gpus, "max_restarts": 0, "max_task_retries": 0}
        # The second group lets a worker hear that it may stop while it works.
        self._actor = ray.remote(**needs, concurrency_groups={"control": 1})(Worker)
        place = {"device_map": "auto"} if (cluster.gpus or 0) > 1 else {"device": "cuda" if cluster.gpus else "cpu"}
        options = {"batch_size": config.batch_size, "memory": config.memory, "seed": config.seed}
        try:
            shared = ray.put(dict(splits))
        except (TypeError, AttributeError, PicklingError) as error:
            raise ScoringError(f"the task cannot be sent to other processes ({error}); search on this machine alone") from error
        self._set_up = ((lm.loaded or {}) | place, lm.name, lm.hash, shared, options, max(1, int(cluster.cpus)))
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
        """Free the cached activations of a split that is not scored again soon."""
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
            yield from answers  # the caller records them while the workers run their next units
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
                    worker.stop.options(concurrency_group="control").remote(unit.number)
            elif work:
                items = self._schedule.take(worker, now, is_cancelled, guess)
                work = bool(items)  # if there is no work for one worker, there is none for the next
                if items:
                    number = next(self._numbers)
                    pause = SIGN_OF_LIFE_SECONDS if self._schedule.suspected(items[0]) else 0.0
                    stream = worker.run.options(num_returns="streaming").remote(number, items, pause)
                    self._units[worker] = _Unit(number, items, stream)

    def _listen(self) -> list[tuple[Any, Any]]:
        """Wait until a worker answers, and return the answers that the schedule still needs."""
        self._remind()
        sources = {**dict.fromkeys(self._starting), **{unit.stream: worker for worker, unit in self._units.items()}}
        # Wait for one answer, then take all that have arrived.
        self._ray.wait(list(sources), timeout=POLL_SECONDS, fetch_local=False)
        arrived, _ = self._ray.wait(list(sources), num_returns=len(sources), timeout=0, fetch_local=False)
        answers: list[tuple[Any, Any]] = []
        for source in arrived:
            worker = sources[source]
            if worker is None:
                self._welcome(source)
                continue
            answers += self._read(worker)
            while worker in self._units and source.next_ready():
                answers += self._read(worker)
        return answers

    def _welcome(self, ref: Any) -> None:
        """Add a worker that is ready. If it could not start, start another one later."""
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
                    f"{self._failures} workers in a row ended before they had the model: {_reason(cause)}; check that a node "
                    "has enough memory and the same version of laserlm"
                ) from error
            log.warning("a worker could not start, another one starts: %s", _reason(cause))
            self._ray.kill(worker)
            self._later.append(time.monotonic() + (RETRY_SECONDS if self._ready else 0))
            return
        self._failures = 0
        self.hardware = self.hardware or hardware
        self._ready.append(worker)

    def _read(self, worker: Any) -> list[tuple[Any, Any]]:
        """Return the next answer of a worker as a list; empty if the unit or the worker ended."""
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
        """Start a worker in place of one that ended. Return an item that is abandoned because of this as a failure."""
        unit = self._units.pop(worker)
        self._ready.remove(worker)
        self._ray.kill(worker)
        self._start()
        abandoned = self._schedule.lose(worker, begun=unit.begun)
        if abandoned is None:
            log.warning("a worker ended, another one starts in its place: %s", reason)
            return []
        log.warning("%d workers ended at the same item, which is abandoned: %s", MAX_TRIES, reason)
        return [(abandoned, Failure(f"{MAX_TRIES} workers ended at it; the last because {reason}", of_workers=True))]

    def _start(self) -> None:
        worker = self._actor.remote()
        self._starting[worker.set_up.remote(*self._set_up)] = worker

    def _remind(self) -> None:
        """Warn from time to time that workers wait for room on the cluster."""
        if self._starting and time.monotonic() > self._reminder:
            self._reminder = time.monotonic() + REMINDER_SECONDS
            log.warning(
                "%d of %d workers are not ready; each needs %s, and %s are free in the cluster",
                len(self._starting),
                self.workers,
                needs_text(self._cluster),
                resources_text(self._ray.available_resources()),
            )


def _cause(error: Any) -> BaseException:
    """Return the error that a worker raised, or ``error`` if the worker itself ended."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, BaseException) else error


def _reason(error: BaseException) -> str:
    """Return in one line why a worker ended."""
    text = re.sub(r"\s+", " ", str(error)).strip()
    return text if len(text) < 500 else f"{text[:200]} ... {text[-300:]}"
