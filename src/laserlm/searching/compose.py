"""Composition: add one reduction after another, each only if validation improves beyond its paired interval."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from laserlm.linalg.decomposition import rank_of
from laserlm.reductions import Intervention
from laserlm.scoring.evaluate import Comparison, compare
from laserlm.searching.candidates import Candidate
from laserlm.searching.config import Metric, SearchConfig
from laserlm.searching.ledger import ScoreLedger
from laserlm.searching.race import choose, rung_sizes
from laserlm.searching.result import ComposeStep
from laserlm.searching.screen import Prediction

__all__ = ["compose", "in_order"]


def in_order(candidates: Sequence[Candidate], predictions: dict[str, Prediction], config: SearchConfig) -> list[Candidate]:
    """Return the candidates in the order in which a composition tries them.

    ``greedy``: blocks from the last to the first, and in each matrix sizes from small to large (arXiv 2312.13558,
    section 5). ``joint``: those that the screen would send into a race, the best first.
    """
    if config.mode == "joint":
        return choose(candidates, predictions, config)[0]
    matrices = list(dict.fromkeys(c.matrix for c in candidates))
    position = {m: i for i, m in enumerate(matrices)}
    block = {m: (m.stack, m.layer) for m in matrices}
    blocks = list(dict.fromkeys(block.values()))

    def key(c: Candidate) -> tuple[int, int, int]:
        size = rank_of(c.intervention.reductions[0].size, c.matrix.max_rank)
        return (-blocks.index(block[c.matrix]), position[c.matrix], size)

    return sorted(candidates, key=key)


def compose(
    ledger: ScoreLedger,
    candidates: Sequence[Candidate],
    metric: Metric,
    first: int,
    on_try: Callable[[int, Intervention], None] = lambda *_: None,
) -> Iterator[ComposeStep]:
    """Try the candidates one after the other on top of what was accepted so far; yield each accepted step.

    A trial is scored in rungs of examples, and is rejected after the first rung in which it does not look better. It is
    accepted only after all rungs, if the 95 % interval of its paired gain (for the loss, of its change) excludes zero.
    A matrix is reduced once.

    Args:
        ledger: scores the interventions.
        candidates: in the order in which they are tried.
        metric: what has to improve.
        first: examples of the first rung.
        on_try: called before each trial with its place in the order and what is tried.
    """
    current = Intervention()
    ledger.extend([current], len(ledger.split))
    reduced: list[Candidate] = []
    for number, candidate in enumerate(candidates):
        if any(candidate.matrix.overlaps(c.matrix) for c in reduced):
            continue
        tried = Intervention((*current.reductions, *candidate.intervention.reductions))
        on_try(number, tried)
        comparison = _improvement(ledger, current, tried, metric, first)
        if comparison is not None:
            current = tried
            reduced.append(candidate)
            yield ComposeStep(str(candidate.intervention), str(current), comparison)


def _improvement(
    ledger: ScoreLedger, current: Intervention, tried: Intervention, metric: Metric, first: int
) -> Comparison | None:
    """Return the comparison of a trial with what it adds to, or None where it is rejected."""
    comparison = None
    for stop in rung_sizes(len(ledger.split), first):
        ledger.extend([tried], stop)
        if ledger.fails(tried, stop):
            return None
        comparison = compare(ledger.first(current, stop), ledger.first(tried, stop))
        better = comparison.gain > 0 if metric == "accuracy" else comparison.edited_loss < comparison.base_loss
        # With few examples a gain may not have shown yet where nothing was lost either.
        if not better and not (metric == "accuracy" and comparison.gain == 0 and comparison.edited_loss < comparison.base_loss):
            return None
    if comparison is None:
        return None
    holds = comparison.interval.low > 0 if metric == "accuracy" else comparison.loss_interval.high < 0
    return comparison if holds else None
