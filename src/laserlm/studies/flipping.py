"""Which examples a reduction corrects, which it breaks, and what the model says instead."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from laserlm.edit import applied
from laserlm.errors import AnalysisError
from laserlm.models.language_model import LanguageModel
from laserlm.scoring.evaluate import Comparison, compare
from laserlm.scoring.forward import run_rows
from laserlm.scoring.records import Evaluation
from laserlm.scoring.tokenize import encode
from laserlm.studies.estimates import FEW, Estimate
from laserlm.tasks import GENERATING, Example

__all__ = ["Flip", "Flips", "Group", "Label", "flips", "likeliest"]

Change = Literal["corrected", "broken", "right", "wrong"]
CHANGES: dict[tuple[bool, bool], Change] = {
    (False, True): "corrected",
    (True, False): "broken",
    (True, True): "right",
    (False, False): "wrong",
}
OTHERS = 5
"""Texts that are given most often without being an answer, which are counted beside the answers."""


@dataclass(frozen=True)
class Flip:
    """One example before and after.

    Args:
        id: the example's id.
        change: ``corrected``, ``broken``, or unchanged: ``right``, ``wrong``.
        group: its group (relation or class), or empty.
        prompt: what the model was asked.
        answer: the right answer.
        before: what the unchanged model puts first.
        after: what the reduced model puts first.
        loss_before: log-loss of the answer in nats per token.
        loss_after: likewise.
    """

    id: str
    change: Change
    group: str
    prompt: str
    answer: str
    before: str
    after: str
    loss_before: float
    loss_after: float


@dataclass(frozen=True)
class Group:
    """What happened to the examples of one group.

    Args:
        group: its name.
        comparison: before against after.
        few: whether there are too few examples to say anything.
    """

    group: str
    comparison: Comparison
    few: bool


@dataclass(frozen=True)
class Label:
    """How often something is the answer, and how often it is given.

    Args:
        label: the answer, in lower case.
        answers: examples whose right answer it is.
        before: examples for which the unchanged model gives it.
        after: examples for which the reduced model does.
    """

    label: str
    answers: int
    before: int
    after: int


@dataclass(frozen=True)
class Flips:
    """What a reduction changed on the examples of one split.

    Args:
        comparison: over all examples.
        flips: every example.
        groups: by group, the largest first; empty where the task has none.
        labels: answers and what is given, the most frequent answers first, then what is given and nobody's answer.
        majority: share of the most frequent answer.
        outside_before: examples for which the unchanged model gives what is no answer, choice or alias of any example, nor
            the beginning of one where only tokens are read, nor holds one where the model writes.
        outside_after: likewise of the reduced model.
        same: examples for which both give the same.
    """

    comparison: Comparison
    flips: tuple[Flip, ...]
    groups: tuple[Group, ...]
    labels: tuple[Label, ...]
    majority: Estimate
    outside_before: Estimate
    outside_after: Estimate
    same: Estimate

    def of(self, change: Change) -> list[Flip]:
        """Return the examples with one change."""
        return [flip for flip in self.flips if flip.change == change]

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON values."""
        return {
            "comparison": self.comparison.as_dict(),
            "counts": {change: len(self.of(change)) for change in CHANGES.values()},
            "majority": self.majority.as_dict(),
            "outside_before": self.outside_before.as_dict(),
            "outside_after": self.outside_after.as_dict(),
            "same": self.same.as_dict(),
            "groups": [{"group": g.group, "few": g.few, **g.comparison.as_dict()} for g in self.groups],
            "labels": [asdict(label) for label in self.labels],
            "flips": [asdict(flip) for flip in self.flips],
        }


def flips(base: Evaluation, edited: Evaluation, examples: Sequence[Example]) -> Flips:
    """Pair the scores of the unchanged and of the reduced model.

    Args:
        base: of the unchanged model.
        edited: of the reduced model, on the same examples.
        examples: those, in the order of the scores or more of them.

    Raises:
        ScoringError: if the two cannot be compared.
        AnalysisError: if an example is missing.
    """
    comparison = compare(base, edited)
    by_id = {e.id: e for e in examples}
    missing = [s.id for s in base.scores if s.id not in by_id]
    if missing:
        raise AnalysisError(f"the task has no example {missing[0]!r} that was scored; give the data and options of that search")
    pairs = list(zip(base.scores, edited.scores, strict=True))
    found = tuple(
        Flip(
            b.id, CHANGES[b.correct, e.correct], b.group, by_id[b.id].prompt, b.answer, b.predicted, e.predicted, b.loss, e.loss
        )
        for b, e in pairs
    )
    sizes = Counter(f.group for f in found if f.group)
    groups = []
    for name, n in sizes.most_common():
        part = [replace(x, scores=tuple(s for s in x.scores if s.group == name)) for x in (base, edited)]
        groups.append(Group(name, compare(*part), n < FEW))
    n = len(found)
    answers = Counter(f.answer.lower() for f in found)
    # What is right counts as the answer, whatever share of it is read.
    said = [[f.answer.lower() if right else text.lower() for f, right, text in side] for side in _sides(found)]
    before, after = (Counter(side) for side in said)
    others = [text for text, _ in (before + after).most_common() if text not in answers][:OTHERS]
    labels = [Label(label, k, before[label], after[label]) for label, k in answers.most_common()]
    labels += [Label(text, 0, before[text], after[text]) for text in others]
    used = [by_id[f.id] for f in found]
    known = {*answers, *(text.lower() for e in used for text in (*e.choices, *e.aliases))}
    outside = [Estimate.share(sum(not _inside(text, known, base.scorer) for text in side), n) for side in said]
    return Flips(
        comparison=comparison,
        flips=found,
        groups=tuple(groups) if len(groups) > 1 else (),
        labels=tuple(labels),
        majority=Estimate.share(labels[0].answers, n),
        outside_before=outside[0],
        outside_after=outside[1],
        same=Estimate.share(sum(f.before.lower() == f.after.lower() for f in found), n),
    )


def likeliest(
    lm: LanguageModel, examples: Sequence[Example], intervention: str, *, k: int = 5, batch_size: int = 32, seed: int = 0
) -> list[tuple[list[str], list[str]]]:
    """Return for each example the k likeliest first tokens of its answer before and after a reduction.

    Args:
        lm: the unchanged model.
        examples: some.
        intervention: text of the reduction.
        k: number of tokens.
        batch_size: sequences in one forward pass.
        seed: of ``:reference`` decompositions.
    """
    tokenizer = lm.need_tokenizer()
    rows = [replace(row, top=k) for row in encode(lm, examples, "first_token")]
    sides = []
    for text in ("", intervention):
        with applied(lm, text, seed=seed):
            sides.append([[str(tokenizer.decode([t])) for t in o.top] for o in run_rows(lm, rows, batch_size)])
    return list(zip(*sides, strict=True))


def _sides(found: Sequence[Flip]) -> tuple[list[tuple[Flip, bool, str]], list[tuple[Flip, bool, str]]]:
    """Return each example with whether it is right and what is given, before and after."""
    before = [(f, f.change in ("right", "broken"), f.before) for f in found]
    return before, [(f, f.change in ("right", "corrected"), f.after) for f in found]


def _inside(text: str, known: set[str], scorer: str) -> bool:
    """Return whether what a model gives is one of the known answers, as far as its scorer reads it."""
    if scorer in GENERATING:
        return any(answer in text for answer in known)
    if text in known:
        return True
    return scorer in ("answer", "first_token", "top5", "top10") and bool(text) and any(a.startswith(text) for a in known)
