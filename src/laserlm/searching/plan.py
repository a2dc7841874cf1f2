"""What a search will take, before it is begun: its pieces, operations, memory and time."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from laserlm.edit import resolve
from laserlm.errors import ScoringError
from laserlm.linalg.decomposition import as_float_matrix, basis_of
from laserlm.models.language_model import LanguageModel
from laserlm.models.matrices import Matrix, read_matrix
from laserlm.reductions import Grid, Intervention
from laserlm.scoring.forward import PLACES
from laserlm.searching.candidates import Candidate, expand
from laserlm.searching.desk import EncodedSplit, ScoreTask, ScreenTask, WorkerState, WorkItem, first_changed_block
from laserlm.searching.driver import FINALISTS, TEST, VALIDATION, check, encode_splits
from laserlm.searching.ledger import cut, max_examples, rows_between
from laserlm.searching.race import RaceOptions, rung_sizes
from laserlm.searching.result import Mode, Strategy
from laserlm.searching.session import SCREEN_PASSES, screen_size, screen_tasks
from laserlm.searching.simulation import CostModel, Simulation, simulate
from laserlm.store import Store
from laserlm.tasks import GENERATING, Scorer, Task

__all__ = ["Plan", "Stage", "measure_cost", "plan"]

BASE = Intervention()
EIGEN = 9
"""Floating-point operations of all eigenvectors of a symmetric matrix, in cubes of its size (Golub and Van Loan,
Matrix Computations, 4th edition, section 8.3.3)."""
RUNG = "rung to example"
LONG = 1e12
"""Floating-point operations of a decomposition that is not worth timing four times."""
JOINED = 2
"""Neighbours in rho of the leader that join a race after each rung."""


@dataclass(frozen=True)
class Stage:
    """Pieces that can all be done at once.

    Args:
        name: what is done.
        pieces: the pieces.
    """

    name: str
    pieces: tuple[WorkItem, ...] = field(repr=False)

    @property
    def passes(self) -> float:
        """Passes of one example through the whole model."""
        return sum(piece.work for piece in self.pieces)


@dataclass(frozen=True)
class Plan:
    """What a search will take.

    Args:
        strategy: how it goes on.
        candidates: number of candidates.
        matrices: those that have to be decomposed.
        stages_for: returns what is done, one after the other, for a number of workers.
        about: whether more or less may be needed: what loses early leaves early, and neighbours of the leader join.
        writes: whether the model also writes for each finalist, which is not counted.
        pass_flop: floating-point operations of a pass of one example, on average.
        screen_flop: those of the screen's sums, beside its passes.
        weights: bytes of the model.
        boundary: bytes of the boundaries that the frontier keeps.
        decompositions: bytes of decompositions that are held.
        moment: bytes that are needed for a moment: by a pass, a decomposition or the screen, whichever takes most, about.
    """

    strategy: Strategy
    candidates: int
    matrices: tuple[Matrix, ...] = field(repr=False)
    stages_for: Callable[[int], tuple[Stage, ...]] = field(repr=False)
    about: bool
    writes: bool
    pass_flop: float
    screen_flop: float
    weights: int
    boundary: int
    decompositions: int
    moment: int

    @cached_property
    def stages(self) -> tuple[Stage, ...]:
        """What one process does, one stage after the other."""
        return self.stages_for(1)

    @property
    def pieces(self) -> int:
        """Number of pieces."""
        return sum(len(stage.pieces) for stage in self.stages)

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
        """Bytes that a worker needs, beside what PyTorch itself takes."""
        return self.weights + self.boundary + self.decompositions + self.moment

    @cached_property
    def of_matrix(self) -> dict[str, float]:
        """Floating-point operations of the decomposition of each matrix, by its id."""
        return {m.id: decomposition_flop(m) for m in self.matrices}

    def simulate(self, workers: int, pace: CostModel, **given: Any) -> Simulation:
        """Return how long it takes with so many workers; see ``simulation.simulate``."""
        stages = self.stages_for(workers)
        rungs = [number for number, stage in enumerate(stages) if stage.name.startswith(RUNG)]
        known: dict[Intervention, Mapping[str, float]] = {}

        def needs(piece: WorkItem) -> Mapping[str, float]:
            if isinstance(piece, ScreenTask):
                return {c.matrix.id: self.of_matrix[c.matrix.id] for c in piece.candidates}
            if not isinstance(piece, ScoreTask) or not piece.intervention:
                return {}
            if piece.intervention not in known:
                ids = {e.matrix.id for e in resolve(self.matrices, piece.intervention)}
                known[piece.intervention] = {id: self.of_matrix[id] for id in ids & self.of_matrix.keys()}
            return known[piece.intervention]

        pieces = [stage.pieces for stage in stages]
        return simulate(pieces, workers, pace, decompositions=needs, early=rungs[1:], **given)

    def as_dict(self) -> dict[str, Any]:
        """Return the figures as plain JSON values."""
        return {
            "strategy": self.strategy,
            "candidates": self.candidates,
            "matrices": len(self.matrices),
            "stages": [{"name": s.name, "pieces": len(s.pieces), "passes": s.passes} for s in self.stages],
            "pieces": self.pieces,
            "passes": self.passes,
            "about": self.about,
            "writes": self.writes,
            "flop": {
                "passes": self.passes * self.pass_flop,
                "screen": self.screen_flop,
                "decompositions": self.decomposition_flop,
                "all": self.flop,
            },
            "memory": {
                "weights": self.weights,
                "boundary": self.boundary,
                "decompositions": self.decompositions,
                "moment": self.moment,
                "all": self.memory,
            },
        }


def plan(
    lm: LanguageModel,
    task: Task,
    *,
    strategy: Strategy = "race",
    grid: str | Grid = "fine",
    scorer: Scorer | None = None,
    batch_size: int = 32,
    seed: int = 0,
    memory: float = 2**30,
    mode: Mode = "joint",
    options: RaceOptions | None = None,
) -> Plan:
    """Tell what a search will take, from the shapes of the model and the tokens of the task; the model is not run.

    Args:
        lm: the model; its weights may be on the meta device.
        task: as of ``search``, and so are the others.
        strategy: likewise.
        grid: likewise.
        scorer: likewise.
        batch_size: likewise.
        seed: likewise.
        memory: likewise.
        mode: likewise.
        options: likewise.

    Raises:
        LaserError: if the grid, the task or the model cannot be used.
    """
    scorer = scorer or task.validation.scorer
    options = options or RaceOptions()
    check(lm, task)
    candidates = expand(grid, lm.matrices)
    materials = encode_splits(lm, task, scorer, seed)
    made = _Maker(lm, materials, candidates, strategy, mode, options, memory, batch_size)
    matrices = tuple(dict.fromkeys(c.matrix for c in candidates))
    rows = materials[VALIDATION].rows
    tokens = sum(len(r.ids) + len(r.decoder) for r in rows) / len(task.validation)
    examples = made.screened if made.screens else 0
    held = [4 * min(m.shape) * sum(m.shape) for m in matrices]
    of_block: dict[tuple[str, int], int] = {}
    for m, size in zip(matrices, held, strict=True):
        of_block[m.stack, m.layer] = of_block.get((m.stack, m.layer), 0) + size
    return Plan(
        strategy=strategy,
        candidates=len(candidates),
        matrices=matrices,
        stages_for=made.stages,
        about=strategy != "exhaustive",
        writes=scorer in GENERATING,
        pass_flop=_pass_flop(lm, materials[VALIDATION]),
        screen_flop=sum(2 * examples * tokens * min(m.shape) * sum(m.shape) for m in matrices),
        weights=sum({p.data_ptr() or id(p): p.numel() * p.element_size() for p in lm.model.parameters()}.values()),
        boundary=max(made.boundary(name) for name in (VALIDATION, TEST)),
        # The screen holds all of a block, whatever the bound.
        decompositions=int(max(min(memory, sum(held)), max(of_block.values()) if made.screens else max(held))),
        moment=max(
            _activations(lm, materials, batch_size),
            # In float64: the matrix, its Gram matrix and what the eigensolver takes.
            max(8 * (m.shape[0] * m.shape[1] + 3 * min(m.shape) ** 2) for m in matrices),
            int(len(made.blocks) * examples * tokens * lm.width * lm.dtype.itemsize),
        ),
    )


def measure_cost(lm: LanguageModel, made: Plan, task: Task, *, scorer: Scorer | None = None, batch_size: int = 32) -> CostModel:
    """Time a unit of a plan at the bottom and at the top of the model, a decomposition, and a recording, on this machine.

    Args:
        lm: the unchanged model.
        made: what ``plan`` returned.
        task: as of the plan, and so are the others.
        scorer: likewise.
        batch_size: likewise.
    """
    material = encode_splits(lm, task, scorer or task.validation.scorer, 0)[VALIDATION]
    desk = WorkerState(lm, {VALIDATION: material}, batch=batch_size)
    by_size = sorted(made.matrices, key=decomposition_flop)
    middle = next((m for m in by_size[len(by_size) // 2 :] if decomposition_flop(m) < LONG), by_size[0])
    weight = as_float_matrix(read_matrix(lm.model, middle))
    n = min(len(task.validation), 4 * batch_size)
    top = max((p for stage in made.stages for p in stage.pieces if isinstance(p, ScoreTask)), key=lambda p: -p.share)
    whole, high = (ScoreTask(VALIDATION, 0, n, i) for i in (BASE, top.intervention))
    times: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder, Store.open(Path(folder) / "runs.db") as store:
        settings = {"model": lm.name, "task": task.name}
        with store.run(kind="search", key="calibrate", settings=settings, provenance={}) as run:
            scores = whole.do(desk)
            for result in (scores, high.do(desk)):
                if isinstance(result, str):
                    raise ScoringError(f"no unit could be timed: {result}; leave what cannot be scored out of the grid")
            if isinstance(scores, str):
                raise AssertionError("told above")
            answers = [replace(scores, intervention=str(turn)) for turn in range(4)]
            for answer in answers:
                found = {
                    "whole": _timed(lambda: whole.do(desk)),
                    "high": _timed(lambda: high.do(desk)),
                    "decompose": _timed(lambda: float(basis_of(weight)[0, 0])),  # the value, so that a GPU has done it
                    "record": _timed(partial(run.record, answer, material.split.examples[:n])),
                }
                for name, seconds in found.items():
                    times.setdefault(name, []).append(seconds)
    # The first time is one of its own: decompositions, boundaries and examples are new then.
    usual = {name: statistics.median(found[1:]) for name, found in times.items()}
    work = max(0.0, usual["whole"] - usual["high"]) / (1 - top.share) / n if top.share < 1 else usual["whole"] / n
    return CostModel(
        work=work,
        example=max(0.0, usual["whole"] / n - work),
        decompose=usual["decompose"] / decomposition_flop(middle),
        answer=usual["record"] / n,
    )


def _timed(do: Callable[[], Any]) -> float:
    start = time.perf_counter()
    do()
    return time.perf_counter() - start


@dataclass(frozen=True)
class _Maker:
    """Makes the pieces of a search as far as they are known before it."""

    lm: LanguageModel
    materials: Mapping[str, EncodedSplit]
    candidates: Sequence[Candidate]
    strategy: Strategy
    mode: Mode
    options: RaceOptions
    memory: float
    batch: int

    @cached_property
    def blocks(self) -> list[tuple[str, int]]:
        return list(dict.fromkeys((m.stack, m.layer) for m in self.lm.matrices))

    @property
    def screens(self) -> bool:
        return self.strategy == "race" or (self.strategy == "compose" and self.mode == "joint")

    @property
    def screened(self) -> int:
        return screen_size(len(self.materials[VALIDATION].split), self.options)

    def stages(self, workers: int) -> tuple[Stage, ...]:
        n, on_test = (len(self.materials[name].split) for name in (VALIDATION, TEST))
        every = [c.intervention for c in self.candidates]
        stages = [self.scores("unchanged model on test", TEST, [BASE], (0, on_test), workers)]
        if self.screens:
            shares = screen_tasks(self.candidates, VALIDATION, n - self.screened, SCREEN_PASSES * self.screened, workers)
            stages.append(Stage("screen", tuple(shares)))
        if self.strategy == "exhaustive":
            stages.append(self.scores("exhaustive", VALIDATION, [BASE, *every], (0, n), workers))
        elif self.strategy == "race":
            alive, start = self.options.width + self.options.controls, 0
            for stop in rung_sizes(n, self.options.first):
                stages.append(self.scores(f"{RUNG} {stop}", VALIDATION, [BASE, *_spread(every, alive)], (start, stop), workers))
                if start:  # those that joined have to catch up
                    joined = self.scores("", VALIDATION, _spread(every, JOINED), (0, start), workers)
                    stages[-1] = replace(stages[-1], pieces=joined.pieces + stages[-1].pieces)
                alive, start = max(1, int(self.options.keep * alive)) + JOINED, stop
            stages.append(self.scores("the leader's neighbours", VALIDATION, _spread(every, JOINED), (0, n), workers))
        else:
            # Trials come one after the other, each on what was accepted before it.
            number = self.options.width if self.mode == "joint" else len(every)
            tried = [BASE, *_spread(every, number)]
            stages += [self.scores("trial", VALIDATION, [trial], (0, n), workers) for trial in tried]
        stages.append(self.scores("best on test", TEST, _spread(every, 1), (0, on_test), workers))
        return tuple(stages)

    def scores(
        self, name: str, material: str, interventions: Sequence[Intervention], where: tuple[int, int], workers: int
    ) -> Stage:
        shares = {i: 1 - first_changed_block(i, self.lm.matrices, self.blocks) / len(self.blocks) for i in interventions}
        most = max_examples(rows_between(self.materials[material], *where), len(shares), workers, self.batch)
        chunks = cut(self.lm, self.materials[material], where, memory=self.memory, most=most)
        ordered = sorted(shares, key=lambda i: -shares[i])
        return Stage(name, tuple(ScoreTask(material, a, b, i, shares[i]) for a, b in chunks for i in ordered))

    def boundary(self, material: str) -> int:
        """Return the bytes of what the frontier keeps: a boundary for every block it has come to, as long as there is room."""
        found = self.materials[material]
        sizes = [
            len(rows) * (max(len(r.ids) for r in rows) + max(len(r.decoder) for r in rows))
            for a, b in cut(self.lm, found, (0, len(found.split)), memory=self.memory)
            for rows in [[r for r in found.rows if a <= r.example < b]]
        ]
        return int(min(self.memory, max(2, len(self.blocks)) * sum(sizes) * self.lm.width * self.lm.dtype.itemsize))


def decomposition_flop(matrix: Matrix) -> float:
    """Return the floating-point operations of a decomposition: Gram matrix, its eigenvectors, and the other factor."""
    small, large = sorted(matrix.shape)
    return 4.0 * small * small * large + EIGEN * float(small) ** 3


def _spread(interventions: Sequence[Intervention], n: int) -> list[Intervention]:
    """Return ``n`` of them from all over the model, for those that will be there are not known."""
    return [interventions[(2 * i + 1) * len(interventions) // (2 * n)] for i in range(min(n, len(interventions)))]


def _pass_flop(lm: LanguageModel, material: EncodedSplit) -> float:
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
    found = 0.0
    for row in material.rows:
        for stack, weights in of_stack.items():
            tokens = len(row.decoder) if row.decoder and "decoder" in stack else len(row.ids)
            found += weights * tokens + 4 * blocks[stack] * lm.width * tokens**2
        found += head * len(row.places)
    return found / len(material.split)


def _activations(lm: LanguageModel, materials: Mapping[str, EncodedSplit], batch: int) -> int:
    """Return the bytes of one pass, about: what a block holds of its longest batch, and the logits at the scored places."""
    rows = [row for name, material in materials.items() if name != FINALISTS for row in material.rows]
    longest = sorted((len(r.ids) + len(r.decoder) for r in rows), reverse=True)[:batch]
    widest = max(max(m.shape) for m in lm.matrices if m.part_of is None)
    heads = int(getattr(lm.model.config, "num_attention_heads", 1) or 1)
    hidden = len(longest) * longest[0] * (4 * lm.width + 3 * widest) + len(longest) * heads * longest[0] ** 2
    most = max(len(r.places) for r in rows)
    places = most * max(1, min(batch, PLACES // most))
    logits = 2 * places * int(getattr(lm.model.config, "vocab_size", 0) or 0) * 4
    return int(hidden * lm.dtype.itemsize + logits)
