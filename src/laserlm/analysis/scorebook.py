"""Scores of a model on one set of examples, kept in the results database and made only where they are missing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

from laserlm.editing import applied
from laserlm.models.language_model import LanguageModel
from laserlm.provenance import provenance
from laserlm.results import Store
from laserlm.scoring.encoding import encode
from laserlm.scoring.evaluate import evaluate
from laserlm.scoring.identity import digest, identity
from laserlm.scoring.records import Evaluation
from laserlm.spec import Intervention
from laserlm.tasks import Scorer, Split

__all__ = ["Scored", "scored"]

METHOD = 1
"""Goes up when a change moves scores."""

Scored = Callable[..., Evaluation]
"""Called with the text of an intervention, or with a name and the context under which the model is to be scored."""


@contextmanager
def scored(
    lm: LanguageModel, split: Split, store: Store, *, scorer: Scorer | None = None, batch_size: int = 32, seed: int = 0
) -> Iterator[Scored]:
    """Yield a function that returns scores under an intervention: those in the store, or new ones that are put there.

    Args:
        lm: the unchanged model.
        split: the examples.
        store: the results database.
        scorer: None takes the split's own.
        batch_size: sequences in one forward pass.
        seed: of ``:reference`` decompositions.

    Raises:
        RunBusyError: if another process scores the same model on the same examples at the moment.
    """
    scorer = scorer or split.scorer
    rows = encode(lm, split.examples, scorer)
    settings = identity(lm, scorer, (split,), rows, seed) | {"method": METHOD}
    made_by = provenance(device=str(lm.device), dtype=str(lm.dtype), seed=seed)
    with store.run(kind="scores", key=digest(settings), settings=settings, provenance=made_by) as run:

        def get(name: str, change: AbstractContextManager[Any] | None = None) -> Evaluation:
            name = name if change is not None else str(Intervention.parse(name))
            known = run.evaluation(split.name, name)
            if known is not None:
                return known
            with change if change is not None else applied(lm, name, seed=seed):
                found = replace(evaluate(lm, split, scorer=scorer, batch_size=batch_size), intervention=name)
            run.record(found, split.examples)
            return found

        yield get
