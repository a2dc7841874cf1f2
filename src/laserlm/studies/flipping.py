"""The examples that a reduction corrects and breaks, and what the model answers instead."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from laserlm.edit import applied
from laserlm.jsonable import fields_to_json
from laserlm.models.language_model import LanguageModel
from laserlm.scoring.evaluate import Comparison, compare
from laserlm.scoring.forward import run_rows
from laserlm.scoring.records import Evaluation
from laserlm.scoring.scorers import GENERATING
from laserlm.scoring.tokenize import encode
from laserlm.studies.estimates import MIN_EXAMPLES, Estimate, examples_of
from laserlm.tasks import Example

Change = Literal["corrected", "broken", "right", "wrong"]
CHANGES: dict[tuple[bool, bool], Change] = {
    (False, True): "corrected",
    (True, False): "broken",
    (True, True): "right",
    (False, False): "wrong",
}
OTHER_TEXTS = 5
"""Number of most frequent texts outside the answers that are counted too."""


@dataclass(frozen=True)
class Flip:
    """One example under the unchanged and the reduced model.

    Args:
        id: the example's id.
        change: ``corrected``, ``broken``, or unchanged: ``right``, ``wrong``.
        group: its group (relation or class), or empty.
        prompt: the prompt.
        answer: the right answer.
        base: answer of the unchanged model.
        edited: answer of the reduced model.
        base_loss: log-loss of the right answer under the unchanged model, in nats per token.
        edited_loss: log-loss of the right answer under the reduced model.
    """

    id: str
    change: Change
    group: str
    prompt: str
    answer: str
    base: str = field(metadata={"json": "before"})
    edited: str = field(metadata={"json": "after"})
    base_loss: float = field(metadata={"json": "loss_before"})
    edited_loss: float = field(metadata={"json": "loss_after"})


@dataclass(frozen=True)
class Group:
    """The examples of one group.

    Args:
        group: name of the group.
        comparison: the two models on these examples.
        is_small: whether there are too few examples to say anything.
    """

    group: str
    comparison: Comparison
    is_small: bool


@dataclass(frozen=True)
class Label:
    """How often a text is the right answer, and how often each model gives it.

    Args:
        label: the text, in lower case.
        answers: examples whose right answer it is.
        base: examples for which the unchanged model gives it.
        edited: examples for which the reduced model does.
    """

    label: str
    answers: int
    base: int = field(metadata={"json": "before"})
    edited: int = field(metadata={"json": "after"})


@dataclass(frozen=True)
class Flips:
    """What a reduction changed on the examples of one split.

    Args:
        comparison: over all examples.
        flips: every example.
        groups: by group, the largest first; empty if the task has no groups.
        labels: the answers, the most frequent first, then the most frequent texts that are no answer.
        majority: share of the most frequent answer.
        off_list_base: share of examples for which the unchanged model gives no known answer. Known are the answers, choices
            and aliases of all examples. A scorer that reads tokens accepts the beginning of one, a scorer of written text
            any text that holds one.
        off_list_edited: the same share for the reduced model.
        unchanged: share of examples for which both models give the same.
    """

    comparison: Comparison
    flips: tuple[Flip, ...]
    groups: tuple[Group, ...]
    labels: tuple[Label, ...]
    majority: Estimate
    off_list_base: Estimate = field(metadata={"json": "outside_before"})
    off_list_edited: Estimate = field(metadata={"json": "outside_after"})
    unchanged: Estimate = field(metadata={"json": "same"})

    def of(self, change: Change) -> list[Flip]:
        """Return the examples with one change."""
        return [flip for flip in self.flips if flip.change == change]

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON values."""
        groups = [{"group": g.group, "few": g.is_small, **g.comparison.as_dict()} for g in self.groups]
        counts = {change: len(self.of(change)) for change in CHANGES.values()}
        return fields_to_json(self) | {"groups": groups, "counts": counts}


def flips(base: Evaluation, edited: Evaluation, examples: Sequence[Example]) -> Flips:
    """Pair the scores of the unchanged and the reduced model, example by example.

    Args:
        base: of the unchanged model.
        edited: of the reduced model, on the same examples.
        examples: those, in the order of the scores or more of them.

    Raises:
        ScoringError: if the two cannot be compared.
        AnalysisError: if an example is missing.
    """
    comparison = compare(base, edited)
    by_id = examples_of(base, examples)
    rows = tuple(
        Flip(
            b.id, CHANGES[b.correct, e.correct], b.group, by_id[b.id].prompt, b.answer, b.predicted, e.predicted, b.loss, e.loss
        )
        for b, e in zip(base.scores, edited.scores, strict=True)
    )
    base_texts, edited_texts = _answers(rows)
    labels = _labels(rows, Counter(base_texts), Counter(edited_texts))
    known = {label.label for label in labels if label.answers}
    known |= {text.lower() for row in rows for text in (*by_id[row.id].choices, *by_id[row.id].aliases)}

    def off_list(texts: Sequence[str]) -> Estimate:
        return Estimate.share_by_fact([not _is_known(text, known, base.scorer) for text in texts], base.facts)

    groups = _groups(base, edited)
    return Flips(
        comparison=comparison,
        flips=rows,
        groups=groups if len(groups) > 1 else (),
        labels=labels,
        majority=Estimate.share_by_fact([row.answer.lower() == labels[0].label for row in rows], base.facts),
        off_list_base=off_list(base_texts),
        off_list_edited=off_list(edited_texts),
        unchanged=Estimate.share_by_fact([row.base.lower() == row.edited.lower() for row in rows], base.facts),
    )


def _groups(base: Evaluation, edited: Evaluation) -> tuple[Group, ...]:
    """Compare the two evaluations on each named group of examples, the largest group first."""
    groups = []
    for name, n in Counter(score.group for score in base.scores if score.group).most_common():
        part = [replace(e, scores=tuple(s for s in e.scores if s.group == name)) for e in (base, edited)]
        groups.append(Group(name, compare(*part), n < MIN_EXAMPLES))
    return tuple(groups)


def _labels(rows: Sequence[Flip], base: Counter[str], edited: Counter[str]) -> tuple[Label, ...]:
    """Return all answers by frequency, then the most frequent texts that are no answer."""
    answers = Counter(row.answer.lower() for row in rows)
    others = [text for text, _ in (base + edited).most_common() if text not in answers][:OTHER_TEXTS]
    labels = [(label, count) for label, count in answers.most_common()] + [(text, 0) for text in others]
    return tuple(Label(label, count, base[label], edited[label]) for label, count in labels)


def likeliest(
    lm: LanguageModel, examples: Sequence[Example], intervention: str, *, k: int = 5, batch_size: int = 32, seed: int = 0
) -> list[tuple[list[str], list[str]]]:
    """Return the k likeliest first tokens of each example's answer, for the unchanged and for the reduced model.

    Args:
        lm: the unchanged model.
        examples: some.
        intervention: text of the reduction.
        k: number of tokens.
        batch_size: sequences in one forward pass.
        seed: of ``:reference`` decompositions.
    """
    tokenizer = lm.require_tokenizer()
    rows = [replace(row, top=k) for row in encode(lm, examples, "first_token")]
    sides = []
    for text in ("", intervention):
        with applied(lm, text, seed=seed):
            sides.append([[str(tokenizer.decode([t])) for t in o.top] for o in run_rows(lm, rows, batch_size)])
    return list(zip(*sides, strict=True))


def _answers(rows: Sequence[Flip]) -> tuple[list[str], list[str]]:
    """Return what each model gives for each example, in lower case; a right text counts as the answer, however long it is."""
    base = [row.answer if row.change in ("right", "broken") else row.base for row in rows]
    edited = [row.answer if row.change in ("right", "corrected") else row.edited for row in rows]
    return [text.lower() for text in base], [text.lower() for text in edited]


def _is_known(text: str, known: set[str], scorer: str) -> bool:
    """Return whether a text is a known answer, as far as the scorer reads it."""
    if scorer in GENERATING:
        return any(answer in text for answer in known)
    if text in known:
        return True
    return scorer in ("answer", "first_token", "top5", "top10") and bool(text) and any(a.startswith(text) for a in known)
