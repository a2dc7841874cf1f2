"""How scores go with the rank that is kept, and what a search measured of every matrix and size."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from decimal import Decimal
from typing import Any

from laserlm.edit.apply import resolve
from laserlm.errors import AnalysisError
from laserlm.reductions import Intervention, Size
from laserlm.scoring.records import Evaluation
from laserlm.store import RunInfo, Store
from laserlm.studies.estimates import Estimate, paired_estimates
from laserlm.studies.scores import CachedScorer

__all__ = ["RANKS", "RHOS", "LossAtRank", "Point", "loss_map", "measured_of", "rank_curve", "sizes_of"]

RANKS = (40, 30, 20, 10, 5, 1, 0)
"""Ranks of the published curve (the report "Exploration of LAyer-SElective Rank reduction", table 4), and 1 and 0."""
RHOS = ("1", "0.9", "0.8", "0.6", "0.4", "0.2", "0.1", "0.05", "0.01", "0")


@dataclass(frozen=True)
class Point:
    """The chosen matrices at one size.

    Args:
        size: as text, ``r40`` or ``0.1``.
        ranks: singular values kept, by matrix; of each block of rows where a matrix is split.
        chosen: whether the reduction itself has this size.
        accuracy: with its interval.
        loss: mean log-loss in nats per answer token.
        gain: in accuracy over the unchanged model, paired.
        loss_change: of the loss, paired.
    """

    size: str
    ranks: dict[str, int]
    chosen: bool
    accuracy: Estimate
    loss: float
    gain: Estimate
    loss_change: Estimate

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON values."""
        return asdict(self) | {name: getattr(self, name).as_dict() for name in ("accuracy", "gain", "loss_change")}


@dataclass(frozen=True)
class LossAtRank:
    """What a search measured of one reduction of one matrix.

    Args:
        matrix: its id.
        stack: its stack of blocks, empty where the model has one.
        layer: 0-based block.
        name: name of the matrix within the block.
        size: as text.
        gain: in accuracy over the unchanged model on the examples that this one was scored on.
        loss_change: of the loss, likewise.
    """

    matrix: str
    stack: str
    layer: int
    name: str
    size: str
    gain: Estimate
    loss_change: Estimate

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON values."""
        return asdict(self) | {name: getattr(self, name).as_dict() for name in ("gain", "loss_change")}


def rank_curve(
    intervention: str,
    score: CachedScorer,
    *,
    ranks: Sequence[int] = RANKS,
    rhos: Sequence[str] = RHOS,
    on_point: Callable[[int, int, str], None] | None = None,
) -> list[Point]:
    """Score a reduction, and its matrices at other sizes: first ranks, then kept fractions, each set falling.

    Ranks that a matrix does not have are left out. The reduction itself comes first; its matrices may have several sizes.

    Args:
        intervention: text of the reduction whose matrices are taken.
        score: of the model.
        ranks: singular values kept.
        rhos: kept fractions, as text.
        on_point: called with the number of sizes done, their total and the next.

    Raises:
        AnalysisError: if the reduction is empty, or a fraction is a rank.
        SpecError: if a size cannot be read.
    """
    reductions = Intervention.parse(intervention).reductions
    if not reductions:
        raise AnalysisError("the unchanged model has no matrix whose rank could be changed; give a reduction")
    least = min(edit.max_rank for edit in resolve(score.lm.matrices, intervention))
    sizes = [Size(rank=r) for r in sorted(set(ranks), reverse=True) if r <= least]
    sizes += sizes_of(rhos)[::-1]
    chosen = str(Intervention.parse(intervention))
    wanted = {chosen: ", ".join(dict.fromkeys(str(r.size) for r in reductions))}
    for size in sizes:
        wanted.setdefault(str(Intervention(tuple(replace(r, size=size) for r in reductions))), str(size))
    base = score("")
    points = []
    for done, (text, size_text) in enumerate(wanted.items()):
        if on_point is not None:
            on_point(done, len(wanted), size_text)
        edits = resolve(score.lm.matrices, text)
        found = base if all(edit.is_identity for edit in edits) else score(text)
        gain, loss_change = paired_estimates(base, found)
        points.append(
            Point(
                size=size_text,
                ranks={edit.matrix.id: edit.rank for edit in edits},
                chosen=text == chosen,
                accuracy=Estimate.share(sum(s.correct for s in found.scores), found.n),
                loss=found.loss,
                gain=gain,
                loss_change=loss_change,
            )
        )
    return points


def sizes_of(fractions: Sequence[str]) -> list[Size]:
    """Return kept fractions, given as text, each once and rising.

    Raises:
        AnalysisError: if one is a rank.
        SpecError: if one cannot be read.
    """
    found: dict[Decimal, Size] = {}
    for size in map(Size.parse, fractions):
        if size.rho is None:
            raise AnalysisError(f"{size} is a rank; write the fraction of the singular values that is kept, such as 0.9")
        found[size.rho] = size
    return [found[rho] for rho in sorted(found)]


def measured_of(store: Store, run: RunInfo) -> list[LossAtRank]:
    """Return what a search measured of single matrices; nothing where it measured none, or of a run of another kind."""
    trials = store.evaluations(run.id, "validation") if run.kind == "search" else {}
    base = trials.pop("", None)
    try:
        return [] if base is None else loss_map(base, trials)
    except AnalysisError:  # a composition tries sets of matrices, which have no place on a map
        return []


def loss_map(base: Evaluation, trials: Mapping[str, Evaluation]) -> list[LossAtRank]:
    """Return what a search measured of each matrix and size, each against the unchanged model on the same examples.

    Reductions of several matrices, or of several blocks, are left out. A race scores what it drops on few examples.

    Args:
        base: the unchanged model on the validation split.
        trials: by canonical text; each has the first so many of those examples.

    Raises:
        AnalysisError: if no trial is of a single matrix.
    """
    found = []
    for text, trial in trials.items():
        reductions = Intervention.parse(text).reductions
        if (
            len(reductions) != 1
            or reductions[0].layers.first is None
            or reductions[0].layers.first != reductions[0].layers.last
        ):
            continue
        (r,) = reductions
        layer = r.layers.first
        name = f"{r.stack}.{layer}.{r.matrix}" if r.stack else f"{layer}.{r.matrix}"
        changes = paired_estimates(replace(base, scores=base.scores[: trial.n]), trial)
        found.append(LossAtRank(name, r.stack, layer or 0, r.matrix, str(r).partition("@")[2], *changes))
    if not found:
        raise AnalysisError("the search scored no reduction of a single matrix; there is nothing to map")
    return sorted(found, key=lambda m: (m.stack, m.layer, m.name, m.size))
