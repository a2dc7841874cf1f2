"""Study whether a reduction makes the phrasings of a fact agree, and whether it breaks facts that were right."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any

from laserlm.errors import AnalysisError
from laserlm.jsonable import fields_to_json, to_json
from laserlm.scoring.evaluate import Comparison, compare
from laserlm.scoring.records import Evaluation, ExampleScore
from laserlm.scoring.statistics import mcnemar
from laserlm.studies.estimates import Estimate, examples_of
from laserlm.tasks import Example


@dataclass(frozen=True)
class Paired:
    """A share or a mean over facts for both models.

    Args:
        base: value of the unchanged model.
        edited: value of the reduced model.
        change: paired change, edited minus base.
        p: exact two-sided McNemar p-value of a share; None of a mean.
    """

    base: Estimate = field(metadata={"json": "before"})
    edited: Estimate = field(metadata={"json": "after"})
    change: Estimate
    p: float | None = None

    @classmethod
    def share(cls, base: Sequence[bool], edited: Sequence[bool]) -> Paired:
        """Return the shares of facts that have something."""
        first, second = (Estimate.share(sum(of), len(of)) for of in (base, edited))
        growth = Growth.of(base, edited)
        return cls(first, second, Estimate.gain(base, edited), mcnemar(growth.gained, growth.lost))

    @classmethod
    def mean(cls, base: Sequence[float], edited: Sequence[float]) -> Paired:
        """Return the means of a value that each fact has."""
        changes = [e - b for b, e in zip(base, edited, strict=True)]
        return cls(Estimate.mean(base), Estimate.mean(edited), Estimate.mean(changes))


@dataclass(frozen=True)
class Growth:
    """Numbers of items that stay right, become right and become wrong.

    Args:
        kept: number right before and after.
        gained: number right after only.
        lost: number right before only.
    """

    kept: int
    gained: int
    lost: int

    @classmethod
    def of(cls, base: Sequence[bool], edited: Sequence[bool]) -> Growth:
        """Count pairs."""
        pairs = list(zip(base, edited, strict=True))
        return cls(*(pairs.count(outcome) for outcome in ((True, True), (False, True), (True, False))))

    @property
    def share_lost(self) -> Estimate:
        """Share of the right items that were lost. If none was lost, the upper end says what share is still possible."""
        return Estimate.share(self.lost, self.kept + self.lost)

    @property
    def only_grows(self) -> bool:
        """Whether no right item was lost."""
        return self.lost == 0

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON values."""
        return fields_to_json(self) | {"share_lost": to_json(self.share_lost), "only_grows": self.only_grows}


@dataclass(frozen=True)
class Table:
    """Facts with one number of phrasings, counted.

    Args:
        phrasings: number of phrasings k of each.
        counts: (k + 1) x (k + 1), the number of facts with i phrasings right before (rows) and j after (columns).
    """

    phrasings: int
    counts: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Paraphrases:
    """Effect of a reduction on facts that have several phrasings.

    Args:
        facts: number of facts with at least two phrasings; all other values are over these.
        single: number of facts with one phrasing, which are left out.
        comparison: comparison over phrasings. Its intervals take the variance between facts.
        all_right: share of facts with all phrasings right.
        any_right: share of facts with a phrasing right.
        consistency: mean over facts of the share of pairs of phrasings with the same answer, right or wrong. Case is
            ignored.
        examples: growth of the right phrasings.
        complete_facts: growth of the facts with all phrasings right.
        tables: facts by the number of phrasings right, a table for each number of phrasings.
    """

    facts: int
    single: int
    comparison: Comparison
    all_right: Paired
    any_right: Paired
    consistency: Paired
    examples: Growth
    complete_facts: Growth = field(metadata={"json": "whole"})
    tables: tuple[Table, ...]


def paraphrases(base: Evaluation, edited: Evaluation, examples: Sequence[Example]) -> Paraphrases:
    """Pair the scores of the unchanged and of the reduced model fact by fact.

    Phrasings of one fact are examples with the same fact, group and answer. A question for the other side of a fact, or by
    another relation, counts as another fact.

    Args:
        base: of the unchanged model.
        edited: of the reduced model, on the same examples.
        examples: those, in any order, or more of them.

    Raises:
        ScoringError: if the two cannot be compared.
        AnalysisError: if an example is missing, or no fact has two phrasings.
    """
    compare(base, edited)
    by_id = examples_of(base, examples)
    of_fact: dict[tuple[str, str, str], list[tuple[ExampleScore, ExampleScore]]] = {}
    for pair in zip(base.scores, edited.scores, strict=True):
        e = by_id[pair[0].id]
        of_fact.setdefault((e.fact or e.id, e.group, e.answer.lower()), []).append(pair)
    facts = [pairs for pairs in of_fact.values() if len(pairs) > 1]
    if not facts:
        raise AnalysisError(
            f"no fact of the {len(of_fact)} of {base.task}/{base.split} has two phrasings; study a task with several, such as "
            "worldfacts or counterfact, with --phrasings all, or give the rows of a jsonl file a 'fact' that they share"
        )
    right = [[[pair[side].correct for pair in pairs] for pairs in facts] for side in (0, 1)]
    complete = [[all(of) for of in side] for side in right]
    agreement = [[_agreement([pair[side] for pair in pairs]) for pairs in facts] for side in (0, 1)]
    used = [pair for pairs in facts for pair in pairs]
    return Paraphrases(
        facts=len(facts),
        single=len(of_fact) - len(facts),
        comparison=compare(*(replace(x, scores=tuple(s[i] for s in used)) for i, x in enumerate((base, edited)))),
        all_right=Paired.share(*complete),
        any_right=Paired.share(*([any(of) for of in side] for side in right)),
        consistency=Paired.mean(*agreement),
        examples=Growth.of(*([pair[side].correct for pair in used] for side in (0, 1))),
        complete_facts=Growth.of(*complete),
        tables=_tables([(len(b), sum(b), sum(a)) for b, a in zip(*right, strict=True)]),
    )


def _agreement(phrasings: Sequence[ExampleScore]) -> float:
    """Return the share of pairs of phrasings with the same answer."""
    pairs = list(combinations([s.predicted.lower() for s in phrasings], 2))
    return sum(a == b for a, b in pairs) / len(pairs)


def _tables(facts: Sequence[tuple[int, int, int]]) -> tuple[Table, ...]:
    """Count facts from their number of phrasings and how many of them are right before and after."""
    count = Counter(facts)
    return tuple(
        Table(k, tuple(tuple(count[k, i, j] for j in range(k + 1)) for i in range(k + 1)))
        for k in sorted({k for k, *_ in facts})
    )
