"""What a search will take, before it begins: its work items, operations, memory and time."""

from __future__ import annotations

import logging
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from laserlm.edit import resolve
from laserlm.errors import ScoringError
from laserlm.linalg.decomposition import as_float_matrix, basis_of
from laserlm.models.language_model import LanguageModel
from laserlm.models.matrices import Matrix, read_matrix
from laserlm.reductions import Intervention
from laserlm.scoring.forward import MAX_SCORED_POSITIONS
from laserlm.scoring.scorers import GENERATING
from laserlm.searching.candidates import Candidate, expand
from laserlm.searching.components import MOST_QUESTIONS, PARTS
from laserlm.searching.config import SearchConfig, Strategy
from laserlm.searching.driver import FINALISTS, TEST, VALIDATION, check, encode_splits
from laserlm.searching.guard import has_guard
from laserlm.searching.ledger import cut, max_sequences
from laserlm.searching.race import rung_sizes
from laserlm.searching.scorer import EncodedSplit, Failure, PrefixScorer, first_changed_block
from laserlm.searching.simulation import CostModel, Simulation, simulate
from laserlm.searching.strategies import screen_size
from laserlm.searching.work import (
    SCREEN_PASSES,
    ContributionTask,
    ScoreTask,
    ScreenTask,
    WorkItem,
    contribution_tasks,
    screen_tasks,
)
from laserlm.store import Store
from laserlm.tasks import Task

__all__ = ["Plan", "Stage", "measure_cost", "plan"]

log = logging.getLogger(__name__)
BASE = Intervention()
EIGENSOLVER_CUBES = 9
"""Floating-point operations of all eigenvectors of a symmetric matrix, in cubes of its size (Golub and Van Loan,
Matrix Computations, 4th edition, section 8.3.3)."""
RUNG, SCREEN, GRADIENT = "rung to example", "screen", "gradient"
GRADIENTS = (SCREEN, GRADIENT)
MAX_TIMED_FLOP = 1e12
"""Floating-point operations of a decomposition that is not worth timing four times."""
NEIGHBOURS = 2
"""Neighbours of the leader in rank that are added to a race after each rung."""


@dataclass(frozen=True)
class Stage:
    """Work items that can all be done at once.

    Args:
        name: what is done.
        items: the work items.
    """

    name: str
    items: tuple[WorkItem, ...] = field(repr=False)

    @property
    def passes(self) -> float:
        """Passes of one example through the whole model."""
        return sum(item.cost for item in self.items)


@dataclass(frozen=True)
class Plan:
    """The work, memory and time that a search takes.

    Args:
        strategy: how it goes on.
        candidates: number of candidates.
        matrices: those that have to be decomposed.
        stages_for: returns what is done, one after the other, for a number of workers.
        is_estimate: whether more or less may be needed: what loses early leaves early, neighbours of the leader are added,
            and a choice of components ends when a step gains nothing.
        generates: whether the model also generates text for each finalist, which is not counted.
        pass_flop: floating-point operations of a pass of one example, on average.
        screen_flop: those of the sums of the screen, without its passes.
        weights: bytes of the model.
        activations: bytes of cached activations, or of what the screen holds between blocks, whichever is more.
        decompositions: bytes of decompositions that are held.
        peak: bytes that a pass, one with its gradient, or a decomposition needs beside these, whichever takes most, about.
        disk: bytes of the cache folder that the decompositions take.
    """

    strategy: Strategy
    candidates: int
    matrices: tuple[Matrix, ...] = field(repr=False)
    stages_for: Callable[[int], tuple[Stage, ...]] = field(repr=False)
    is_estimate: bool
    generates: bool
    pass_flop: float
    screen_flop: float
    weights: int
    activations: int
    decompositions: int
    peak: int
    disk: int

    @cached_property
    def stages(self) -> tuple[Stage, ...]:
        """What one process does, one stage after the other."""
        return self.stages_for(1)

    @property
    def n_items(self) -> int:
        """Number of work items."""
        return sum(len(stage.items) for stage in self.stages)

    @property
    def passes(self) -> float:
        """Passes of one example through the whole model."""
        return sum(stage.passes for stage in self.stages)

    @property
    def decomposition_flop(self) -> float:
        """Floating-point operations of all decompositions."""
        return sum(self.of_matrix.values())

    @property
    def flop(self) -> float:
        """Floating-point operations in all."""
        return self.passes * self.pass_flop + self.screen_flop + self.decomposition_flop

    @property
    def memory(self) -> int:
        """Bytes that a worker needs, without what PyTorch itself takes."""
        return self.weights + self.activations + self.decompositions + self.peak

    @cached_property
    def of_matrix(self) -> dict[str, float]:
        """Floating-point operations of the decomposition of each matrix, by its id."""
        return {m.id: decomposition_flop(m) for m in self.matrices}

    def simulate(self, workers: int, costs: CostModel, **options: Any) -> Simulation:
        """Return how long it takes with so many workers; see ``simulation.simulate``."""
        stages = self.stages_for(workers)
        rungs = [number for number, stage in enumerate(stages) if stage.name.startswith(RUNG)]
        known: dict[Intervention, Mapping[str, float]] = {}

        def needs(item: WorkItem) -> Mapping[str, float]:
            if isinstance(item, ScreenTask):
                return {c.matrix.id: self.of_matrix[c.matrix.id] for c in item.candidates}
            if isinstance(item, ContributionTask):
                return {m.id: self.of_matrix[m.id] for m in item.matrices}
            if not isinstance(item, ScoreTask) or not item.intervention:
                return {}
            if item.intervention not in known:
                ids = {e.matrix.id for e in resolve(self.matrices, item.intervention)}
                known[item.intervention] = {id: self.of_matrix[id] for id in ids & self.of_matrix.keys()}
            return known[item.intervention]

        items = [stage.items for stage in stages]
        return simulate(items, workers, costs, decompositions=needs, early=rungs[1:], **options)

    def as_dict(self) -> dict[str, Any]:
        """Return the figures as plain JSON values."""
        return {
            "strategy": self.strategy,
            "candidates": self.candidates,
            "matrices": len(self.matrices),
            "stages": [{"name": s.name, "pieces": len(s.items), "passes": s.passes} for s in self.stages],
            "pieces": self.n_items,
            "passes": self.passes,
            "about": self.is_estimate,
            "writes": self.generates,
            "flop": {
                "passes": self.passes * self.pass_flop,
                "screen": self.screen_flop,
                "decompositions": self.decomposition_flop,
                "all": self.flop,
            },
            "memory": {
                "weights": self.weights,
                "boundary": self.activations,
                "decompositions": self.decompositions,
                "moment": self.peak,
                "all": self.memory,
            },
            "disk": self.disk,
        }


def plan(lm: LanguageModel, task: Task, config: SearchConfig) -> Plan:
    """Return what a search will take, from the shapes of the model and the tokens of the task; the model is not run.

    Args:
        lm: the model; its weights may be on the meta device.
        task: as for ``search``.
        config: as for ``search``.

    Raises:
        LaserError: if a setting, the grid, the task or the model cannot be used.
    """
    config = config.for_task(task, has_guard=has_guard(lm, config.guards), kind=lm.kind)
    if config.strategy is None:
        raise AssertionError("for_task sets the strategy")
    check(lm, task)
    candidates = expand(config.grid, lm.matrices)
    splits = encode_splits(lm, task, config)
    builder = _PlanBuilder(lm, splits, candidates, config)
    matrices = tuple(dict.fromkeys(c.matrix for c in candidates))
    sequences = splits[VALIDATION].sequences
    tokens = sum(len(s.ids) + len(s.decoder) for s in sequences) / len(task.validation)
    takes_gradients = config.screens or config.strategy == "components"
    gradients = sum(stage.name in GRADIENTS for stage in builder.stages(1))
    held = [4 * min(m.shape) * sum(m.shape) for m in matrices]
    of_block: dict[tuple[str, int], int] = {}
    for m, size in zip(matrices, held, strict=True):
        of_block[m.stack, m.layer] = of_block.get((m.stack, m.layer), 0) + size
    boundaries, backward = builder.screen_bytes() if takes_gradients else (0, 0)
    disk = sum((8 if lm.dtype == torch.float64 else 4) * min(m.shape) ** 2 for m in matrices)
    _warn_of_full_disk(lm.cache, disk)
    return Plan(
        strategy=config.strategy,
        candidates=len(candidates),
        matrices=matrices,
        stages_for=builder.stages,
        is_estimate=config.strategy != "exhaustive",
        generates=config.scorer in GENERATING,
        pass_flop=_pass_flop(lm, splits[VALIDATION]),
        screen_flop=sum(2 * gradients * builder.screen_size * tokens * min(m.shape) * sum(m.shape) for m in matrices),
        weights=sum({p.data_ptr() or id(p): p.numel() * p.element_size() for p in lm.model.parameters()}.values()),
        activations=max(
            boundaries + builder.derivative_bytes(), *(builder.activation_bytes(name) for name in (VALIDATION, TEST))
        ),
        # The screen holds all of a block, whatever the bound.
        decompositions=int(max(min(config.memory / 2, sum(held)), max(of_block.values()) if takes_gradients else max(held))),
        peak=max(
            _pass_bytes(lm, splits, config.batch_size),
            # In float64: the matrix, its Gram matrix and what the eigensolver takes.
            max(8 * (m.shape[0] * m.shape[1] + 3 * min(m.shape) ** 2) for m in matrices),
            backward,
        ),
        disk=disk,
    )


def measure_cost(lm: LanguageModel, planned: Plan, task: Task, config: SearchConfig) -> CostModel:
    """Time work items at the bottom and at the top of the model, a decomposition, and a recording, on this machine.

    Args:
        lm: the unchanged model.
        planned: what ``plan`` returned.
        task: as for ``plan``.
        config: as for ``plan``.

    Raises:
        ScoringError: if the items cannot be scored.
    """
    config = config.for_task(task, has_guard=has_guard(lm, config.guards), kind=lm.kind)
    encoded = encode_splits(lm, task, config)[VALIDATION]
    scorer = PrefixScorer(lm, {VALIDATION: encoded}, batch_size=config.batch_size, memory=config.memory)
    by_size = sorted(planned.matrices, key=decomposition_flop)
    middle = next((m for m in by_size[len(by_size) // 2 :] if decomposition_flop(m) < MAX_TIMED_FLOP), by_size[0])
    weight = as_float_matrix(read_matrix(lm.model, middle))
    n = min(len(task.validation), 4 * config.batch_size)
    top = max((i for stage in planned.stages for i in stage.items if isinstance(i, ScoreTask)), key=lambda item: -item.share)
    full, high = (ScoreTask(VALIDATION, 0, n, i) for i in (BASE, top.intervention))
    times: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder, Store.open(Path(folder) / "runs.db") as store:
        settings = {"model": lm.name, "task": task.name}
        with store.run(kind="search", key="measure", settings=settings, provenance={}) as run:
            scores = full.execute(scorer)
            for result in (scores, high.execute(scorer)):
                if isinstance(result, Failure):
                    raise ScoringError(
                        f"no work item could be timed: {result.reason}; leave what cannot be scored out of the grid"
                    )
            assert not isinstance(scores, Failure)
            for turn in range(4):
                answer = replace(scores, intervention=str(turn))
                seconds = {
                    "full": _timed(lambda: full.execute(scorer)),
                    "high": _timed(lambda: high.execute(scorer)),
                    "decompose": _timed(lambda: float(basis_of(weight)[0, 0])),  # the value, so that a GPU has done it
                    "record": _timed(partial(run.record, answer, encoded.split.examples[:n])),
                }
                for name, value in seconds.items():
                    times.setdefault(name, []).append(value)
    # The first time is different: decompositions, activations and examples are new then.
    usual = {name: statistics.median(values[1:]) for name, values in times.items()}
    per_pass = max(0.0, usual["full"] - usual["high"]) / (1 - top.share) / n if top.share < 1 else usual["full"] / n
    return CostModel(
        work=per_pass,
        example=max(0.0, usual["full"] / n - per_pass),
        decompose=usual["decompose"] / decomposition_flop(middle),
        answer=usual["record"] / n,
    )


def _warn_of_full_disk(cache: Path, needed: int) -> None:
    """Warn where the disk of the cache has less than ``needed`` bytes and a tenth more."""
    folder = next(path for path in (cache.absolute(), *cache.absolute().parents) if path.exists())
    free = shutil.disk_usage(folder).free
    if free < 1.1 * needed:
        log.warning(
            "the decompositions take %.1f GiB in %s, whose disk has %.1f GiB left; free space there, or give another folder "
            "with --cache",
            needed / 2**30,
            cache,
            free / 2**30,
        )


def _timed(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


@dataclass(frozen=True)
class _PlanBuilder:
    """Builds the work items of a search as far as they are known before it."""

    lm: LanguageModel
    splits: Mapping[str, EncodedSplit]
    candidates: Sequence[Candidate]
    config: SearchConfig

    @cached_property
    def blocks(self) -> list[tuple[str, int]]:
        return list(dict.fromkeys((m.stack, m.layer) for m in self.lm.matrices))

    @property
    def screen_size(self) -> int:
        """Number of questions over which a gradient is taken."""
        if self.config.strategy == "components":
            return min(MOST_QUESTIONS, len(self.splits[VALIDATION].split) * (PARTS - 1) // PARTS)
        return screen_size(len(self.splits[VALIDATION].split), self.config)

    def stages(self, workers: int) -> tuple[Stage, ...]:
        config = self.config
        n, on_test = (len(self.splits[name].split) for name in (VALIDATION, TEST))
        interventions = [c.intervention for c in self.candidates]
        stages = [self._scores("unchanged model on test", TEST, [BASE], 0, on_test, workers)]
        if config.screens:
            cost = SCREEN_PASSES * self.screen_size
            tasks = screen_tasks(self.candidates, VALIDATION, n - self.screen_size, cost, workers)
            stages.append(Stage(SCREEN, tuple(tasks)))
        if config.strategy == "components":
            stages += self._steps(workers)
        elif config.strategy == "exhaustive":
            stages.append(self._scores("exhaustive", VALIDATION, [BASE, *interventions], 0, n, workers))
        elif config.strategy == "race":
            alive, start = config.candidates + config.random_candidates, 0
            for stop in rung_sizes(n, config.first_rung):
                entered = [BASE, *_sample_evenly(interventions, alive)]
                stages.append(self._scores(f"{RUNG} {stop}", VALIDATION, entered, start, stop, workers))
                if start:  # the neighbours that were added have to catch up
                    added = self._scores("", VALIDATION, _sample_evenly(interventions, NEIGHBOURS), 0, start, workers)
                    stages[-1] = replace(stages[-1], items=added.items + stages[-1].items)
                alive, start = max(1, int(config.keep * alive)) + NEIGHBOURS, stop
            neighbours = _sample_evenly(interventions, NEIGHBOURS)
            stages.append(self._scores("the leader's neighbours", VALIDATION, neighbours, 0, n, workers))
        else:
            # Trials come one after the other, each on top of what was accepted before it.
            number = config.candidates if config.mode == "joint" else len(interventions)
            tried = [BASE, *_sample_evenly(interventions, number)]
            stages += [self._scores("trial", VALIDATION, [trial], 0, n, workers) for trial in tried]
        stages.append(self._scores("best on test", TEST, _sample_evenly(interventions, 1), 0, on_test, workers))
        return tuple(stages)

    def _steps(self, workers: int) -> list[Stage]:
        """Return the steps of a choice of components, as many as may be tried, without their passes of the guards."""
        n, matrices = len(self.splits[VALIDATION].split), list(dict.fromkeys(c.matrix for c in self.candidates))
        scores = self._scores("trial", VALIDATION, [BASE], 0, n, workers)
        gradient = Stage(GRADIENT, tuple(contribution_tasks(VALIDATION, range(self.screen_size), BASE, matrices, workers)))
        return [scores, *[gradient, scores] * self.config.steps]

    def _scores(
        self, name: str, split: str, interventions: Sequence[Intervention], start: int, stop: int, workers: int
    ) -> Stage:
        encoded, blocks = self.splits[split], self.blocks
        shares = {i: 1 - first_changed_block(i, self.lm.matrices, blocks) / len(blocks) for i in interventions}
        most = max_sequences(encoded.count(start, stop), len(shares), workers, self.config.batch_size)
        chunks = cut(self.lm, encoded, start, stop, memory=self.config.memory / 2, most=most)
        ordered = sorted(shares, key=lambda i: -shares[i])
        return Stage(name, tuple(ScoreTask(split, a, b, i, shares[i]) for a, b in chunks for i in ordered))

    def activation_bytes(self, split: str) -> int:
        """Return the bytes of cached activations: for every block that the cache has been at, as long as there is room."""
        encoded, memory = self.splits[split], self.config.memory / 2
        tokens = 0
        for start, stop in cut(self.lm, encoded, 0, len(encoded.split), memory=memory):
            sequences = [s for s in encoded.sequences if start <= s.example < stop]
            tokens += len(sequences) * (max(len(s.ids) for s in sequences) + max(len(s.decoder) for s in sequences))
        return int(min(memory, max(2, len(self.blocks)) * tokens * self.lm.width * self.lm.dtype.itemsize))

    def derivative_bytes(self) -> int:
        """Return the bytes of the derivatives by all components, of which a quarter of the memory has room."""
        if self.config.strategy != "components":
            return 0
        K = sum(m.max_rank for m in dict.fromkeys(c.matrix for c in self.candidates))
        return int(min(self.config.memory / 4, 4 * self.screen_size * K))

    def screen_bytes(self) -> tuple[int, int]:
        """Return the bytes of what the screen holds between blocks, and of a block's pass with its gradient."""
        encoded, lm = self.splits[VALIDATION], self.lm
        _, sequences = encoded.part(range(len(encoded.split) - self.screen_size, len(encoded.split)))
        tokens = sorted((len(s.ids) + len(s.decoder) for s in sequences), reverse=True)
        of_token = (len(self.blocks) + 1) * lm.width * lm.dtype.itemsize
        boundaries = min(max(self.config.memory / 2, of_token * tokens[0]), of_token * sum(tokens))
        rows = max(1, min(self.config.batch_size, int(boundaries / of_token / tokens[0])))
        # Inputs, gradients of outputs, and their products with both factors, in float32.
        sums = 4 * rows * tokens[0] * max(sum(m.shape) + 2 * min(m.shape) for m in self.lm.matrices)
        # What passes a block stays for its gradient, which is as large.
        return int(boundaries), 2 * _pass_bytes(lm, self.splits, rows) + sums


def decomposition_flop(matrix: Matrix) -> float:
    """Return the floating-point operations of a decomposition: Gram matrix, its eigenvectors, and the other factor."""
    small, large = sorted(matrix.shape)
    return 4.0 * small * small * large + EIGENSOLVER_CUBES * float(small) ** 3


def _sample_evenly(interventions: Sequence[Intervention], n: int) -> list[Intervention]:
    """Return ``n`` of them from all over the model, for those that will be there are not known."""
    return [interventions[(2 * i + 1) * len(interventions) // (2 * n)] for i in range(min(n, len(interventions)))]


def _pass_flop(lm: LanguageModel, encoded: EncodedSplit) -> float:
    """Return the floating-point operations of a pass of one example, padding and normalisation not counted."""
    config: Any = lm.model.config
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None) or 1
    active = (getattr(config, "num_experts_per_tok", None) or experts) / experts
    of_stack: dict[str, float] = {}
    for m in lm.matrices:
        if m.part_of is None:
            share = active if m.name.startswith("experts.") else 1.0
            of_stack[m.stack] = of_stack.get(m.stack, 0.0) + 2 * share * m.shape[0] * m.shape[1]
    blocks: dict[str, int] = {m.stack: 0 for m in lm.matrices} | {m.stack: m.layer + 1 for m in lm.matrices}
    head = 2 * lm.width * int(getattr(config, "vocab_size", 0) or 0)
    flop = 0.0
    for sequence in encoded.sequences:
        for stack, weights in of_stack.items():
            tokens = len(sequence.decoder) if sequence.decoder and "decoder" in stack else len(sequence.ids)
            flop += weights * tokens + 4 * blocks[stack] * lm.width * tokens**2
        flop += head * len(sequence.positions)
    return flop / len(encoded.split)


def _pass_bytes(lm: LanguageModel, splits: Mapping[str, EncodedSplit], batch_size: int) -> int:
    """Return the bytes of one pass, about: what a block holds of its longest batch, and the logits at the scored positions."""
    sequences = [s for name, encoded in splits.items() if name != FINALISTS for s in encoded.sequences]
    longest = sorted((len(s.ids) + len(s.decoder) for s in sequences), reverse=True)[:batch_size]
    widest = max(max(m.shape) for m in lm.matrices if m.part_of is None)
    heads = int(getattr(lm.model.config, "num_attention_heads", 1) or 1)
    hidden = len(longest) * longest[0] * (4 * lm.width + 3 * widest) + len(longest) * heads * longest[0] ** 2
    most = max(len(s.positions) for s in sequences)
    positions = most * max(1, min(batch_size, MAX_SCORED_POSITIONS // most))
    logits = 2 * positions * int(getattr(lm.model.config, "vocab_size", 0) or 0) * 4
    return int(hidden * lm.dtype.itemsize + logits)
