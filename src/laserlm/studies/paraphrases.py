"""Whether a reduction makes the phrasings of a fact agree, and whether what is right only grows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from typing import Any

from laserlm.errors import AnalysisError
from laserlm.scoring.evaluate import Comparison, compare
from laserlm.scoring.records import Evaluation, ExampleScore
from laserlm.scoring.statistics import mcnemar
from laserlm.studies.estimates import Estimate
from laserlm.tasks import Example

__all__ = ["Growth", "Paired", "Paraphrases", "Table", "paraphrases"]


@dataclass(frozen=True)
class Paired:
    """A share or a mean over facts before and after.

    Args:
        before: of the unchanged model.
        after: of the reduced one.
        change: how much larger it is after, fact by fact.
        p: exact two-sided McNemar p-value of a share; None of a mean.
    """

    before: Estimate
    after: Estimate
    change: Estimate
    p: float | None = None

    @classmethod
    def share(cls, before: Sequence[bool], after: Sequence[bool]) -> Paired:
        """Return the shares of facts that have something."""
        first, second = (Estimate.share(sum(of), len(of)) for of in (before, after))
        growth = Growth.of(before, after)
        return cls(first, second, Estimate.gain(before, after), mcnemar(growth.gained, growth.lost))

    @classmethod
    def mean(cls, before: Sequence[float], after: Sequence[float]) -> Paired:
        """Return the means of a value that each fact has."""
        changes = [a - b for b, a in zip(before, after, strict=True)]
        return cls(Estimate.mean(before), Estimate.mean(after), Estimate.mean(changes))

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON values."""
        return {name: getattr(self, name).as_dict() for name in ("before", "after", "change")} | {"p": self.p}


@dataclass(frozen=True)
class Growth:
    """What becomes of all that was right, and what joins it.

    Args:
        kept: number right before and after.
        gained: right after alone.
        lost: right before alone.
    """

    kept: int
    gained: int
    lost: int

    @classmethod
    def of(cls, before: Sequence[bool], after: Sequence[bool]) -> Growth:
        """Count pairs."""
        pairs = list(zip(before, after, strict=True))
        return cls(*(pairs.count(wanted) for wanted in ((True, True), (False, True), (True, False))))

    @property
    def share_lost(self) -> Estimate:
        """Share lost of what was right. Where nothing is, the upper end tells how much the number right leaves possible."""
        return Estimate.share(self.lost, self.kept + self.lost)

    @property
    def only_grows(self) -> bool:
        """Whether nothing that was right is lost."""
        return self.lost == 0

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON values."""
        return asdict(self) | {"share_lost": self.share_lost.as_dict(), "only_grows": self.only_grows}


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
    """What a reduction does to facts that are phrased in several ways.

    Args:
        facts: number of facts with at least two phrasings; all else is over these.
        single: number of facts with one phrasing, which are left out.
        comparison: over the phrasings as if each was independent of the others, which the shares of facts do not take for
            granted.
        all_right: share of facts with all phrasings right.
        any_right: share of facts with a phrasing right.
        consistency: mean over facts of the share of pairs of phrasings for which the model puts the same first, right or
            wrong, case aside; where it writes, the same text.
        examples: what becomes of the phrasings that are right.
        whole: what becomes of the facts with all phrasings right.
        tables: facts by the number of phrasings right, a table for each number of phrasings.
    """

    facts: int
    single: int
    comparison: Comparison
    all_right: Paired
    any_right: Paired
    consistency: Paired
    examples: Growth
    whole: Growth
    tables: tuple[Table, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON values."""
        return {
            "facts": self.facts,
            "single": self.single,
            "comparison": self.comparison.as_dict(),
            "all_right": self.all_right.as_dict(),
            "any_right": self.any_right.as_dict(),
            "consistency": self.consistency.as_dict(),
            "examples": self.examples.as_dict(),
            "whole": self.whole.as_dict(),
            "tables": [asdict(table) for table in self.tables],
        }


def paraphrases(base: Evaluation, edited: Evaluation, examples: Sequence[Example]) -> Paraphrases:
    """Pair the scores of the unchanged and of the reduced model fact by fact.

    Phrasings of one fact are examples that share fact, group and answer: a fact that is asked for from its other side, or
    by another relation, is another one here.

    Args:
        base: of the unchanged model.
        edited: of the reduced model, on the same examples.
        examples: those, in any order, or more of them.

    Raises:
        ScoringError: if the two cannot be compared.
        AnalysisError: if an example is missing, or no fact has two phrasings.
    """
    compare(base, edited)
    by_id = {e.id: e for e in examples}
    of_fact: dict[tuple[str, str, str], list[tuple[ExampleScore, ExampleScore]]] = {}
    for pair in zip(base.scores, edited.scores, strict=True):
        e = by_id.get(pair[0].id)
        if e is None:
            raise AnalysisError(f"the task has no example {pair[0].id!r} that was scored; give its data and options")
        of_fact.setdefault((e.fact or e.id, e.group, e.answer.lower()), []).append(pair)
    facts = [pairs for pairs in of_fact.values() if len(pairs) > 1]
    if not facts:
        raise AnalysisError(
            f"no fact of the {len(of_fact)} of {base.task}/{base.split} has two phrasings; study a task with several, such as "
            "worldfacts or counterfact, with --phrasings all, or give the rows of a jsonl file a 'fact' that they share"
        )
    right = [[[pair[side].correct for pair in pairs] for pairs in facts] for side in (0, 1)]
    whole = [[all(of) for of in side] for side in right]
    agreement = [[_agreement([pair[side] for pair in pairs]) for pairs in facts] for side in (0, 1)]
    used = [pair for pairs in facts for pair in pairs]
    return Paraphrases(
        facts=len(facts),
        single=len(of_fact) - len(facts),
        comparison=compare(*(replace(x, scores=tuple(s[i] for s in used)) for i, x in enumerate((base, edited)))),
        all_right=Paired.share(*whole),
        any_right=Paired.share(*([any(of) for of in side] for side in right)),
        consistency=Paired.mean(*agreement),
        examples=Growth.of(*([pair[side].correct for pair in used] for side in (0, 1))),
        whole=Growth.of(*whole),
        tables=_tables([(len(b), sum(b), sum(a)) for b, a in zip(*right, strict=True)]),
    )


def _agreement(phrasings: Sequence[ExampleScore]) -> float:
    """Return the share of pairs of phrasings for which the model puts the same first."""
    pairs = list(combinations([s.predicted.lower() for s in phrasings], 2))
    return sum(a == b for a, b in pairs) / len(pairs)


def _tables(facts: Sequence[tuple[int, int, int]]) -> tuple[Table, ...]:
    """Count facts, given as their number of phrasings and how many of them are right before and after."""
    count = Counter(facts)
    return tuple(
        Table(k, tuple(tuple(count[k, i, j] for j in range(k + 1)) for i in range(k + 1)))
        for k in sorted({k for k, *_ in facts})
    )
