"""Take the gradient of a loss along the components of all matrices, in chunks of rows that fit into memory."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial

import torch
from torch import Tensor

from laserlm.errors import WeightError
from laserlm.linalg.decomposition import Decomposition
from laserlm.models.language_model import LanguageModel
from laserlm.models.matrices import Matrix, find_stacks
from laserlm.out_of_memory import retry_with_room
from laserlm.scoring.batch import Batch
from laserlm.scoring.forward import batches, forward_logits, out_of_memory_error
from laserlm.scoring.kernels import fast_cpu_kernels
from laserlm.scoring.records import TokenSequence
from laserlm.searching.gradients.blocks import BatchPass, backward, cut_between_blocks, frozen
from laserlm.searching.gradients.inspection import Inspection, token_count
from laserlm.searching.gradients.sites import find_sites, sites_within, without_uncalled
from laserlm.searching.gradients.sums import ComponentSums, MixedRowsError, watched
from laserlm.searching.memory_plan import GIB

log = logging.getLogger(__name__)

Decomposed = Callable[[Matrix], Decomposition]
Coefficients = tuple[float, list[float]]
"""By what the log-probabilities of a row, of its targets and of its options, enter the sum of losses."""
Reduce = Callable[[Matrix, Tensor], Tensor]
"""Makes what is kept of a matrix from the contributions of its components, (R, k) for R rows."""


class _OutOfTimeError(Exception):
    """Ends a chunk at the deadline."""


class ComponentGradients:
    """The contributions of singular components to the gradient of a loss, for chunks of rows that fit into memory.

    Args:
        lm: the unchanged model.
        rows: the rows of the loss.
        coefficients: of each row.
        matrices: weights to take the gradient along.
        decomposed: returns the decomposition of a matrix.
        batch_size: rows in one pass. It is halved where memory runs out, and 1 where rows cannot be told apart in a batch.
        memory: bytes for the boundaries between blocks, or for the graph of a whole pass; one row is always run.
        squared: sum the squares of the contributions of single tokens. Where tokens cannot be told apart, of single rows.
        both: sum the contributions, and sum their squares too.
        deadline: value of ``time.monotonic`` after which no block and no decomposition is begun.
        free: called where memory has run out.

    Attributes:
        failed: why a matrix cannot be decomposed, by its id.
        needs_whole_graph: whether blocks hand on more than their outputs.
    """

    def __init__(
        self,
        lm: LanguageModel,
        rows: Sequence[TokenSequence],
        coefficients: Sequence[Coefficients],
        matrices: Sequence[Matrix],
        decomposed: Decomposed,
        *,
        batch_size: int = 32,
        memory: float = math.inf,
        squared: bool = False,
        both: bool = False,
        deadline: float = math.inf,
        free: Callable[[], object] = lambda: None,
    ) -> None:
        self.lm = lm
        self.rows = rows
        self.coefficients = coefficients
        self.failed: dict[str, str] = {}
        self._matrices = matrices
        self._decomposed = decomposed
        self._memory = memory
        self._powers = (1, 2) if both else (2,) if squared else (1,)
        self._deadline = deadline
        self._free = free
        self._sites = find_sites(lm, matrices)
        inspection = Inspection.of(lm, rows, self._sites)
        self._sites = without_uncalled(self._sites, inspection.called)
        self._in_block = {id(b): sites_within(b, self._sites) for _, _, blocks in find_stacks(lm.model) for b in blocks}
        inside = {id(site.module) for sites in self._in_block.values() for site in sites}
        self.needs_whole_graph = not inspection.can_be_cut or any(id(site.module) not in inside for site in self._sites)
        self._token_bytes = inspection.graph_bytes if self.needs_whole_graph else inspection.boundary_bytes
        if self.needs_whole_graph and (longest := max(map(token_count, rows))) * self._token_bytes > memory:
            _warn_of_graph(lm.name, longest, longest * self._token_bytes, memory)
        is_batched = inspection.is_separable and all(site.kind != "other" for site in self._sites)
        self.batch_size = batch_size if is_batched else 1

    @property
    def is_late(self) -> bool:
        """Whether the time is used up."""
        return time.monotonic() > self._deadline

    def chunks(
        self, indices: Sequence[int], reduce: Reduce, *, scale: float = 1.0
    ) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
        """Yield chunks of rows with what ``reduce`` makes of each matrix, by its id; at the deadline not of all.

        Args:
            indices: of the rows.
            reduce: is given a matrix, and contributions (R, k) of its components for the R rows of the chunk; with ``both``
                these and then their squares, (2R, k).
            scale: factor of the loss that keeps half-precision gradients from vanishing; it is taken out again.

        Raises:
            ScoringError: if a single row does not fit into memory.
        """
        pending = sorted(indices, key=lambda i: (-token_count(self.rows[i]), i))
        limit = len(pending)
        chunk: list[int] = []

        def attempt() -> dict[str, Tensor]:
            nonlocal chunk
            chunk = pending[: self._fitting(pending, limit)]
            try:
                return self._run(chunk, reduce, scale)
            except MixedRowsError:
                self.batch_size = 1
                chunk = pending[: self._fitting(pending, limit)]
                return self._run(chunk, reduce, scale)

        def make_room(error: torch.OutOfMemoryError) -> None:
            nonlocal limit
            if len(chunk) == 1:
                raise out_of_memory_error(self.lm, error)
            if len(chunk) > self.batch_size:
                limit = max(self.batch_size, len(chunk) // 2)
            else:
                limit = self.batch_size = len(chunk) // 2
            self._free()

        while pending and not self.is_late:
            reduced = retry_with_room(attempt, make_room)
            yield chunk, reduced
            del pending[: len(chunk)]

    def _fitting(self, pending: Sequence[int], limit: int) -> int:
        """Return how many of the pending rows make a chunk, the longest first; a graph holds one batch at a time."""
        most = min(limit, self.batch_size) if self.needs_whole_graph else limit
        of_row = self._token_bytes * token_count(self.rows[pending[0]])
        return max(1, min(most, int(min(self._memory / of_row, len(pending))) if of_row else most))

    def _run(self, chunk: Sequence[int], reduce: Reduce, scale: float) -> dict[str, Tensor]:
        def unscaled(sums: Tensor) -> Tensor:
            for part, power in zip(sums.chunk(len(self._powers)), self._powers, strict=True):
                part /= scale**power  # in place, for moments of gradients are large, and nothing else reads the sums
            return sums

        with frozen(self.lm.model):
            run = self._with_whole_graph if self.needs_whole_graph else self._block_by_block
            return run(chunk, lambda matrix, sums: reduce(matrix, unscaled(sums)), scale)

    def _block_by_block(self, chunk: Sequence[int], reduce: Reduce, scale: float) -> dict[str, Tensor]:
        reduced: dict[str, Tensor] = {}
        sums: dict[str, ComponentSums] = {}  # of matrices that are used again further down
        try:
            passes = [self._forward(batch, chunk, scale) for batch in self._batches(chunk)]
            # The blocks as they were called; every batch calls them in the same order.
            of_calls = [self._in_block[id(call.block)] for call in passes[0].calls]
            lowest = next((i for i, sites in enumerate(of_calls) if any(site.matrices for site in sites)), len(of_calls))
            for index in reversed(range(lowest, len(of_calls))):  # below it, no gradient is needed
                here = {m.id: m for site in of_calls[index] for m in site.matrices}
                below = {m.id for sites in of_calls[:index] for site in sites for m in site.matrices}
                for name, matrix in here.items():
                    if name not in sums and (of_matrix := self._new_sums(matrix, len(chunk))) is not None:
                        sums[name] = of_matrix
                for one in passes:
                    self._check_time()
                    with fast_cpu_kernels(self.lm.device, one.batch.length), watched(of_calls[index], sums, one.batch):
                        backward(one, index)
                for name in here.keys() - below:
                    if name in sums:
                        reduced[name] = reduce(here[name], sums.pop(name).values)
        except _OutOfTimeError:
            pass
        return reduced

    def _with_whole_graph(self, chunk: Sequence[int], reduce: Reduce, scale: float) -> dict[str, Tensor]:
        sums = {m.id: self._lazy_sums(m, len(chunk)) for m in self._matrices}
        try:
            for batch in self._batches(chunk):
                self._check_time()
                with watched(self._sites, sums, batch), torch.enable_grad():
                    self._objective(batch, chunk, scale)
        except _OutOfTimeError:
            return {}
        return {m.id: reduce(m, sums[m.id].values) for m in self._matrices if m.id not in self.failed}

    def _new_sums(self, matrix: Matrix, n_rows: int) -> ComponentSums | None:
        """Return sums of a matrix that is decomposed now; None if it cannot be decomposed."""
        held = self._decompose(matrix)
        return None if held is None else ComponentSums.of(self.lm, matrix, n_rows, self._powers, lambda: held)

    def _lazy_sums(self, matrix: Matrix, n_rows: int) -> ComponentSums:
        """Return sums of a matrix that is decomposed for every batch."""
        return ComponentSums.of(self.lm, matrix, n_rows, self._powers, partial(self._decompose, matrix))

    def _batches(self, chunk: Sequence[int]) -> list[Batch]:
        return batches(self.lm, [self.rows[i] for i in chunk], self.batch_size)

    def _forward(self, batch: Batch, chunk: Sequence[int], scale: float) -> BatchPass:
        """Run a batch and take the gradient of the objective down to the outputs of blocks."""
        self._check_time()
        with cut_between_blocks(self.lm) as calls, torch.enable_grad():
            self._objective(batch, chunk, scale)
        return BatchPass(batch, calls)

    def _objective(self, batch: Batch, chunk: Sequence[int], scale: float) -> None:
        of_rows = [self.coefficients[chunk[i]] for i in batch.rows]
        logits = forward_logits(self.lm, batch, scored_only=bool(self.lm.reads_positions))
        counts = torch.tensor([n for n, _ in batch.counts], device=self.lm.device)
        weights = torch.tensor([weight for weight, _ in of_rows], device=self.lm.device).repeat_interleave(counts)  # (N,)
        options = torch.zeros_like(logits.choice_logprobs)
        for b, (_, of_options) in enumerate(of_rows):
            options[b, : len(of_options)] = torch.tensor(of_options)
        outputs = [logits.logprobs, logits.choice_logprobs]
        torch.autograd.backward(outputs, [weights.to(logits.logprobs) * scale, options * scale], retain_graph=True)

    def _decompose(self, matrix: Matrix) -> Decomposition | None:
        if matrix.id in self.failed:
            return None
        self._check_time()
        try:
            return self._decomposed(matrix)
        except WeightError as error:
            self.failed[matrix.id] = str(error)
            return None

    def _check_time(self) -> None:
        if self.is_late:
            raise _OutOfTimeError


@cache
def _warn_of_graph(name: str, tokens: int, size: float, memory: float) -> None:
    """Warn once where the graph of a single row takes more than the bound."""
    log.warning(
        "blocks of %s hand on more than what they give out, so that a gradient keeps the graph of a whole pass: about %.3g GiB "
        "for %d tokens. That is more than the %.3g GiB that --memory leaves for it, and the gradient takes it in any case; "
        "%s times as much --memory has room for it",
        *(name, size / GIB, tokens, memory / GIB, f"{math.ceil(10 * size / memory) / 10:.15g}" if memory > 0 else "infinitely"),
    )
