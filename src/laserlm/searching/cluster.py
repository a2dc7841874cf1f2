"""A search on a Ray cluster: its workers do what the schedule gives them, and this process alone keeps the results.

Ray holds the cluster, places the workers and carries what is sent; https://docs.ray.io tells how to start one.
"""

from __future__ import annotations

import logging
import math
import os
import platform
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import count
from typing import TYPE_CHECKING, Any

from laserlm.errors import LaserError, MissingExtraError, ModelError, ScoringError
from laserlm.models.language_model import LanguageModel
from laserlm.searching.desk import Desk, Material, Order, Piece
from laserlm.searching.executors import Ahead, Needless, OutOfTimeError
from laserlm.searching.schedule import TRIES, Schedule

if TYPE_CHECKING:
    from types import ModuleType

__all__ = ["Ray", "on_ray"]

log = logging.getLogger(__name__)
TICK = 0.2
"""Seconds after which an idle worker is asked again whether there is something to do."""
REMINDER = 60.0
"""Seconds between two warnings that no worker has a place."""
FULL = ("can't allocate memory", "cannot allocate memory", "not enough memory")
"""What PyTorch says where the memory of a CPU is used up."""


@dataclass(frozen=True)
class Ray:
    """Which Ray cluster to search on, and with how many workers.

    Args:
        address: ``auto`` for the cluster that this machine is part of, ``HOST:PORT`` for the one that this head leads; None
            starts one on this machine, for this search.
        workers: processes that hold the model; None takes as many as there is room for.
        cpus: cores of each; a fraction lets several share one.
        gpus: GPUs of each; the model is spread over several.
    """

    address: str | None = None
    workers: int | None = None
    cpus: float = 1.0
    gpus: float = 0.0

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 1:
            raise ScoringError(
                f"{self.workers} workers can do nothing; write 1 or more, or leave it out for all there is room for"
            )
        if self.cpus <= 0 or self.gpus < 0:
            raise ScoringError(f"a worker needs some of a CPU, and no GPU or some; got cpus {self.cpus}, gpus {self.gpus}")
        if self.address is not None and self.address.startswith("ray://"):
            raise ScoringError(
                f"no search through {self.address}: Ray's client does not stream results; run the search on a node of the "
                "cluster, with --address auto"
            )

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class _Usage:
    """What a worker needed so far: see ``Desk``."""

    batch: int
    boundary: int
    decompositions: int


@dataclass(frozen=True)
class _OrderOf:
    """Find the order in which the blocks run."""

    material: str
    home: str = "order"
    group: str = "order"
    work: float = 0.0

    def do(self, desk: Desk) -> Order:
        return list(desk.bench(self.material).order)


@contextmanager
def on_ray(
    how: Ray, lm: LanguageModel, materials: Mapping[str, Material], *, batch: int, memory: float, seed: int
) -> Iterator[RayExecutor]:
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
        workers = how.workers or _room(ray, how)
        executor = RayExecutor(ray, how, workers, lm, materials, batch=batch, memory=memory, seed=seed)
        try:
            yield executor
        finally:
            executor.close()
    finally:
        if ours:
            ray.shutdown()


class RayExecutor:
    """Give pieces of work to the workers, and replace those that end."""

    def __init__(
        self,
        ray: ModuleType,
        how: Ray,
        workers: int,
        lm: LanguageModel,
        materials: Mapping[str, Material],
        *,
        batch: int,
        memory: float,
        seed: int,
    ) -> None:
        self.workers = workers
        self.batch = batch
        self.boundary = 0
        self.decompositions = 0
        self._ray = ray
        self._schedule = Schedule(workers)
        self._orders: dict[str, Order] = {}
        self._starting: dict[Any, Any] = {}  # by the reference that tells that a worker is ready
        self._ready: list[Any] = []
        self._streams: dict[Any, Any] = {}  # of the workers that have a unit
        self._units: dict[Any, tuple[int, list[Piece]]] = {}
        self._numbers = count()
        self._ended_before = 0  # workers in a row that ended before they were ready
        self._reminder = time.monotonic() + REMINDER
        needs: dict[str, Any] = {"num_cpus": how.cpus, "num_gpus": how.gpus, "max_restarts": 0, "max_task_retries": 0}
        # The second group lets a worker hear that it may stop while it works.
        self._actor = ray.remote(**needs, concurrency_groups={"beside": 1})(_Worker)
        self._needs = f"{how.cpus:g} CPU and {how.gpus:g} GPU"
        place = {"device_map": "auto"} if how.gpus > 1 else {"device": "cuda" if how.gpus else "cpu"}
        given = {"batch": batch, "memory": memory, "seed": seed}
        try:
            shared = ray.put(dict(materials))
        except (TypeError, AttributeError) as error:
            raise ScoringError(f"the task cannot be sent to other processes ({error}); search on this machine alone") from error
        self._given = ((lm.loaded or {}) | place, lm.hash, shared, given, max(1, int(how.cpus)))
        for _ in range(workers):
            self._start()

    def close(self) -> None:
        """End the workers."""
        for worker in [*self._ready, *self._starting.values()]:
            self._ray.kill(worker)

    def order(self, material: str) -> Order:
        """See ``Executor``."""
        if material not in self._orders:
            ((_, self._orders[material]),) = self.run([_OrderOf(material)], needless=lambda _: False)
        return self._orders[material]

    def release(self, material: str) -> None:
        """See ``Executor``."""
        for worker in self._ready:
            worker.release.remote(material)

    def run(
        self,
        pieces: Sequence[Piece],
        *,
        needless: Needless,
        deadline: float = math.inf,
        ahead: Ahead | None = None,
    ) -> Iterator[tuple[Any, Any]]:
        """See ``Executor``.

        Raises:
            LaserError: what a worker raised.
        """
        schedule = self._schedule
        yield from schedule.want(pieces)
        answers: list[tuple[Any, Any]] = []
        while schedule.open or answers:
            if time.monotonic() > deadline:
                schedule.want([])
                raise OutOfTimeError
            self._hand_out(needless, ahead)
            # Recorded while the workers are at the next units already.
            yield from answers
            answers = self._listen() if schedule.open else []

    def _hand_out(self, needless: Needless, ahead: Ahead | None) -> None:
        for worker in self._ready:
            if self._schedule.idle(worker):
                unit = self._schedule.take(worker, time.monotonic(), needless, ahead)
                if unit:
                    number = next(self._numbers)
                    self._units[worker] = number, unit
                    self._streams[worker] = worker.run.options(num_returns="streaming").remote(number, unit)
            elif self._schedule.useless(worker):
                worker.stop.options(concurrency_group="beside").remote(self._units[worker][0])

    def _listen(self) -> list[tuple[Any, Any]]:
        """Wait for something to come, and return the answers in it that are wanted."""
        sources = {**dict.fromkeys(self._starting), **{stream: worker for worker, stream in self._streams.items()}}
        if not self._ready:
            self._remind()
        # One is waited for, all that came are taken.
        self._ray.wait(list(sources), timeout=TICK, fetch_local=False)
        there, _ = self._ray.wait(list(sources), num_returns=len(sources), timeout=0, fetch_local=False)
        found: list[tuple[Any, Any]] = []
        for source in there:
            if source in self._starting:
                self._welcome(source)
            else:
                found += self._read(sources[source], source)
        return found

    def _welcome(self, ref: Any) -> None:
        """Take in a worker that is ready, or start another in place of one that ended before."""
        worker = self._starting.pop(ref)
        try:
            self._ray.get(ref)
        except self._ray.exceptions.RayTaskError as error:
            raise _cause(error) from error
        except self._ray.exceptions.RayError as error:
            self._ended_before += 1
            if self._ended_before >= TRIES:
                raise ScoringError(
                    f"{TRIES} workers ended before they had the model: {_reason(error)}; see that a node has the memory for "
                    "it, and fewer workers on it"
                ) from error
            log.warning("a worker ended before it had the model, another one starts: %s", _reason(error))
            self._start()
            return
        self._ended_before = 0
        self._ready.append(worker)

    def _read(self, worker: Any, stream: Any) -> list[tuple[Any, Any]]:
        """Take the next answer of a worker, or that it has ended its unit or itself."""
        try:
            place, result, usage = self._ray.get(next(stream))
        except StopIteration:
            del self._streams[worker]
            self._schedule.finish(worker)
            return []
        except self._ray.exceptions.RayTaskError as error:
            cause = _cause(error)
            if not isinstance(cause, MemoryError):
                raise cause from error
            return self._replace(worker, f"it ran out of memory: {cause}")
        except self._ray.exceptions.RayError as error:
            return self._replace(worker, _reason(error))
        self.batch = min(self.batch, usage.batch)
        self.boundary = max(self.boundary, usage.boundary)
        self.decompositions = max(self.decompositions, usage.decompositions)
        piece = self._units[worker][1][place]
        wanted = self._schedule.answer(worker, piece, result, time.monotonic())
        return [(piece, result)] if wanted else []

    def _replace(self, worker: Any, reason: str) -> list[tuple[Any, Any]]:
        """Start a worker in the place of one that ended; return what is given up because of that."""
        del self._streams[worker]
        self._ready.remove(worker)
        self._ray.kill(worker)
        self._start()
        given_up = self._schedule.lose(worker)
        if given_up is None:
            log.warning("a worker ended, another one starts in its place: %s", reason)
            return []
        log.warning("%d workers ended at %s, which is given up: %s", TRIES, given_up, reason)
        return [(given_up, f"{TRIES} workers ended at it; the last because {reason}")]

    def _start(self) -> None:
        worker = self._actor.remote()
        self._starting[worker.set_up.remote(*self._given)] = worker

    def _remind(self) -> None:
        if time.monotonic() > self._reminder:
            self._reminder = time.monotonic() + REMINDER
            has = {name: count for name, count in self._ray.available_resources().items() if name in ("CPU", "GPU")}
            log.warning("no worker is ready yet; each needs %s, and the cluster has %s free", self._needs, has or "none")


class _Worker:
    """A process of the cluster: it loads the model once, and does the units that it is given."""

    def __init__(self) -> None:
        self._desk: Desk | None = None
        self._stopped = -1

    def set_up(
        self, loaded: dict[str, Any], expected: str, materials: dict[str, Material], given: dict[str, Any], threads: int
    ) -> None:
        """Load the model, and see that it is the one that is searched."""
        import torch

        from laserlm.models import load

        torch.set_num_threads(threads)
        lm = load(**loaded)
        if lm.hash != expected:
            raise ModelError(
                f"{loaded['name']} on {platform.node()} has other weights than where the search was started; copy these there"
            )
        self._desk = Desk(lm, materials, **given)

    def run(self, unit: int, pieces: Sequence[Piece]) -> Iterator[tuple[int, Any, _Usage]]:
        """Yield the place and the result of each piece of a unit, and what was needed for it."""
        if self._desk is None:
            raise AssertionError("a worker is set up first")
        for place, piece in enumerate(pieces):
            if self._stopped >= unit:
                return
            try:
                result = piece.do(self._desk)
            except RuntimeError as error:
                if any(sign in str(error).lower() for sign in FULL):
                    raise MemoryError(str(error)) from error
                raise
            yield place, result, _Usage(self._desk.batch, self._desk.boundary, self._desk.cache.peak)

    def stop(self, unit: int) -> None:
        """Begin no other piece of a unit, nor of earlier ones."""
        self._stopped = unit

    def release(self, material: str) -> None:
        """Free the boundaries of a material."""
        if self._desk is not None:
            self._desk.bench(material).release()


def _ray() -> ModuleType:
    # Usage reports would leave the machine; those who want to send them say so to Ray.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # So that a worker without GPUs sees none, also in future.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
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
        if how.workers is not None:
            given["num_cpus"] = math.ceil(how.workers * how.cpus)
    else:
        given["address"] = how.address
    try:
        ray.init(**given)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ScoringError(
            f"no Ray cluster at {how.address or 'this machine'}: {error}; start one with 'ray start --head', or leave out "
            "--address"
        ) from error


def _room(ray: ModuleType, how: Ray) -> int:
    """Return how many workers have room."""
    has = ray.cluster_resources()
    room = min(has.get(name, 0) // each for name, each in (("CPU", how.cpus), ("GPU", how.gpus)) if each)
    if room < 1:
        there = ", ".join(f"{has.get(name, 0):g} {name}" for name in ("CPU", "GPU"))
        raise ScoringError(
            f"a worker needs {how.cpus:g} CPU and {how.gpus:g} GPU, and the whole cluster has {there}; ask for less"
        )
    return int(room)


def _cause(error: Any) -> BaseException:
    """Return what was raised in a worker, as it was."""
    cause = error.cause
    if isinstance(cause, LaserError | MemoryError):
        return cause
    return error if not isinstance(cause, BaseException) else cause


def _reason(error: BaseException) -> str:
    """Return in one line why a worker ended."""
    return re.sub(r"\s+", " ", str(error)).strip()[:500]
