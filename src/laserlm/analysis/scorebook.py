"""What a model does on one set of examples, kept in the results database and made only where it is missing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

from laserlm.editing import applied
from laserlm.models.language_model import LanguageModel
from laserlm.provenance import provenance
from laserlm.results import Run, Store
from laserlm.scoring.encoding import encode
from laserlm.scoring.evaluate import evaluate
from laserlm.scoring.identity import digest, identity
from laserlm.scoring.records import Evaluation
from laserlm.spec import Intervention
from laserlm.tasks import Scorer, Split

__all__ = ["Scorebook", "scored"]

METHOD = 1
"""Goes up when a change moves scores."""


class Scorebook:
    """The scores of one model on one set of examples, under whatever changes it; made by ``scored``.

    Args:
        lm: the unchanged model.
        split: the examples.
        batch_size: sequences in one forward pass.
        seed: of ``:reference`` decompositions.
        known: scores that are at hand already, by the text of the intervention.
    """

    def __init__(
        self, lm: LanguageModel, split: Split, run: Run, batch_size: int, seed: int, known: Mapping[str, Evaluation]
    ) -> None:
        self.lm = lm
        self.split = split
        self.batch_size = batch_size
        self.seed = seed
        self._run = run
        self._known = dict(known)

    def __call__(self, name: str, change: AbstractContextManager[Any] | None = None) -> Evaluation:
        """Return scores under an intervention, given by its text, or under a context that changes the model, by any name."""
        name = name if change is not None else str(Intervention.parse(name))
        known = self._known.get(name) or self._run.evaluation(self.split.name, name)
        if known is not None:
            return known
        with change if change is not None else applied(self.lm, name, seed=self.seed):
            made = evaluate(self.lm, self.split, batch_size=self.batch_size)
        found = replace(made, intervention=name)
        self._run.record(found, self.split.examples)
        return found

    def remember(self, name: str, make: Callable[[], Any]) -> Any:
        """Return what is kept under a name, or what ``make`` returns, plain JSON values, which is kept from now on."""
        if name not in self._run.notes:
            self._run.note(name, make())
        return self._run.notes[name]


@contextmanager
def scored(
    lm: LanguageModel,
    split: Split,
    store: Store,
    *,
    scorer: Scorer | None = None,
    batch_size: int = 32,
    seed: int = 0,
    known: Mapping[str, Evaluation] | None = None,
) -> Iterator[Scorebook]:
    """Yield the scores of a model on some examples: those in the store, and new ones that are put there.

    Args:
        lm: the unchanged model.
        split: the examples.
        store: the results database.
        scorer: None takes the split's own.
        batch_size: sequences in one forward pass.
        seed: of ``:reference`` decompositions.
        known: scores that are at hand already, by the text of the intervention, such as those of a search.

    Raises:
        RunBusyError: if another process scores the same model on the same examples at the moment.
    """
    split = replace(split, scorer=scorer or split.scorer)
    rows = encode(lm, split.examples, split.scorer)
    settings = identity(lm, split.scorer, (split,), rows, seed) | {"method": METHOD}
    made_by = provenance(device=str(lm.device), dtype=str(lm.dtype), seed=seed)
    with store.run(kind="scores", key=digest(settings), settings=settings, provenance=made_by) as run:
        yield Scorebook(lm, split, run, batch_size, seed, known or {})
