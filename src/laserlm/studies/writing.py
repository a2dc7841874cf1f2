"""Generate texts under several interventions, and store them with the scores."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from laserlm.scoring.scorers import GENERATING
from laserlm.store import Store
from laserlm.studies.scores import CachedScorer, cached_scorer
from laserlm.tasks import Decoding, Example, Split

NEW_TOKENS = 10
STOPS = ("\n",)


def generated_texts(
    scorer: CachedScorer,
    store: Store,
    examples: Sequence[Example],
    interventions: Mapping[str, str],
    *,
    new_tokens: int | None = None,
    on_model: Callable[[int, int, str], None] | None = None,
) -> dict[str, list[str]]:
    """Return the generated text of each example under each intervention.

    If the task generates texts anyway and ``new_tokens`` is None, the texts of its scores are returned.

    Args:
        scorer: the scores of the model.
        store: the results database, where the texts are kept.
        examples: of the scorer's split.
        interventions: text of each intervention, by the name of the resulting model.
        new_tokens: maximum length of a text, which ends with its line. None takes the task's decoding, or 10 tokens.
        on_model: called with the number of models done, their total and the name of the next.
    """

    def texts(of: CachedScorer) -> dict[str, list[str]]:
        texts_of_model: dict[str, list[str]] = {}
        for done, (name, intervention) in enumerate(interventions.items()):
            if on_model is not None:
                on_model(done, len(interventions), name)
            by_id = {score.id: score.predicted for score in of(intervention).scores}
            texts_of_model[name] = [by_id[e.id] for e in examples]
        return texts_of_model

    if not examples:
        return {name: [] for name in interventions}
    if scorer.split.scorer in GENERATING and new_tokens is None:
        return texts(scorer)
    decoding = Decoding(new_tokens=new_tokens or NEW_TOKENS, stops=STOPS)
    split = Split(scorer.split.task, scorer.split.name, tuple(examples), "contains", decoding)
    if split == scorer.split:  # these very texts
        return texts(scorer)
    with cached_scorer(scorer.lm, split, store, batch_size=scorer.batch_size, seed=scorer.seed) as of:
        return texts(of)
