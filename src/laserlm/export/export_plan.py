"""What ``save`` and ``compress`` will take: memory of each phase and bytes on disks, from shapes; the model is not run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from laserlm.edit.apply import InterventionLike, default_cache, resolve
from laserlm.edit.factors import StoredMatrix, reason_not_factorable
from laserlm.export.calibration_text import PASSAGE_TOKENS, REFINEMENT_TOKENS, read_calibration_text
from laserlm.export.checkpoint import Form, SaveOptions, check_request
from laserlm.export.compression import check_choices, check_compression
from laserlm.export.fitting import Allocation, Method, budget_of, compressible
from laserlm.export.gguf_file import BITS, OutType
from laserlm.export.source import Source
from laserlm.linalg.pivots import PART_BYTES, parameters, rank_within
from laserlm.models.language_model import LanguageModel
from laserlm.models.loading import dtype_named
from laserlm.models.matrices import Matrix
from laserlm.paths import warn_of_full_disk
from laserlm.scoring.batch import MAX_SCORED_POSITIONS
from laserlm.scoring.output_layer import HALF
from laserlm.scoring.records import TokenSequence
from laserlm.scoring.tokenize import encode, max_length
from laserlm.searching.guard import BATCH
from laserlm.searching.memory_plan import (
    HEAP,
    MemoryPlanner,
    PhaseMemory,
    decomposed_bytes,
    decomposing_bytes,
)
from laserlm.tasks.perplexity import passages

CALIBRATION_BATCH = 4
"""Rows of a pass of the calibration."""
MULTIPLIED_OUT = 12
"""Bytes for each number of a matrix whose factors are multiplied out: rows by part, side by side and in order, in float32."""
SAME_INPUT = (("q_proj", "k_proj", "v_proj"), ("fc_in", "fc_up"))
"""Names of matrices that usually have one input, whose moments are one tensor."""


@dataclass(frozen=True)
class ExportPlan:
    """The memory and the disk that saving or compressing a model takes.

    Args:
        phases: memory of each phase, in their order.
        folder_bytes: bytes of the weights in the folder that is written.
        temporary_bytes: further bytes on the disk of that folder until it is complete.
        cache_bytes: bytes that the cache folder grows by at most.
    """

    phases: Mapping[str, PhaseMemory]
    folder_bytes: int
    temporary_bytes: int
    cache_bytes: int

    @property
    def memory(self) -> PhaseMemory:
        """The memory of the phase that takes most."""
        return max(self.phases.values(), key=lambda phase: phase.total)

    def as_dict(self) -> dict[str, Any]:
        """Return the figures as plain JSON values, in bytes."""
        return {
            "memory": self.memory.total,
            "memory_of_phases": {name: phase.total for name, phase in self.phases.items()},
            "disk": self.folder_bytes,
            "disk_meanwhile": self.temporary_bytes,
            "disk_of_cache": self.cache_bytes,
        }

    def warn_of_full_disks(self, out: Path, cache: Path) -> None:
        """Warn where a disk has less than is planned for it."""
        warn_of_full_disk(out, self.folder_bytes + self.temporary_bytes, "the saved model takes", "--out")
        warn_of_full_disk(cache, self.cache_bytes, "the decompositions take", "--cache")


def plan_save(
    lm: LanguageModel,
    intervention: InterventionLike,
    *,
    form: Form | Literal["gguf"] = "dense",
    outtype: OutType = "f16",
    dtype: str | torch.dtype | None = None,
) -> ExportPlan:
    """Return what ``save`` with the same arguments will take.

    Raises:
        LaserError: if the intervention cannot be applied to the model, or ``save`` refuses the model, form or dtype.
    """
    check_request(lm, _any_folder(lm), SaveOptions("dense" if form == "gguf" else form, dtype))
    edits = [edit for edit in resolve(lm.matrices, intervention) if not edit.is_identity]
    matrices = list(dict.fromkeys(edit.matrix for edit in edits))
    sizes = _Sizes(lm, lm.dtype if dtype is None else dtype_named(dtype))
    kept = {e.matrix.id: reason_not_factorable(lm, e.matrix) if form == "factored" else "dense" for e in edits}
    stored = [StoredMatrix.of(edit, kept[edit.matrix.id]) for edit in edits]
    values = sum(m.parameters for m in stored)
    held = _held(lm, matrices)
    phases = {"reducing": sizes.reducing(values * lm.dtype.itemsize, matrices, held)}
    saved = sizes.saved - sum(m.shape[0] * m.shape[1] for m in stored) * sizes.itemsize + values * sizes.itemsize
    if form == "adapter":
        itemsize = torch.promote_types(lm.dtype, torch.float32).itemsize if dtype is None else sizes.itemsize
        factors = itemsize * sum(sum(e.matrix.shape) * len(e.strengths) * e.reduction.split for e in edits)
        phases = {"reducing": sizes.reducing(factors, matrices, held), "writing": sizes.writing(factors, sizes.weights, held)}
        return ExportPlan(phases, factors, 0, _bases(lm, matrices))
    phases["writing"] = sizes.writing(values * lm.dtype.itemsize, saved, held)
    source = Source.of(lm)
    if source is not None and source.packed:
        is_cast = dtype is not None or lm.loaded is None or bool(lm.loaded["dtype"])
        saved = source.bytes_with_floats({m.path for m in matrices}, lm.dtype, sizes.dtype if is_cast else None)
    temporary = 0
    if form == "gguf":
        saved, temporary = int(sizes.parameters * BITS[outtype] / 8), saved
    return ExportPlan(phases, saved, temporary, _bases(lm, matrices))


def plan_compression(
    lm: LanguageModel,
    *,
    ratio: float,
    measure: Sequence[float] = (),
    calibration: str | Path | None = None,
    method: Method = "two-sided",
    allocation: Allocation = "curvature",
    tokens: int = 16_384,
    dense_above: float | None = None,
    rank_multiple: int | None = None,
    refine: int = 0,
    products: str | None = None,
    quantised: bool = False,
    memory: float | None = None,
    form: Form = "factored",
    dtype: str | torch.dtype | None = None,
) -> ExportPlan:
    """Return what ``compress`` with the same arguments will take.

    Raises:
        ExportError: if ``compress`` refuses an argument or the model, or the text cannot be read.
    """
    check_compression(lm, _any_folder(lm), SaveOptions(form, dtype))
    ratios = [ratio, *measure]
    shares: dict[str, Any] = {"dense_above": dense_above, "rank_multiple": rank_multiple}
    choices: dict[str, Any] = {"products": products, "quantised": quantised}
    has_text = check_choices(lm, ratios, calibration, method, allocation, refine, **shares, **choices)
    matrices, left_out = compressible(lm)
    sizes = _Sizes(lm, lm.dtype if dtype is None else dtype_named(dtype))
    planner = MemoryPlanner(lm, matrices, 0, CALIBRATION_BATCH)
    size = sum(m.shape[0] * m.shape[1] for m in matrices)
    factors = {at: int(budget_of(matrices, left_out, at)) for at in ratios}  # raises if a ratio is too small
    new = factors[ratio] if form == "factored" else size
    applied = max(factors.values()) if form == "factored" else size
    ranks = {at: [rank_within(m.shape, int(at * m.shape[0] * m.shape[1])) for m in matrices] for at in ratios}  # about
    kept_on_disk = sum(map(decomposed_bytes, matrices))
    for of_ratio in ranks.values():  # pivots and coefficients
        kept_on_disk += sum(parameters(m.shape, rank) * lm.dtype.itemsize for m, rank in zip(matrices, of_ratio, strict=True))
    phases: dict[str, PhaseMemory] = {}
    heap = HEAP if lm.device.type == "cpu" else 0
    rows, held_out = _text(lm, calibration, tokens)
    if calibration is None and has_text:
        phases["text"] = PhaseMemory(sizes.weights, work=planner.writing(BATCH, PASSAGE_TOKENS))
    bound = math.inf if memory is None else memory
    if method == "two-sided" or allocation == "curvature":
        phases["gradients"] = _gradients(planner, rows, bound)
        kept_on_disk += sum(4 * m.shape[0] ** 2 for m in matrices)
    phases["decompositions"] = _decompositions(planner, rows, method)
    if allocation == "sensitivity":
        phases["sensitivities"] = _gradients(planner, rows, bound, along_components=True)
    if refine:
        phases["refinement"] = _refinement(planner, max(factors.values()))
        of_files = [3 * 4 * n for n in factors.values()]  # the factors and two averages in float32, a file for each ratio
        kept_on_disk += sum(of_files) + max(of_files)  # a file stays until the next one is complete
    if has_text:
        scored = max(planner.logits_bytes(batch) + planner.pass_bytes(batch) for batch in _batches(held_out))
        made = 0 if form == "factored" else max(MULTIPLIED_OUT * m.shape[0] * m.shape[1] for m in matrices)
        phases["perplexity"] = PhaseMemory(sizes.weights, 0, applied * lm.dtype.itemsize, max(scored, made), heap)
    if quantised:
        phases["quantised"] = PhaseMemory(sizes.weights, decompositions=sizes.parameters * lm.dtype.itemsize, work=scored)
    saved = sizes.saved - (size - new) * sizes.itemsize
    written = sizes.writing(new * lm.dtype.itemsize, saved, 0)
    phases["writing"] = replace(written, kept=heap)
    chosen_in = "refinement" if refine else "perplexity" if has_text else "writing"
    pivots = _pivots(planner, ranks, max(factors.values()))
    phases[chosen_in] = max(phases[chosen_in], pivots, key=lambda phase: phase.total)
    return ExportPlan(phases, saved, 0, kept_on_disk)


def _any_folder(lm: LanguageModel) -> Path:
    """Return a folder that may be written: the one that is meant is checked where it is named."""
    return lm.cache / "planned"


class _Sizes:
    """Bytes of a model in memory, and saved in a dtype."""

    def __init__(self, lm: LanguageModel, dtype: torch.dtype) -> None:
        own = {p.data_ptr() or id(p): p for p in lm.model.parameters()}.values()
        blocks = [b for module in lm.model.modules() if isinstance(module, torch.nn.ModuleList) for b in module]
        of_block = [sum(p.numel() for p in block.parameters()) for block in blocks]
        inside = {id(p) for block in blocks for p in block.parameters()}
        self.lm = lm
        self.dtype = dtype
        self.itemsize = dtype.itemsize
        self.parameters = sum(p.numel() for p in own)
        self.weights = MemoryPlanner(lm, (), 0, 1).weights
        self.saved = sum(p.numel() * (dtype.itemsize if p.dtype == lm.dtype else p.itemsize) for p in own)
        self._widened = 0 if dtype not in HALF else 4 * (max(of_block) + sum(p.numel() for p in own if id(p) not in inside))

    def reducing(self, new: int, matrices: Sequence[Matrix], held: int) -> PhaseMemory:
        """Return the memory of the last reduction: all new values, and the work of a matrix."""
        work = max((decomposing_bytes(m, self.lm.dtype) + 4 * m.shape[0] * m.shape[1] for m in matrices), default=0)
        return PhaseMemory(self.weights, new, held, work)

    def writing(self, new: int, saved: int, held: int) -> PhaseMemory:
        """Return the memory of the outputs of the saved model, which is loaded and computed in float32."""
        return PhaseMemory(self.weights, new, held, saved + self._widened)


def _held(lm: LanguageModel, matrices: Sequence[Matrix]) -> int:
    """Return the bytes of the decompositions that the cache holds."""
    sizes = [decomposed_bytes(m) for m in matrices]
    return int(max(min(default_cache(lm.cache).memory, sum(sizes)), max(sizes, default=0)))


def _bases(lm: LanguageModel, matrices: Sequence[Matrix]) -> int:
    """Return the bytes of the bases on the disk."""
    return sum((8 if lm.dtype == torch.float64 else 4) * min(m.shape) ** 2 for m in matrices if m.update_rank is None)


def _text(
    lm: LanguageModel, calibration: str | Path | None, tokens: int
) -> tuple[Sequence[TokenSequence], Sequence[TokenSequence]]:
    """Return the passages of the calibration text and of the held-out text; those of a text to be written, by their size."""
    if calibration is not None:
        text = read_calibration_text(lm, calibration, tokens=tokens)
        return text.calibration, encode(lm, list(passages(text.held_out)), "perplexity")
    length = min(PASSAGE_TOKENS, max_length(lm) - 1)
    ids = (0,) * length
    rows = [TokenSequence(i, ids, ids, tuple(range(length))) for i in range(max(1, tokens // length))]
    return rows, rows[: max(1, len(rows) // 4)]


def _batches(rows: Sequence[TokenSequence]) -> list[Sequence[TokenSequence]]:
    """Return the batch of the longest rows."""
    ordered = sorted(rows, key=lambda row: -len(row.ids))
    return [ordered[: max(1, MAX_SCORED_POSITIONS // max(len(row.positions) for row in rows))]]


def _gradients(
    planner: MemoryPlanner, rows: Sequence[TokenSequence], memory: float, *, along_components: bool = False
) -> PhaseMemory:
    """Return the memory of gradients: the boundaries of a chunk of rows, and the moments of a block's outputs.

    Gradients along components take the decompositions of a block in place of the moments, and a number for each component
    and row of the chunk.
    """
    ordered = sorted(rows, key=lambda row: -len(row.ids))
    of_token = (planner.n_blocks + 1) * planner.lm.width * planner.lm.dtype.itemsize
    in_chunk = max(1, int(min(len(rows), memory / of_token / len(ordered[0].ids))))
    batch = ordered[: min(CALIBRATION_BATCH, in_chunk)]
    boundaries = of_token * sum(len(row.ids) for row in ordered[:in_chunk])
    of_block = planner.most_in_a_block(decomposed_bytes if along_components else lambda m: 4 * m.shape[0] ** 2)
    results = 4 * in_chunk * sum(m.max_rank for m in planner.matrices) if along_components else 0
    first = planner.pass_bytes(batch) + planner.logits_bytes(batch, has_gradient=True)
    last = 2 * planner.pass_bytes(batch) + of_block + (planner.sums_bytes(batch) if along_components else 0)
    return PhaseMemory(planner.weights, boundaries + results, 0, max(first, last))


def _refinement(planner: MemoryPlanner, factors: int) -> PhaseMemory:
    """Return the memory of a step that trains factors: the graph of a passage, and the optimiser's numbers in float32.

    These are the factors, their gradients and two averages, next to the layers themselves and a copy in bfloat16.
    """
    length = min(REFINEMENT_TOKENS, max_length(planner.lm) - 1)
    ids = (0,) * length
    passage = TokenSequence(0, ids, ids, tuple(range(length)))
    graph = planner.n_blocks * planner.pass_bytes([passage])
    work = (4 * 4 + 2) * factors + planner.logits_bytes([passage], has_gradient=True)
    return PhaseMemory(planner.weights, graph, factors * planner.lm.dtype.itemsize, work)


def _pivots(planner: MemoryPlanner, ranks: Mapping[float, Sequence[int]], factors: int) -> PhaseMemory:
    """Return the memory of the last matrix that is made of pivots, next to all others; ``ranks`` are those of each ratio."""
    itemsize = planner.lm.dtype.itemsize
    work = max(
        pivoting_bytes(m, rank, itemsize) for some in ranks.values() for m, rank in zip(planner.matrices, some, strict=True)
    )
    return PhaseMemory(planner.weights, decompositions=factors * itemsize, work=work)


def _decompositions(planner: MemoryPlanner, rows: Sequence[TokenSequence], method: Method) -> PhaseMemory:
    """Return the memory of the decompositions of a block, with the moments of its layers' inputs."""
    if method == "plain":
        work = max(decomposing_bytes(m, planner.lm.dtype) + decomposed_bytes(m) for m in planner.matrices)
    else:
        work = max(whitening_bytes(m, is_two_sided=method == "two-sided") for m in planner.matrices)
    inputs = planner.most_in_a_block(lambda m: 8 * m.shape[1] ** 2, key=_input_of)
    activations = 2 * planner.lm.width * planner.lm.dtype.itemsize * sum(len(row.ids) for row in rows)
    if rows and method != "plain":  # the last block is run up to the logits
        batch = sorted(rows, key=lambda row: -len(row.ids))[:CALIBRATION_BATCH]
        work = max(work, planner.pass_bytes(batch) + planner.logits_bytes(batch))
    return PhaseMemory(planner.weights, activations + inputs, 0, work)


def _input_of(matrix: Matrix) -> str:
    """Return the first of the usual names of matrices with this one's input, or its own name."""
    return next((names[0] for names in SAME_INPUT if matrix.name in names), matrix.name)


def pivoting_bytes(matrix: Matrix, rank: int, itemsize: int) -> int:
    """Return the bytes that pivots and coefficients take at their peak, next to the layers that are made already.

    They are the decomposition and two steps. The first chooses the pivots: the left factor up to the rank, its triangular
    factor with the part that is solved with, and the coefficients twice, all in float64. The second makes them, by part of
    their columns: the pivots of the left factor and a part in float64, and pivots and coefficients in the weight's dtype.

    Args:
        matrix: the matrix (m, n).
        rank: its rank.
        itemsize: bytes of a number of the weight.
    """
    m, n = matrix.shape
    choosing = 8 * rank * (m + rank + 2 * (m - rank))
    making = 12 * rank**2 + min(16 * rank * n, PART_BYTES) + itemsize * parameters((m, n), rank)
    return decomposed_bytes(matrix) + max(choosing, making)


def whitening_bytes(matrix: Matrix, *, is_two_sided: bool) -> int:
    """Return the bytes that a decomposition for moments takes at its peak, next to the weight and the moments of inputs.

    They are the weight in float32 and float64, the moments of gradients as read and in float64, both square roots of moments of
    the shorter side, and the weight times one of them. To them come a factor in float64 and float32, or the eigensolver's work.
    """
    m, n = matrix.shape
    small = min(m, n)
    outputs = (12 if is_two_sided else 8) * m * m
    return outputs + 20 * m * n + max(12 * m * n + 28 * small**2, 48 * small**2)
