"""How accuracy and loss change with the rank that is kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal

from laserlm.edit.apply import resolve
from laserlm.errors import AnalysisError
from laserlm.reductions import Intervention, Size, short_form
from laserlm.studies.estimates import Estimate, paired_estimates
from laserlm.studies.scores import CachedScorer

RANKS = (40, 30, 20, 10, 5, 1, 0)
"""Ranks of the published curve (the report "Exploration of LAyer-SElective Rank reduction", table 4), and 1 and 0."""
RHOS = ("1", "0.9", "0.8", "0.6", "0.4", "0.2", "0.1", "0.05", "0.01", "0")

LONGEST_SIZE = 100
"""Characters of the sizes of a reduction that are shown; thousands of strengths have more."""


@dataclass(frozen=True)
class Point:
    """The chosen matrices at one size.

    Args:
        size: as text, ``r40`` or ``0.1``.
        ranks: kept singular values, by matrix; for a split matrix, of each block of rows.
        chosen: whether this is the size of the reduction itself.
        accuracy: with its interval.
        loss: mean log-loss in nats per answer token.
        gain: paired gain in accuracy over the unchanged model.
        loss_change: paired change of the loss.
    """

    size: str
    ranks: dict[str, int]
    chosen: bool
    accuracy: Estimate
    loss: float
    gain: Estimate
    loss_change: Estimate


def rank_curve(
    intervention: str,
    scorer: CachedScorer,
    *,
    ranks: Sequence[int] = RANKS,
    rhos: Sequence[str] = RHOS,
    on_point: Callable[[int, int, str], None] | None = None,
) -> list[Point]:
    """Score a reduction and its matrices at other sizes: first ranks, then kept fractions, both falling.

    Ranks above the maximum of a matrix are left out. The reduction itself comes first. Its matrices may have several sizes.

    Args:
        intervention: text of the reduction whose matrices are taken.
        scorer: scores of the model.
        ranks: singular values kept.
        rhos: kept fractions, as text.
        on_point: called with the number of sizes done, their total and the next.

    Raises:
        AnalysisError: if the reduction is empty, or a fraction is a rank.
        SpecError: if a size cannot be read.
    """
    reductions = Intervention.read(intervention).reductions
    if not reductions:
        raise AnalysisError("the unchanged model has no matrix whose rank could be changed; give a reduction")
    least = min(edit.max_rank for edit in resolve(scorer.lm.matrices, intervention))
    sizes = [Size(rank=r) for r in sorted(set(ranks), reverse=True) if r <= least]
    sizes += sizes_of(rhos)[::-1]
    chosen = str(Intervention.read(intervention))
    of_chosen = ", ".join(dict.fromkeys(str(r.size) for r in reductions))
    size_texts = {chosen: of_chosen if len(of_chosen) <= LONGEST_SIZE else short_form(chosen)}
    for size in sizes:
        size_texts.setdefault(str(Intervention(tuple(replace(r, size=size) for r in reductions))), str(size))
    base = scorer("")
    points = []
    for done, (text, size_text) in enumerate(size_texts.items()):
        if on_point is not None:
            on_point(done, len(size_texts), size_text)
        edits = resolve(scorer.lm.matrices, text)
        edited = base if all(edit.is_identity for edit in edits) else scorer(text)
        gain, loss_change = paired_estimates(base, edited)
        points.append(
            Point(
                size=size_text,
                ranks={edit.matrix.id: edit.rank for edit in edits},
                chosen=text == chosen,
                accuracy=Estimate(edited.accuracy, edited.accuracy_interval, edited.n),
                loss=edited.loss,
                gain=gain,
                loss_change=loss_change,
            )
        )
    return points


def sizes_of(fractions: Sequence[str]) -> list[Size]:
    """Return kept fractions from text, each once and rising.

    Raises:
        AnalysisError: if one is a rank.
        SpecError: if one cannot be read.
    """
    by_rho: dict[Decimal, Size] = {}
    for size in map(Size.parse, fractions):
        if size.rho is None:
            raise AnalysisError(f"{size} is a rank. Write the kept fraction of the singular values, such as 0.9.")
        by_rho[size.rho] = size
    return [by_rho[rho] for rho in sorted(by_rho)]
