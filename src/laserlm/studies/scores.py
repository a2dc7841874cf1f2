"""Score a model under interventions on one set of examples, with the results database as a cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

import torch

from laserlm.edit import applied
from laserlm.models.language_model import LanguageModel
from laserlm.out_of_memory import retry_with_room
from laserlm.provenance import provenance
from laserlm.reductions import Intervention
from laserlm.scoring.evaluate import evaluate, evaluate_rows
from laserlm.scoring.identity import digest, identity
from laserlm.scoring.prefix_cache import PrefixCache
from laserlm.scoring.records import Evaluation, TokenSequence
from laserlm.scoring.tokenize import encode
from laserlm.searching.ledger import cut
from laserlm.searching.scorer import EncodedSplit, first_changed_block
from laserlm.store import Run, Store
from laserlm.tasks import Scorer, Split

METHOD = 4
"""Raise it when a change of the code changes scores; stored scores of another number are not used."""
PREFIX_CACHE_BYTES = 2**30
"""Bytes for the activations of the prefix cache. If the activations of all examples do not fit, every pass is a full one."""


class CachedScorer:
    """Scores one model on one set of examples and stores the scores; ``cached_scorer`` opens one.

    The blocks below the first changed block are run once, as in a search.

    Args:
        lm: the unchanged model.
        split: the examples.
        batch_size: sequences in one forward pass.
        seed: of ``:reference`` decompositions.
        run: the run that stores the scores.
        rows: the encoded examples.
        known: scores that exist already, by the text of the intervention.
    """

    def __init__(
        self,
        lm: LanguageModel,
        split: Split,
        batch_size: int,
        seed: int,
        run: Run,
        rows: Sequence[TokenSequence],
        known: Mapping[str, Evaluation],
    ) -> None:
        self.lm = lm
        self.split = split
        self.batch_size = batch_size
        self.seed = seed
        self._run = run
        self._rows = rows
        self._known = dict(known)
        self._prefix_cache: PrefixCache | None = None
        encoded = EncodedSplit(split, rows, split.scorer)
        self._fits = next(cut(lm, encoded, 0, len(split), memory=PREFIX_CACHE_BYTES)) == (0, len(split))

    def __call__(self, name: str, change: AbstractContextManager[Any] | None = None, *, matrices_of: str = "") -> Evaluation:
        """Return the scores under an intervention, or under a context that changes the model.

        Args:
            name: text of the intervention, or the name that the scores under a context are stored under.
            change: the context.
            matrices_of: text of an intervention with exactly the matrices that the context changes. Empty: unknown; then full
                passes are run, which takes longer.
        """
        name = name if change is not None else str(Intervention.parse(name))
        known = self._known.get(name) or self._run.evaluation(self.split.name, name)
        if known is not None:
            return known
        is_cached = (change is None or bool(matrices_of)) and self._move_below(name if change is None else matrices_of)
        with change if change is not None else applied(self.lm, name, seed=self.seed):
            evaluation = replace(self._evaluate(is_cached), intervention=name)
        self._run.record(evaluation, self.split.examples)
        return evaluation

    def cached(self, name: str, compute: Callable[[], Any]) -> Any:
        """Return the JSON values stored under a name. The first time, compute and store them."""
        if name not in self._run.notes:
            self._run.note(name, compute())
        return self._run.notes[name]

    def _move_below(self, intervention: str) -> bool:
        """Move the prefix cache just below the first block that an intervention changes; return whether that is possible."""
        if not self._fits:
            return False
        try:
            self._prefix_cache = self._prefix_cache or PrefixCache(self.lm, self._rows, self.batch_size)
            order = self._prefix_cache.check.block_order
            if order and intervention:
                first = first_changed_block(Intervention.parse(intervention), self.lm.matrices, order)
                self._prefix_cache.move_to(*order[first])
                self._prefix_cache.free_lowest()
        except torch.OutOfMemoryError:
            self._prefix_cache = None
        return self._prefix_cache is not None

    def _evaluate(self, is_cached: bool) -> Evaluation:
        """Score the model as it is now, in passes from the prefix cache or, where these do not fit, in full passes."""

        def run() -> Evaluation:
            if is_cached and self._prefix_cache is not None:
                scorer, passes = self.split.scorer, self._prefix_cache.run
                return evaluate_rows(self.lm, self.split, scorer, self._rows, passes, self.batch_size)
            return evaluate(self.lm, self.split, batch_size=self.batch_size)

        def free(error: torch.OutOfMemoryError) -> None:
            if self._prefix_cache is None:
                raise error
            self._prefix_cache = None

        return retry_with_room(run, free)


@contextmanager
def cached_scorer(
    lm: LanguageModel,
    split: Split,
    store: Store,
    *,
    scorer: Scorer | None = None,
    batch_size: int = 32,
    seed: int = 0,
    known: Mapping[str, Evaluation] | None = None,
) -> Iterator[CachedScorer]:
    """Yield a scorer of a model on some examples. It takes scores from the store and puts new scores there.

    Args:
        lm: the unchanged model.
        split: the examples.
        store: the results database.
        scorer: None takes the split's own.
        batch_size: sequences in one forward pass.
        seed: of ``:reference`` decompositions.
        known: scores that exist already, such as those of a search, by the text of the intervention.

    Raises:
        RunBusyError: if another process scores the same model on the same examples at the moment.
    """
    split = replace(split, scorer=scorer or split.scorer)
    rows = encode(lm, split.examples, split.scorer)
    settings = identity(lm, split.scorer, (split,), rows, seed) | {"method": METHOD}
    origin = provenance(device=str(lm.device), dtype=str(lm.dtype), seed=seed)
    with store.run(kind="scores", key=digest(settings), settings=settings, provenance=origin) as run:
        yield CachedScorer(lm, split, batch_size, seed, run, rows, known or {})
