"""What a search will take, before it begins: its work items, operations and time; ``memory_plan`` adds up the memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch

from laserlm.edit import resolve
from laserlm.models.language_model import LanguageModel
from laserlm.models.matrices import Matrix
from laserlm.paths import warn_of_full_disk
from laserlm.reductions import Intervention
from laserlm.scoring.records import TokenSequence
from laserlm.scoring.scorers import GENERATING
from laserlm.scoring.tokenize import max_length
from laserlm.searching.candidates import Candidate, expand
from laserlm.searching.components import (
    LEAST_QUESTIONS,
    PARTS,
    STEP_COMPONENTS,
    room_for_derivatives,
    separate_matrices,
)
from laserlm.searching.config import SearchConfig, Strategy
from laserlm.searching.driver import FINALISTS, TEST, VALIDATION, check, encode_splits
from laserlm.searching.guard import BATCH, OWN_TEXT, PASSAGE_TOKENS, PASSAGES, guards_of, has_guard, is_text
from laserlm.searching.ledger import BASE, cut, max_sequences
from laserlm.searching.memory_plan import HEAP, MemoryPlanner, PhaseMemory
from laserlm.searching.race import rung_sizes
from laserlm.searching.scorer import EncodedSplit, first_changed_block
from laserlm.searching.session import MAX_FINALISTS, MAX_HARMS
from laserlm.searching.simulation import WRITING, CostModel, Simulation, simulate
from laserlm.searching.strategies import screen_size
from laserlm.searching.strengths import SMALLER
from laserlm.searching.work import (
    SCREEN_PASSES,
    ContributionTask,
    ScoreTask,
    ScreenTask,
    WorkItem,
    contribution_tasks,
    screen_tasks,
)
from laserlm.tasks import Task

EIGENSOLVER_CUBES = 9
"""Floating-point operations of all eigenvectors of a symmetric matrix, in cubes of its size (Golub and Van Loan,
Matrix Computations, 4th edition, section 8.3.3)."""
RUNG, SCREEN, GRADIENT, HARM, WRITTEN = "rung to example", "screen", "gradient", "harm", "texts of the model"
EXPECTED_CORRECTIONS = 3
"""Measurements of the harm of strengths until it is near the bound, about."""
GRADIENTS = (SCREEN, GRADIENT)
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
        """Passes of one example through the full model."""
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
        generates: whether the model also writes a text for each question, under each finalist.
        pass_flop: floating-point operations of a pass of one example, on average.
        screen_flop: floating-point operations of the sums of the screen, without its passes.
        phases: memory of the ``gradient`` (of the screen, or of a choice of components) and of ``scoring``.
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
    phases: Mapping[str, PhaseMemory]
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
        """Passes of one example through the full model."""
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
    def memory(self) -> PhaseMemory:
        """The memory that a worker needs: that of the phase that takes most."""
        return max(self.phases.values(), key=lambda phase: phase.total)

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
                "weights": self.memory.weights,
                "boundary": self.memory.activations,
                "decompositions": self.memory.decompositions,
                "moment": self.memory.work,
                "kept": self.memory.kept,
                "all": self.memory.total,
            },
            "memory_of_phases": {name: phase.total for name, phase in self.phases.items()},
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
    gradients = sum(stage.name in GRADIENTS for stage in builder.stages(1))
    disk = sum((8 if lm.dtype == torch.float64 else 4) * min(m.shape) ** 2 for m in matrices if m.update_rank is None)
    warn_of_full_disk(lm.cache, disk, "the decompositions take", "--cache")
    return Plan(
        strategy=config.strategy,
        candidates=len(candidates),
        matrices=matrices,
        stages_for=builder.stages,
        is_estimate=config.strategy != "exhaustive",
        generates=config.scorer in GENERATING,
        pass_flop=_pass_flop(lm, splits[VALIDATION]),
        screen_flop=sum(2 * gradients * builder.screen_size * tokens * min(m.shape) * sum(m.shape) for m in matrices),
        phases=builder.phases(),
        disk=disk,
    )


@dataclass(frozen=True)
class _PlanBuilder:
    """Builds the work items of a search as far as they are known before it."""

    lm: LanguageModel
    splits: Mapping[str, EncodedSplit]
    candidates: Sequence[Candidate]
    config: SearchConfig

    @cached_property
    def blocks(self) -> list[tuple[str, int]]:
        return list(dict.fromkeys((m.stack, m.layer) for m in self.lm.all_matrices))

    @property
    def screen_size(self) -> int:
        """Number of questions over which a gradient is taken."""
        if self.config.is_of_components:
            n, choosing = len(self.splits[VALIDATION].split), PARTS if self.config.strategy == "strengths" else PARTS - 1
            n_components = sum(m.max_rank for m in separate_matrices(self.candidates))
            most = max(LEAST_QUESTIONS * choosing, room_for_derivatives(self.config, n_components))
            return min(most, n * choosing // PARTS)
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
        if config.is_of_components:
            stages += self._steps(workers)
        elif config.strategy == "exhaustive":
            stages.append(self._scores("exhaustive", VALIDATION, [BASE, *interventions], 0, n, workers))
        elif config.strategy == "race":
            for start, stop, alive in self._rungs():
                entered = [BASE, *_sample_evenly(interventions, alive)]
                stages.append(self._scores(f"{RUNG} {stop}", VALIDATION, entered, start, stop, workers))
                if start:  # the neighbours that were added have to catch up
                    added = self._scores("", VALIDATION, _sample_evenly(interventions, NEIGHBOURS), 0, start, workers)
                    stages[-1] = replace(stages[-1], items=added.items + stages[-1].items)
            neighbours = _sample_evenly(interventions, NEIGHBOURS)
            stages.append(self._scores("the leader's neighbours", VALIDATION, neighbours, 0, n, workers))
        else:
            # Trials come one after the other, each on top of what was accepted before it.
            number = config.candidates if config.mode == "joint" else len(interventions)
            tried = [BASE, *_sample_evenly(interventions, number)]
            stages += [self._scores("trial", VALIDATION, [trial], 0, n, workers) for trial in tried]
        stages.append(self._scores("best on test", TEST, _sample_evenly(interventions, 1), 0, on_test, workers))
        return (*stages, *self._texts(), *self._harm())

    def _rungs(self) -> list[tuple[int, int, int]]:
        """Return of each rung of a race its first example, the end of its examples, and about how many candidates are in it."""
        alive, start, rungs = self.config.candidates + self.config.random_candidates, 0, []
        for stop in rung_sizes(len(self.splits[VALIDATION].split), self.config.first_rung):
            rungs.append((start, stop, min(alive, len(self.candidates))))
            alive, start = max(1, int(self.config.keep * alive)) + NEIGHBOURS, stop
        return rungs

    def _compared_harms(self) -> int:
        """Return about how many candidates have their harm measured for the list of gain against harm."""
        at_the_end = {"exhaustive": len(self.candidates), "race": self._rungs()[-1][2] + NEIGHBOURS}
        return min(MAX_HARMS, at_the_end.get(self.config.strategy or "", 0), len(self.candidates))

    def _steps(self, workers: int) -> list[Stage]:
        """Return the steps of a choice of components, as many as may be tried."""
        n, matrices = len(self.splits[VALIDATION].split), list(dict.fromkeys(c.matrix for c in self.candidates))
        scores = self._scores("trial", VALIDATION, [BASE], 0, n, workers)
        gradient = Stage(GRADIENT, tuple(contribution_tasks(VALIDATION, range(self.screen_size), BASE, matrices, workers)))
        if self.config.strategy == "strengths":  # the looks at the parts, the choice and the smaller ones
            return [scores, gradient, *[scores] * (2 + len(SMALLER))]
        return [scores, *[gradient, scores] * self.config.steps]

    def _texts(self) -> list[Stage]:
        """Return the texts that are written under the unchanged model, the finalists, and the choice on test."""
        if self.config.scorer not in GENERATING:
            return []
        n, on_test = (len(self.splits[name].split) for name in (VALIDATION, TEST))
        is_chosen = self.config.is_of_components or self.config.metric == "loss"
        texts, batch = n * (1 + (1 if is_chosen else MAX_FINALISTS)) + 2 * on_test, self.config.batch_size
        chunks = (ScoreTask(WRITING, a, min(a + batch, texts), BASE) for a in range(0, texts, batch))
        return [Stage(WRITTEN, tuple(chunks))]

    def _harm(self) -> list[Stage]:
        """Return the passes of the guards, as passes of as many examples as have the same number of tokens."""
        encoded = self.splits[VALIDATION]
        tokens = sum(len(s.ids) + len(s.decoder) for s in encoded.sequences) / len(encoded.split)
        n = math.ceil(sum(len(s.ids) + len(s.decoder) for rows in self.guards for s in rows) / tokens)
        measurements = 2  # of the unchanged model and of the choice
        if self.config.strategy == "strengths":
            # Of a text one gradient gives all that is needed, of questions two.
            gradients = 1 if all(is_text(source) for source in self._sources if isinstance(source, str)) else 2
            measurements += 1 + EXPECTED_CORRECTIONS + len(SMALLER) + gradients * SCREEN_PASSES
        elif self.config.strategy == "components":
            measurements += 1 + self.config.steps + SCREEN_PASSES
        compared = _sample_evenly([c.intervention for c in self.candidates], self._compared_harms())
        measured = [BASE] * (measurements + bool(compared)) + compared
        shares = self._shares(measured)
        items = tuple(ScoreTask(HARM, k * n, (k + 1) * n, i, shares[i]) for k, i in enumerate(measured))  # no two are equal
        return [Stage(HARM, items)] if self.guards else []

    def _shares(self, interventions: Sequence[Intervention]) -> dict[Intervention, float]:
        """Return of each the part of the blocks that a pass has to run."""
        n = len(self.blocks)
        return {i: 1 - first_changed_block(i, self.lm.matrices, self.blocks) / n for i in interventions}

    def _scores(
        self, name: str, split: str, interventions: Sequence[Intervention], start: int, stop: int, workers: int
    ) -> Stage:
        encoded, shares = self.splits[split], self._shares(interventions)
        most = max_sequences(encoded.count(start, stop), len(shares), workers, self.config.batch_size)
        chunks = cut(self.lm, encoded, start, stop, memory=self.config.memory / 2, most=most)
        ordered = sorted(shares, key=lambda i: -shares[i])
        return Stage(name, tuple(ScoreTask(split, a, b, i, shares[i]) for a, b in chunks for i in ordered))

    def phases(self) -> dict[str, PhaseMemory]:
        """Return the memory of each phase."""
        config, encoded = self.config, self.splits[VALIDATION]
        matrices = separate_matrices(self.candidates)
        planner = MemoryPlanner(self.lm, matrices, config.memory, config.batch_size)
        phases, derivatives = dict[str, PhaseMemory](), 0
        if config.is_of_components:
            n_components = sum(m.max_rank for m in matrices)
            n = self.screen_size
            passages_kept = sum(min(PASSAGES, rows[-1].example + 1) for rows in self.guards)
            derivatives = 4 * (n + (passages_kept if config.strategy == "strengths" else 0)) * n_components
            gradients = [planner.gradient(encoded.part(range(n))[1], config.memory / 4, results=n)]
            kept = PASSAGES + 1 if config.strategy == "strengths" else 1
            gradients += [planner.gradient(rows, config.memory / 4, results=kept) for rows in self.guards]
            phases["gradient"] = max(gradients, key=lambda phase: phase.total)
        elif config.screens:
            _, rows = encoded.part(range(len(encoded.split) - self.screen_size, len(encoded.split)))
            phases["gradient"] = planner.gradient(rows, config.memory / 2)
        n_edited = {"components": min(len(matrices), STEP_COMPONENTS), "strengths": len(matrices)}
        scored = [*self.guards, *(encoded.sequences for name, encoded in self.splits.items() if name != FINALISTS)]
        phases["scoring"] = planner.scoring(
            [sorted(rows, key=lambda s: -len(s.ids) - len(s.decoder))[: config.batch_size] for rows in scored],
            derivatives + max(self.activation_bytes(name) for name in (VALIDATION, TEST)),
            n_edited=n_edited.get(config.strategy or "", 1),
            is_decomposed=bool(phases),
        )
        is_kept = self._writes_guard and self.lm.device.type == "cpu"
        kept = planner.writing(BATCH, min(PASSAGE_TOKENS, max_length(self.lm) - 1)) if is_kept else 0
        heap = {"gradient": HEAP} if self.lm.device.type == "cpu" else {}  # the unchanged model is scored on test before it
        return {name: replace(phase, kept=kept + heap.get(name, 0)) for name, phase in phases.items()}

    @property
    def _writes_guard(self) -> bool:
        """Whether a guard is text that the model writes."""
        return has_guard(self.lm, self.config.guards) and OWN_TEXT in (self.config.guards or (OWN_TEXT,))

    @cached_property
    def guards(self) -> list[Sequence[TokenSequence]]:
        """The sequences by which each guard chooses; those of a text that is not written yet by their size."""
        if not has_guard(self.lm, self.config.guards):
            return []
        ids = (0,) * min(PASSAGE_TOKENS, max_length(self.lm) - 1)
        own = [TokenSequence(i, ids, ids, tuple(range(len(ids)))) for i in range(PASSAGES)]
        return [own if source == OWN_TEXT else guards_of(self.lm, [source])[0].choosing.sequences for source in self._sources]

    @property
    def _sources(self) -> tuple[str | Task, ...]:
        """What the guards are read from."""
        return (OWN_TEXT,) if self.config.guards is None else self.config.guards

    def activation_bytes(self, split: str) -> int:
        """Return the bytes of cached activations: for every block that the cache has been at, as long as there is room."""
        encoded, memory = self.splits[split], self.config.memory / 2
        tokens = 0
        for start, stop in cut(self.lm, encoded, 0, len(encoded.split), memory=memory):
            sequences = [s for s in encoded.sequences if start <= s.example < stop]
            tokens += len(sequences) * (max(len(s.ids) for s in sequences) + max(len(s.decoder) for s in sequences))
        return int(min(memory, max(2, len(self.blocks)) * tokens * self.lm.width * self.lm.dtype.itemsize))


def decomposition_flop(matrix: Matrix) -> float:
    """Return the floating-point operations of a decomposition: Gram matrix, its eigenvectors, and the other factor."""
    if matrix.update_rank is not None:  # two factors, each made orthonormal, and their small product
        return 8.0 * matrix.max_rank**2 * sum(matrix.shape)
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
    for m in lm.all_matrices:
        if m.part_of is None:
            share = active if m.name.startswith("experts.") else 1.0
            of_stack[m.stack] = of_stack.get(m.stack, 0.0) + 2 * share * m.shape[0] * m.shape[1]
    blocks: dict[str, int] = {m.stack: 0 for m in lm.all_matrices} | {m.stack: m.layer + 1 for m in lm.all_matrices}
    head = 2 * lm.width * int(getattr(config, "vocab_size", 0) or 0)
    flop = 0.0
    for sequence in encoded.sequences:
        for stack, weights in of_stack.items():
            tokens = len(sequence.decoder) if sequence.decoder and "decoder" in stack else len(sequence.ids)
            flop += weights * tokens + 4 * blocks[stack] * lm.width * tokens**2
        flop += head * len(sequence.positions)
    return flop / len(encoded.split)
