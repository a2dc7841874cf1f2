"""How many bytes each phase of a search takes at its peak, from shapes and tokens; the model is not run."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from laserlm.models.language_model import LanguageModel
from laserlm.models.matrices import Matrix, language_config
from laserlm.scoring.batch import MAX_SCORED_POSITIONS
from laserlm.scoring.forward import logits_part_bytes
from laserlm.scoring.output_layer import CHUNK_BYTES, HALF
from laserlm.scoring.records import TokenSequence

log = logging.getLogger(__name__)

GIB = 2**30
HEAP = 2**26
"""Bytes of small tensors, freed by now, that the C library keeps for a process on a CPU (M_TRIM_THRESHOLD of mallopt(3))."""
LOGITS_WITH_GRADIENT = 5
"""Copies of a batch's logits (N, V) in a pass with its gradient, measured: the logits, their gradient so far, and three
intermediate results."""
LOGITS_READ = 9
"""Bytes for each four of a part of the logits that is read, measured on a CPU: of the count of the largest ones."""
LOGITS_OF_A_DRAW = 4
"""Copies of the last token's logits in float32: the logits, those of the sampler, their probabilities, and their sums."""


@dataclass(frozen=True)
class PhaseMemory:
    """Bytes of a phase at its peak, without the memory of Python and its libraries.

    Args:
        weights: of the model.
        activations: cached activations or inputs of blocks, and derivatives by components.
        decompositions: in memory.
        work: of a pass, of a decomposition, or of edited weights, whichever takes most at that time.
        kept: freed before the phase, but not yet returned to the system.
    """

    weights: int
    activations: int = 0
    decompositions: int = 0
    work: int = 0
    kept: int = 0

    @property
    def total(self) -> int:
        """The sum of all parts."""
        return self.weights + self.activations + self.decompositions + self.work + self.kept


def decomposed_bytes(matrix: Matrix) -> int:
    """Return the bytes of both factors of a matrix in float32."""
    return 4 * matrix.max_rank * sum(matrix.shape)


def decomposing_bytes(matrix: Matrix, dtype: torch.dtype) -> int:
    """Return the bytes that a decomposition takes at its peak, next to the weight.

    They are a copy of a half-precision weight in float32, the weight in float64, and LAPACK's eigensolver (syevd): the Gram
    matrix, the eigenvectors, and twice as much to work in, all in float64.
    """
    if matrix.update_rank is not None:  # both factors in float64, orthonormal ones, and the result
        return 3 * 8 * matrix.max_rank * sum(matrix.shape)
    small, large = sorted(matrix.shape)
    copy = 4 * small * large if dtype in HALF else 0
    return copy + 8 * small * large + 4 * 8 * small**2


@dataclass(frozen=True)
class MemoryPlanner:
    """Adds up the bytes of each phase of a search.

    Args:
        lm: the model; its weights may be on the meta device.
        matrices: of the candidates.
        memory: bytes for cached activations and decompositions together.
        batch_size: sequences in one pass.
    """

    lm: LanguageModel
    matrices: Sequence[Matrix]
    memory: float
    batch_size: int

    @cached_property
    def weights(self) -> int:
        """Bytes of the model, and of the base weights and factors of an adapter's update; tied parameters count once."""
        updates = () if self.lm.update is None else self.lm.update.weights.values()
        kept = sum(tensor.nbytes for update in updates for tensor in (update.base, update.up, update.down))
        return kept + sum({p.data_ptr() or id(p): p.nbytes for p in self.lm.model.parameters()}.values())

    @cached_property
    def n_blocks(self) -> int:
        """Number of blocks, of all stacks."""
        return len({(m.stack, m.layer) for m in self.lm.all_matrices})

    def gradient(self, rows: Sequence[TokenSequence], memory: float, *, results: int = 0) -> PhaseMemory:
        """Return the memory of a gradient that is taken block by block.

        Args:
            rows: the rows of the loss.
            memory: bytes for what goes into the blocks.
            results: examples whose derivatives by all components are returned; 0 for a screen, which keeps none.
        """
        ordered = sorted(rows, key=_tokens, reverse=True)
        of_token = (self.n_blocks + 1) * self.lm.width * self.lm.dtype.itemsize
        limit = max(memory, of_token * _tokens(ordered[0]))
        boundaries = int(min(limit, of_token * sum(map(_tokens, ordered))))
        in_chunk = max(1, min(len(ordered), int(limit / of_token / _tokens(ordered[0]))))
        batch = ordered[: min(self.batch_size, in_chunk)]
        n_components = sum(m.max_rank for m in self.matrices)
        returned, of_chunk = (4 * n * n_components if results else 0 for n in (results, in_chunk))
        before = returned if in_chunk < len(ordered) else 0  # of earlier chunks
        held, block = self._held, self._of_block
        phases = [
            # The pass from the first block to the logits, and the gradient of the logits.
            PhaseMemory(
                self.weights, boundaries + before, 0, self.pass_bytes(batch) + self.logits_bytes(batch, has_gradient=True)
            ),
            # A decomposition, while the other matrices of its block are held already.
            *(
                PhaseMemory(
                    self.weights,
                    boundaries + before + of_chunk,
                    max(held, block) - decomposed_bytes(m),
                    decomposing_bytes(m, self.lm.dtype),
                )
                for m in self.matrices
            ),
            # The last block to be done, with its activations and their gradients.
            PhaseMemory(
                self.weights,
                boundaries + before + of_chunk,
                max(held, block),
                2 * self.pass_bytes(batch) + self.sums_bytes(batch),
            ),
            # The derivatives of a chunk are added to the sums over all chunks.
            PhaseMemory(self.weights, returned + of_chunk, max(held, block)),
        ]
        return max(phases, key=lambda phase: phase.total)

    def scoring(
        self, batches: Iterable[Sequence[TokenSequence]], activations: int, *, n_edited: int, is_decomposed: bool
    ) -> PhaseMemory:
        """Return the memory of scoring interventions.

        Args:
            batches: the batches with most tokens.
            activations: bytes of cached activations, and of derivatives that are kept meanwhile.
            n_edited: most matrices that an intervention changes.
            is_decomposed: whether the decompositions are on the disk already.
        """
        sizes = sorted((m.shape[0] * m.shape[1] for m in self.matrices), reverse=True)
        edited = sum(sizes[:n_edited]) * self.lm.dtype.itemsize
        passes = max(self.pass_bytes(batch) + self.logits_bytes(batch) for batch in batches)
        new = max(4 * sizes[0], 0 if is_decomposed else max(decomposing_bytes(m, self.lm.dtype) for m in self.matrices))
        return PhaseMemory(self.weights, activations, self._held, edited + max(passes, new))

    @cached_property
    def _held(self) -> int:
        """Bytes of the decompositions that the cache holds: half of the memory, and at least one matrix."""
        sizes = [decomposed_bytes(m) for m in self.matrices]
        return int(max(min(self.memory / 2, sum(sizes)), max(sizes)))

    @cached_property
    def _of_block(self) -> int:
        """Bytes of the decompositions of the block that has most, which a gradient holds together."""
        return self.most_in_a_block(decomposed_bytes)

    def most_in_a_block(
        self, size: Callable[[Matrix], int], *, key: Callable[[Matrix], Hashable] = lambda matrix: matrix.id
    ) -> int:
        """Return the largest sum of sizes of the matrices of a block; those with the same key count once."""
        of_block: dict[tuple[str, int], dict[Hashable, int]] = {}
        for m in self.matrices:
            of_block.setdefault((m.stack, m.layer), {})[key(m)] = size(m)
        return max(sum(sizes.values()) for sizes in of_block.values())

    def least(self, rows: Sequence[TokenSequence], *, has_gradient: bool) -> int:
        """Return the bytes of cached activations and decompositions that a search holds at least, whatever its bound is.

        A gradient holds the decompositions of a block, and what goes into all blocks for a sequence. The scoring of a question
        holds the decomposition of a matrix, and the old and the new activations while the cache moves up.
        """
        boundaries, decompositions = 2, max(map(decomposed_bytes, self.matrices))
        if has_gradient:
            boundaries, decompositions = self.n_blocks + 1, self._of_block
        return decompositions + boundaries * self.lm.width * self.lm.dtype.itemsize * max(map(_tokens, rows))

    def writing(self, texts: int, tokens: int) -> int:
        """Return the bytes that texts take while the model writes them.

        They are the keys and values of all tokens, twice while a token is added, and the last token's logits with the steps
        of a draw. A process on a CPU keeps them after that, because each piece is too small for the C library to return.
        """
        config = language_config(self.lm.model.config)
        heads = int(getattr(config, "num_attention_heads", 1) or 1)
        shared = int(getattr(config, "num_key_value_heads", None) or heads)
        of_head = int(getattr(config, "head_dim", None) or self.lm.width // heads)
        values = 2 * self.n_blocks * tokens * shared * of_head
        return texts * (2 * values * self.lm.dtype.itemsize + 4 * LOGITS_OF_A_DRAW * self._vocabulary)

    @property
    def _vocabulary(self) -> int:
        return int(getattr(self.lm.model.config, "vocab_size", 0) or 0)

    def pass_bytes(self, batch: Sequence[TokenSequence]) -> int:
        """Return the bytes of what a block holds of a batch, about."""
        longest = max(map(_tokens, batch))
        widest = max(max(m.shape) for m in self.lm.all_matrices if m.part_of is None)
        heads = int(getattr(self.lm.model.config, "num_attention_heads", 1) or 1)
        values = len(batch) * longest * (4 * self.lm.width + 3 * widest) + len(batch) * heads * longest**2
        return values * self.lm.dtype.itemsize

    def logits_bytes(self, batch: Sequence[TokenSequence], *, has_gradient: bool = False) -> int:
        """Return the bytes of logits in float32 at the scored positions, and of the part of the output layer in float32.

        Without a gradient they are read in small parts, and those of the first position of each sequence are copied.
        """
        most = max(len(row.positions) for row in batch)
        positions = most * max(1, min(len(batch), MAX_SCORED_POSITIONS // most))
        rows = LOGITS_WITH_GRADIENT * positions if has_gradient else positions + min(len(batch), positions)
        part = CHUNK_BYTES if self.lm.dtype in HALF else 0
        read = 0 if has_gradient else min(logits_part_bytes(self.lm.device), positions * self._vocabulary * 4)
        return rows * self._vocabulary * 4 + part + read * LOGITS_READ // 4

    def sums_bytes(self, batch: Sequence[TokenSequence]) -> int:
        """Return the bytes of a matrix's inputs, gradients of outputs, and their products with both factors, in float32."""
        return 4 * len(batch) * max(map(_tokens, batch)) * max(sum(m.shape) + 2 * m.max_rank for m in self.matrices)


def warn_of_little_memory(planner: MemoryPlanner, rows: Sequence[TokenSequence], *, has_gradient: bool) -> None:
    """Warn where a search will hold more than its bound, and name the least bound that it keeps.

    Args:
        planner: of the search.
        rows: the sequences of the questions.
        has_gradient: whether the search takes a gradient.
    """
    least = planner.least(rows, has_gradient=has_gradient)
    if planner.memory < least:
        log.warning(
            "--memory %.6g is less than the %s GiB that the decompositions of a %s and a single question take in any case; "
            "so the search takes more than that; the least bound that it keeps is --memory %s",
            *(planner.memory / GIB, memory_option(least), "block" if has_gradient else "matrix", memory_option(least)),
        )


def memory_option(size: float) -> str:
    """Return the least value of ``--memory`` that has room for some bytes: GiB, rounded up to thousandths."""
    return f"{math.ceil(1000 * size / GIB) / 1000:.15g}"


def _tokens(row: TokenSequence) -> int:
    return len(row.ids) + len(row.decoder)
