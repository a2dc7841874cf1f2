"""What a model writes under several interventions, kept beside its scores."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from laserlm.store import Store
from laserlm.studies.scores import CachedScorer, cached_scorer
from laserlm.tasks import GENERATING, Decoding, Example, Split

__all__ = ["NEW_TOKENS", "generated_texts"]

NEW_TOKENS = 10
STOPS = ("\n",)


def generated_texts(
    book: CachedScorer,
    store: Store,
    examples: Sequence[Example],
    interventions: Mapping[str, str],
    *,
    new_tokens: int | None = None,
    on_model: Callable[[int, int, str], None] | None = None,
) -> dict[str, list[str]]:
    """Return what the model writes for each example under each intervention.

    Where the task judges what is written anyway, and no other length is asked for, those texts are taken.

    Args:
        book: the scores of the model.
        store: the results database, where the texts are kept.
        examples: of the book's split.
        interventions: by the name of what they make of the model.
        new_tokens: at most so many in a text, which ends with its line; None takes the task's own way of writing, or 10.
        on_model: called with the number of models done, their total and the name of the next.
    """

    def texts(of: CachedScorer) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for done, (name, intervention) in enumerate(interventions.items()):
            if on_model is not None:
                on_model(done, len(interventions), name)
            by_id = {score.id: score.predicted for score in of(intervention).scores}
            found[name] = [by_id[e.id] for e in examples]
        return found

    if not examples:
        return {name: [] for name in interventions}
    if book.split.scorer in GENERATING and new_tokens is None:
        return texts(book)
    how = Decoding(new_tokens=new_tokens or NEW_TOKENS, stops=STOPS)
    split = Split(book.split.task, book.split.name, tuple(examples), "contains", how)
    if split == book.split:  # these very texts
        return texts(book)
    with cached_scorer(book.lm, split, store, batch_size=book.batch_size, seed=book.seed) as of:
        return texts(of)
