"""What one process does for a search: it scores, from the frontier, and screens; and keeps what serves again.

A piece of work says all that there is to do, so that any process with the same model can do it: it needs a read-only model
and returns a few bytes for each example.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch

from laserlm.edit import applied, resolve
from laserlm.edit.decomposition_cache import DecompositionCache
from laserlm.errors import ScoringError, WeightError
from laserlm.models.language_model import LanguageModel
from laserlm.models.matrices import Matrix
from laserlm.reductions import Intervention
from laserlm.scoring.evaluate import classes_of, evaluate_rows
from laserlm.scoring.forward import out_of_memory_error
from laserlm.scoring.prefix_cache import PrefixCache, PrefixCheck
from laserlm.scoring.records import Evaluation
from laserlm.scoring.tokenize import TokenSequence
from laserlm.searching.candidates import Candidate
from laserlm.searching.screen import Prediction, screen
from laserlm.tasks import Scorer, Split

__all__ = ["EncodedSplit", "ScoreTask", "ScreenTask", "WorkItem", "WorkerState", "first_changed_block"]

BlockOrder = Sequence[tuple[str, int]]
"""Blocks, as stack and layer, in the order in which the model runs them; empty where it cannot be cut between them."""


@dataclass(frozen=True)
class EncodedSplit:
    """Examples to score.

    Args:
        split: the examples, in the order in which they are used.
        rows: what ``encode`` made of them.
        scorer: how an example is scored.
    """

    split: Split
    rows: Sequence[TokenSequence]
    scorer: Scorer


class WorkItem(Protocol):
    """A piece of work."""

    @property
    def home(self) -> Hashable:
        """What a process has to have at hand: of two pieces with the same home, the second is cheaper."""

    @property
    def group(self) -> Hashable:
        """What else serves again: a unit of work is of one group."""

    @property
    def work(self) -> float:
        """Passes of one example through the whole model that it takes, about."""

    def do(self, desk: WorkerState) -> Any:
        """Return the result; a text is the reason why there is none."""


@dataclass(frozen=True)
class ScoreTask:
    """Score an intervention on consecutive examples.

    Args:
        material: name of the examples on the desk.
        start: place of the first example.
        stop: place just past the last one.
        intervention: what is applied.
        share: part of the model's blocks that a pass has to run.
    """

    material: str
    start: int
    stop: int
    intervention: Intervention
    share: float = field(default=1.0, compare=False)

    @property
    def home(self) -> Hashable:
        """The boundary on these examples."""
        return self.material, self.start, self.stop

    @property
    def group(self) -> Hashable:
        """The matrices, whose decompositions serve at every size."""
        return tuple((r.stack, r.layers, r.matrix) for r in self.intervention.reductions)

    @property
    def work(self) -> float:
        """Examples, times the part of the blocks."""
        return self.share * (self.stop - self.start)

    def do(self, desk: WorkerState) -> Evaluation | str:
        """Return the scores, or the reason why there are none."""
        return desk.bench(self.material).score(self.intervention, self.start, self.stop)


@dataclass(frozen=True, eq=False)
class ScreenTask:
    """Screen candidates. Each is a piece of its own, for it is asked for once.

    Args:
        material: name of the examples on the desk.
        first: place of the first example; all from there on are taken.
        candidates: single matrices at single ranks.
        between_choices: see ``screen``.
        work: passes of one example that it takes, about.
    """

    material: str
    first: int
    candidates: tuple[Candidate, ...] = field(repr=False)
    between_choices: bool = False
    work: float = 0.0

    @property
    def home(self) -> Hashable:
        """The examples."""
        return self.material, self.first

    @property
    def group(self) -> Hashable:
        """The piece itself: every one is for another process."""
        return id(self)

    def do(self, desk: WorkerState) -> dict[str, Prediction]:
        """Return the predictions by the candidates' canonical text.

        Raises:
            ScoringError: if a single row does not fit into memory.
        """
        material = desk.materials[self.material]
        rows = [replace(r, example=r.example - self.first) for r in material.rows if r.example >= self.first]
        batch = desk.batch
        while True:
            try:
                return screen(
                    desk.lm,
                    material.split.examples[self.first :],
                    rows,
                    material.scorer,
                    self.candidates,
                    cache=desk.cache,
                    batch_size=batch,
                    between_choices=self.between_choices,
                )
            except torch.OutOfMemoryError as error:
                full = out_of_memory_error(desk.lm, error)
            # Outside the handler, whose traceback holds the failed pass's tensors.
            if batch == 1:
                raise full
            batch //= 2
            desk.cache.clear()
            torch.cuda.empty_cache()


class WorkerState:
    """A model, the examples to score it on, and what serves again: decompositions and boundaries.

    Args:
        lm: the unchanged model.
        materials: by name.
        batch: sequences in one pass.
        memory: bytes of decompositions held, and of the boundaries of each material.
        seed: of ``:reference`` decompositions.

    Attributes:
        batch: halved where memory ran out.
        cache: the decompositions.
    """

    def __init__(
        self, lm: LanguageModel, materials: Mapping[str, EncodedSplit], *, batch: int = 32, memory: float = 2**30, seed: int = 0
    ) -> None:
        self.lm = lm
        self.materials = materials
        self.batch = batch
        self.memory = memory
        self.seed = seed
        self.cache = DecompositionCache(lm.cache / "decompositions", memory=memory)
        self._benches: dict[str, PrefixScorer] = {}

    def bench(self, material: str) -> PrefixScorer:
        """Return what scores this material."""
        if material not in self._benches:
            self._benches[material] = PrefixScorer(self, self.materials[material])
        return self._benches[material]

    @property
    def boundary(self) -> int:
        """Most bytes that the boundaries of a material took so far."""
        return max((bench.boundary for bench in self._benches.values()), default=0)


class PrefixScorer:
    """Score interventions on parts of one material, from the frontier.

    Attributes:
        boundary: most bytes that boundaries took so far.
    """

    def __init__(self, desk: WorkerState, material: EncodedSplit) -> None:
        self.boundary = 0
        self._desk = desk
        self._material = material
        self._spare = desk.memory
        self._frontiers: dict[tuple[int, int], PrefixCache] = {}
        self._checks: PrefixCheck | None = None
        self._parts: dict[tuple[int, int], tuple[Split, list[TokenSequence]]] = {}

    @property
    def order(self) -> BlockOrder:
        """The blocks in the order in which they run."""
        return self._boundaries.order

    def release(self) -> None:
        """Free all boundaries."""
        self._frontiers.clear()

    def score(self, intervention: Intervention, start: int, stop: int) -> Evaluation | str:
        """Return the scores on the examples from ``start`` to ``stop``, or the reason why there are none.

        Raises:
            ScoringError: if a single row does not fit into memory.
        """
        while True:
            try:
                return self._scored(intervention, start, stop)
            except (ScoringError, WeightError) as error:
                return f"{type(error).__name__}: {error}"
            except torch.OutOfMemoryError as error:
                full = out_of_memory_error(self._desk.lm, error)
            self._make_room(full)  # outside the handler, whose traceback holds the failed pass's tensors

    @property
    def _boundaries(self) -> PrefixCheck:
        self._checks = self._checks or PrefixCheck(self._desk.lm, self._material.rows)
        return self._checks

    def _scored(self, intervention: Intervention, start: int, stop: int) -> Evaluation:
        desk, split, where = self._desk, self._material.split, (start, stop)
        if where not in self._parts:
            rows = [replace(row, example=row.example - start) for row in self._material.rows if start <= row.example < stop]
            self._parts[where] = replace(split, examples=split.examples[start:stop]), rows
        part, rows = self._parts[where]
        if where not in self._frontiers:
            self._frontiers[where] = PrefixCache(desk.lm, rows, desk.batch, self._boundaries)
        frontier = self._frontiers[where]
        if frontier.moves:
            self._forget(frontier, self._spare / 2)
            frontier.advance(*self.order[first_changed_block(intervention, desk.lm.matrices, self.order)])
            self.boundary = max(self.boundary, sum(f.bytes for f in self._frontiers.values()))
            self._forget(frontier, self._spare)
        if not frontier.moves:
            self._frontiers = {where: frontier}
        with applied(desk.lm, intervention, cache=desk.cache, seed=desk.seed):
            found = evaluate_rows(desk.lm, part, self._material.scorer, rows, frontier.run, desk.batch)
        return replace(found, classes=classes_of(split, self._material.scorer))

    def _forget(self, current: PrefixCache, spare: float) -> None:
        """Free what frontiers left behind, and those not in use, until the rest fits into what is to spare."""
        while sum(f.bytes for f in self._frontiers.values()) > spare:
            others = [where for where, f in self._frontiers.items() if f is not current]
            if others:
                del self._frontiers[others[0]]
            elif not current.forget():
                return

    def _make_room(self, full: ScoringError) -> None:
        held = sum(f.bytes for f in self._frontiers.values())
        self._frontiers.clear()
        self._desk.cache.clear()
        if held and self._spare:
            self._spare = 0  # from here on only the boundary in use is held
        elif self._desk.batch > 1:
            self._desk.batch //= 2
        elif self.order:
            self._boundaries.stay()  # the boundary itself may be what does not fit
        else:
            raise full
        torch.cuda.empty_cache()


def first_changed_block(intervention: Intervention, matrices: Sequence[Matrix], order: BlockOrder) -> int:
    """Return the place, in the order in which blocks run, of the first one that is changed."""
    places = [(e.matrix.stack, e.matrix.layer) for e in resolve(matrices, intervention)]
    return min((order.index(place) for place in places), default=0) if order else 0
