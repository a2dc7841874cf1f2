"""Composition: add one reduction after another, each only if validation improves beyond its paired interval."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from laserlm.linalg.ranks import rank_of
from laserlm.reductions import Intervention
from laserlm.scoring.evaluate import Comparison, compare
from laserlm.searching.candidates import Candidate
from laserlm.searching.ledger import ScoreLedger
from laserlm.searching.race import RaceOptions, choose, rung_sizes
from laserlm.searching.result import ComposeStep, Metric, Mode
from laserlm.searching.screen import Prediction

__all__ = ["compose", "in_order"]


def in_order(
    candidates: Sequence[Candidate], mode: Mode, predictions: dict[str, Prediction], options: RaceOptions
) -> list[Candidate]:
    """Return the candidates in the order in which a composition tries them.

    ``greedy``: blocks from the last to the first, and in each matrix sizes from small to large (arXiv 2312.13558,
    section 5). ``joint``: those that the screen would send into a race, the best first.
    """
    if mode == "joint":
        return choose(candidates, predictions, options, seed=0)[0]
    matrices = list(dict.fromkeys(c.matrix for c in candidates))
    place = {m: i for i, m in enumerate(matrices)}
    block = {m: (m.stack, m.layer) for m in matrices}
    blocks = list(dict.fromkeys(block.values()))

    def key(c: Candidate) -> tuple[int, int, int]:
        size = rank_of(c.intervention.reductions[0].size, c.matrix.max_rank)
        return (-blocks.index(block[c.matrix]), place[c.matrix], size)

    return sorted(candidates, key=key)


def compose(
    trials: ScoreLedger,
    candidates: Sequence[Candidate],
    metric: Metric,
    first: int,
    on_try: Callable[[int, Intervention], None] = lambda *_: None,
) -> Iterator[ComposeStep]:
    """Try the candidates one after the other on top of what was accepted so far; yield each accepted step.

    A trial meets the examples in rungs and is rejected at the first one after which it does not look better; it is
    accepted only after all of them, if the 95 % interval of its paired gain (for the loss, of its change) excludes zero.
    A matrix is reduced once.

    Args:
        trials: scores the interventions.
        candidates: in the order in which they are tried.
        metric: what has to improve.
        first: examples of the first rung.
        on_try: called before each trial with its place in the order and what is tried.
    """
    current = Intervention()
    trials.extend([current], len(trials.split))
    reduced: list[Candidate] = []
    for number, candidate in enumerate(candidates):
        if any(candidate.matrix.overlaps(c.matrix) for c in reduced):
            continue
        tried = Intervention((*current.reductions, *candidate.intervention.reductions))
        on_try(number, tried)
        comparison = _improvement(trials, current, tried, metric, first)
        if comparison is not None:
            current = tried
            reduced.append(candidate)
            yield ComposeStep(str(candidate.intervention), str(current), comparison)


def _improvement(
    trials: ScoreLedger, current: Intervention, tried: Intervention, metric: Metric, first: int
) -> Comparison | None:
    """Return the comparison of a trial with what it adds to, or None where it is rejected."""
    comparison = None
    for stop in rung_sizes(len(trials.split), first):
        trials.extend([tried], stop)
        if trials.fails(tried, stop):
            return None
        comparison = compare(trials.first(current, stop), trials.first(tried, stop))
        better = comparison.gain > 0 if metric == "accuracy" else comparison.edited_loss < comparison.base_loss
        # With few examples a gain may not have shown yet where nothing was lost either.
        if not better and not (metric == "accuracy" and comparison.gain == 0 and comparison.edited_loss < comparison.base_loss):
            return None
    if comparison is None:
        return None
    holds = comparison.interval.low > 0 if metric == "accuracy" else comparison.loss_interval.high < 0
    return comparison if holds else None
