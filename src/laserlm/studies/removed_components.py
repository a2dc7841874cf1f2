"""Say of removed components what they read and write, and which questions want them gone. The results database keeps it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from laserlm.jsonable import to_json
from laserlm.models.language_model import LanguageModel
from laserlm.reductions import Intervention
from laserlm.scoring.scorers import GENERATING
from laserlm.scoring.tokenize import encode
from laserlm.searching.scorer import EncodedSplit, PrefixScorer
from laserlm.store import Store
from laserlm.studies.component_tokens import ComponentTokens, component_tokens
from laserlm.studies.scores import CachedScorer
from laserlm.tasks import Example, Split

MOST_EXAMPLES = 48
"""Examples whose gradients are taken at most. The bundled model takes some seconds for them."""
NOTE = "removed components of "


def removed_components(scorer: CachedScorer, intervention: str, corrected: Sequence[Example]) -> list[ComponentTokens]:
    """Return the strongest removed components, and keep them with the scores, where a report finds them.

    Args:
        scorer: of the unchanged model.
        intervention: text of the reductions.
        corrected: examples that the reductions correct. The questions are taken from the first ones.

    Raises:
        AnalysisError: if the model embeds no tokens.
        MatrixError: if the model has no such matrix or component.
    """

    def compute() -> Any:
        rows = component_tokens(scorer.lm, intervention)
        split = replace(scorer.split, examples=tuple(corrected[:MOST_EXAMPLES]))
        return to_json(with_questions(scorer.lm, rows, split, batch_size=scorer.batch_size))

    return [_of_json(row) for row in scorer.cached(NOTE + intervention, compute)]


def stored_components(store: Store, model_hash: str, intervention: str) -> list[ComponentTokens]:
    """Return what ``removed_components`` stored of an intervention on a model, the newest; empty if there is nothing."""
    for run in store.runs():
        if run.kind == "scores" and run.settings.get("model_hash") == model_hash:
            rows = store.notes(run.id).get(NOTE + intervention)
            if rows is not None:
                return [_of_json(row) for row in rows]
    return []


def with_questions(
    lm: LanguageModel, rows: Sequence[ComponentTokens], split: Split, *, most: int = 3, batch_size: int = 32
) -> list[ComponentTokens]:
    """Return components with the questions whose loss their removal lowers most, to first order.

    Args:
        lm: the unchanged model.
        rows: the components.
        split: the questions; of a scorer of generated text, the log-loss of the answer counts.
        most: questions of each component at most.
        batch_size: sequences in one forward pass.
    """
    if not rows or not split.examples or split.scorer == "rollout":
        return list(rows)
    kind = "answer" if split.scorer in GENERATING else split.scorer
    encoded = EncodedSplit(split, encode(lm, split.examples, kind), kind)
    names = {row.matrix for row in rows}
    matrices = [m for m in lm.matrices if m.id in names]
    indices = range(len(split.examples))
    falls = PrefixScorer(lm, {split.name: encoded}, batch_size=batch_size).contributions(
        split.name, indices, Intervention(()), matrices
    )
    prompts = [e.prompt for e in split.examples]
    named = []
    for row in rows:
        if row.matrix in falls:  # else no question uses the matrix
            ranked = sorted(zip(prompts, falls[row.matrix][:, row.component].tolist(), strict=True), key=lambda p: -p[1])
            row = replace(row, questions=tuple(pair for pair in ranked[:most] if pair[1] > 0))
        named.append(row)
    return named


def _of_json(row: dict[str, Any]) -> ComponentTokens:
    questions = tuple((prompt, fall) for prompt, fall in row["questions"])
    return ComponentTokens(**row | {"reads": tuple(row["reads"]), "writes": tuple(row["writes"]), "questions": questions})
