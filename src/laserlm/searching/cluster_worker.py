"""A worker of a Ray cluster: a process that holds the model and scores what it gets."""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from laserlm.errors import ModelError
from laserlm.out_of_memory import is_out_of_memory
from laserlm.searching.hardware import hardware_of
from laserlm.searching.scorer import EncodedSplit, PrefixScorer
from laserlm.searching.work import WorkItem


class OtherWeightsError(ModelError):
    """A worker loaded other weights than those of the search."""


class UnfitError(Exception):
    """This process cannot go on, but another one may."""


@dataclass(frozen=True)
class WorkerUsage:
    """Batch size and peak bytes of a worker so far; see ``Executor``."""

    batch_size: int
    activation_bytes: int
    decomposition_bytes: int


class Worker:
    """A process of the cluster: it loads the model once and runs the work items that it gets."""

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
        """Load the model, check its weights, and return the hardware that it runs on."""
        from laserlm.models import load

        torch.set_num_threads(threads)
        lm = load(**loaded)
        if lm.hash != expected:
            raise OtherWeightsError(
                f"{loaded['name']} on {platform.node()} has other weights than where the search was started; copy "
                "the model of the search to it"
            )
        self._scorer = PrefixScorer(lm, splits, **options)
        return hardware_of(lm)

    def run(self, unit: int, items: Sequence[WorkItem], pause: float) -> Iterator[tuple[int, Any, WorkerUsage] | None]:
        """Yield None when the unit begins and, after a pause, the index, the result and the usage of each item."""
        if self._scorer is None:
            raise AssertionError("call set_up first")
        yield None
        time.sleep(pause)
        for index, item in enumerate(items):
            if self._stopped >= unit:
                return
            try:
                result = item.execute(self._scorer)
            except (MemoryError, RuntimeError) as error:
                # After an error of its own, a GPU runs nothing more for this process.
                if is_out_of_memory(error) or isinstance(error, torch.AcceleratorError):
                    raise UnfitError(f"{type(error).__name__}: {error}") from error
                raise
            scorer = self._scorer
            yield index, result, WorkerUsage(scorer.batch_size, scorer.peak_bytes, scorer.decompositions.peak)

    def stop(self, unit: int) -> None:
        """Begin no further item of this unit or of earlier units."""
        self._stopped = unit

    def free(self, split: str) -> None:
        """Free the cached activations of a split."""
        if self._scorer is not None:
            self._scorer.free(split)
