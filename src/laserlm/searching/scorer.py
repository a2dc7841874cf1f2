"""Score and screen interventions in one process, from cached activations, within a bound of memory."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from laserlm.edit import applied, resolve
from laserlm.edit.apply import decomposition_of
from laserlm.edit.decomposition_cache import DecompositionCache
from laserlm.errors import ScoringError, WeightError
from laserlm.linalg.decomposition import Decomposition
from laserlm.linalg.precision import full_precision
from laserlm.models.language_model import LanguageModel
from laserlm.models.matrices import Matrix, read_matrix
from laserlm.out_of_memory import retry_with_room
from laserlm.reductions import Intervention
from laserlm.scoring.evaluate import classes_of, evaluate_rows
from laserlm.scoring.forward import out_of_memory_error
from laserlm.scoring.prefix_cache import PrefixCache, PrefixCheck
from laserlm.scoring.records import Evaluation, TokenSequence
from laserlm.searching.candidates import Candidate
from laserlm.searching.contributions import contributions_of_examples
from laserlm.searching.gradients import ComponentGradients
from laserlm.searching.screen import Screening, gradient_scales, loss_coefficients, screen
from laserlm.tasks import Scorer, Split

BlockOrder = Sequence[tuple[str, int]]
"""Blocks, as stack and layer, in the order in which the model runs them; empty where it cannot be cut between them."""
Part = tuple[str, int, int]
"""Name of a split, index of the first example, and index just past the last one."""


@dataclass(frozen=True)
class EncodedSplit:
    """A split and its tokens.

    Args:
        split: the examples, in the order in which they are scored.
        sequences: what ``encode`` returns for them.
        scorer: how an example is scored.
    """

    split: Split
    sequences: Sequence[TokenSequence]
    scorer: Scorer

    def part(self, indices: Sequence[int]) -> tuple[Split, list[TokenSequence]]:
        """Return the examples at some indices, which rise, and their sequences, whose examples count from 0."""
        place = {index: i for i, index in enumerate(indices)}
        sequences = [replace(s, example=place[s.example]) for s in self.sequences if s.example in place]
        return replace(self.split, examples=tuple(self.split.examples[i] for i in indices)), sequences

    def count(self, start: int, stop: int) -> int:
        """Return the number of sequences of the examples from ``start`` to ``stop``."""
        return sum(start <= sequence.example < stop for sequence in self.sequences)


@dataclass(frozen=True)
class Failure:
    """The reason why an intervention has no scores.

    Args:
        reason: in words.
        of_workers: whether the processes that scored it ended, so that it may have scores elsewhere.
    """

    reason: str
    of_workers: bool = False


class PrefixScorer:
    """Score interventions, and recompute no block that an intervention leaves as it is.

    Half of the memory is for decompositions, half for cached activations of all splits together.

    Args:
        lm: the unchanged model.
        splits: by name.
        batch_size: sequences in one forward pass.
        memory: bytes for cached activations and decompositions together.
        seed: of ``:reference`` decompositions.

    Attributes:
        batch_size: halved where memory ran out.
        decompositions: the cache of decompositions.
        peak_bytes: most bytes of cached activations so far.
    """

    def __init__(
        self,
        lm: LanguageModel,
        splits: Mapping[str, EncodedSplit],
        *,
        batch_size: int = 32,
        memory: float = 2**30,
        seed: int = 0,
    ) -> None:
        self.lm = lm
        self.splits = splits
        self.batch_size = batch_size
        self.decompositions = DecompositionCache(lm.cache / "decompositions", memory=memory / 2)
        self.peak_bytes = 0
        self._memory = self._screen_memory = memory / 2
        self._seed = seed
        self._caches: dict[Part, PrefixCache] = {}
        self._parts: dict[Part, tuple[Split, list[TokenSequence]]] = {}
        self._checks: dict[str, PrefixCheck] = {}

    def block_order(self, split: str) -> BlockOrder:
        """Return the blocks in the order in which the model runs them on a split."""
        return self._check(split).block_order

    def free(self, split: str) -> None:
        """Free the cached activations of a split."""
        self._caches = {part: cache for part, cache in self._caches.items() if part[0] != split}

    def score(self, split: str, intervention: Intervention, start: int, stop: int) -> Evaluation | Failure:
        """Return the scores on the examples from ``start`` to ``stop``, or why there are none.

        Raises:
            ScoringError: if a single sequence does not fit into memory.
        """

        def attempt() -> Evaluation | Failure:
            try:
                return self._score((split, start, stop), intervention)
            except (ScoringError, WeightError) as error:
                return Failure(f"{type(error).__name__}: {error}")

        return retry_with_room(attempt, lambda error: self._make_room(split, error))

    def screen(
        self,
        split: str,
        first: int,
        candidates: Sequence[Candidate],
        *,
        between_choices: bool = False,
        seconds: float = math.inf,
    ) -> Screening:
        """Return what a gradient over the examples from ``first`` on predicts of candidates.

        Args:
            split: name of the split.
            first: index of the first example.
            candidates: single matrices at single ranks.
            between_choices: see ``screen``.
            seconds: time after which what is not done stays without a prediction.

        Raises:
            ScoringError: if a single sequence does not fit into memory.
        """
        encoded = self.splits[split]
        part, sequences = encoded.part(range(first, len(encoded.split)))
        self._caches.clear()
        return screen(
            self.lm,
            part.examples,
            sequences,
            encoded.scorer,
            candidates,
            cache=self.decompositions,
            batch_size=self.batch_size,
            memory=self._screen_memory,
            between_choices=between_choices,
            deadline=time.monotonic() + seconds,
        )

    @full_precision()
    def contributions(
        self,
        split: str,
        examples: Sequence[int],
        intervention: Intervention,
        matrices: Sequence[Matrix],
        *,
        squared: bool = False,
        both: bool = False,
        between_choices: bool = False,
    ) -> dict[str, Tensor]:
        """Return the derivatives of losses by the strengths of components under an intervention, by the matrix's id.

        Args:
            split: name of the split.
            examples: their indices.
            intervention: what is applied.
            matrices: their components are those of the unchanged weights.
            squared: whether to sum the squares of the derivatives of the log-probabilities of single tokens.
            both: whether to return the derivatives of the summed log-losses of each example too.
            between_choices: see ``screen``.

        Returns:
            dict: (E, k) of the loss of each of E examples; or (1, k), the sum of squares over all tokens; or (E + 1, k), the
            derivatives and then that sum.

        Raises:
            ScoringError: if a single sequence does not fit into memory.
            WeightError: if a gradient is not finite.
        """
        encoded = self.splits[split]
        part, rows = encoded.part(examples)
        self._caches.clear()
        edited = {edit.matrix.id for edit in resolve(self.lm.matrices, intervention)}
        # A copy, for the weights of stacked experts are changed in place.
        weights = [m for m in matrices if m.id in edited and m.update_rank is None]
        unchanged = {m.id: read_matrix(self.lm.model, m).clone() for m in weights}

        def decomposed(m: Matrix) -> Decomposition:
            if m.id in unchanged:
                return self.decompositions.get(unchanged[m.id])
            return decomposition_of(self.lm, m, self.decompositions)

        with applied(self.lm, intervention, cache=self.decompositions, seed=self._seed):
            gradients = ComponentGradients(
                self.lm,
                rows,
                loss_coefficients(
                    self.lm, part.examples, rows, encoded.scorer, self.batch_size, between_choices, squared=squared or both
                ),
                matrices,
                decomposed,
                batch_size=self.batch_size,
                memory=self._screen_memory / 2,  # the other half is for what is returned
                squared=squared,
                both=both,
                free=self.decompositions.clear,
            )
            n, of_rows = (1, [0] * len(rows)) if squared else (len(part), [row.example for row in rows])
            return contributions_of_examples(gradients, of_rows, n, gradient_scales(self.lm))

    def _check(self, split: str) -> PrefixCheck:
        """Return the check of boundaries that all splits of one scorer share, for the model gets the same inputs from them."""
        scorer = self.splits[split].scorer
        if scorer not in self._checks:
            same = [sequence for other in self.splits.values() if other.scorer == scorer for sequence in other.sequences]
            self._checks[scorer] = PrefixCheck(self.lm, same)
        return self._checks[scorer]

    def _score(self, part: Part, intervention: Intervention) -> Evaluation:
        split, start, stop = part
        encoded, check = self.splits[split], self._check(split)
        if part not in self._parts:
            self._parts[part] = encoded.part(range(start, stop))
        examples, sequences = self._parts[part]
        if part not in self._caches:
            self._caches[part] = PrefixCache(self.lm, sequences, self.batch_size, check)
        cache = self._caches[part]
        if cache.is_enabled:
            self._free_down_to(self._memory / 2, cache)  # while the cache moves up, the old and the new activations are held
            if intervention:  # the unchanged model runs from wherever the activations are
                cache.move_to(*check.block_order[first_changed_block(intervention, self.lm.matrices, check.block_order)])
            self.peak_bytes = max(self.peak_bytes, self._held_bytes)
            self._free_down_to(self._memory, cache)
        if not cache.is_enabled:  # the check says that this model cannot be cut
            self._caches = {part: cache}
        with applied(self.lm, intervention, cache=self.decompositions, seed=self._seed):
            evaluation = evaluate_rows(self.lm, examples, encoded.scorer, sequences, cache.run, self.batch_size)
        return replace(evaluation, classes=classes_of(encoded.split, encoded.scorer))

    @property
    def _held_bytes(self) -> int:
        return sum(cache.bytes for cache in self._caches.values())

    def _free_down_to(self, limit: float, current: PrefixCache) -> None:
        """Free caches of other examples, then the lowest activations of the current one, until the rest fits."""
        while self._held_bytes > limit:
            others = [part for part, cache in self._caches.items() if cache is not current]
            if others:
                del self._caches[others[0]]
            elif not current.free_lowest():
                return

    def _make_room(self, split: str, error: torch.OutOfMemoryError) -> None:
        """Give up the least useful thing in memory, or raise a ScoringError where nothing is left."""
        held = self._held_bytes
        self._caches.clear()
        self.decompositions.clear()
        if held and self._memory:
            self._memory = 0  # from here on only the activations in use are held
        elif self.batch_size > 1:
            self.batch_size //= 2
        elif self.block_order(split):
            self._check(split).disable()  # the cached activations themselves may be what does not fit
        else:
            raise out_of_memory_error(self.lm, error)


def first_changed_block(intervention: Intervention, matrices: Sequence[Matrix], order: BlockOrder) -> int:
    """Return the index in ``order`` of the first block that an intervention changes, weights that it shares included."""
    paths = {edit.matrix.tied_to or edit.matrix.path for edit in resolve(matrices, intervention)}
    changed = {(m.stack, m.layer) for m in matrices if (m.tied_to or m.path) in paths}
    return min((order.index(block) for block in changed if block in order), default=0) if order else 0
