"""Composition: add one reduction after another, each only if validation improves by more than luck among all trials."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from laserlm.linalg.decomposition import rank_of
from laserlm.reductions import Intervention
from laserlm.scoring.evaluate import compare
from laserlm.searching.candidates import Candidate
from laserlm.searching.config import Metric, SearchConfig
from laserlm.searching.ledger import ScoreLedger
from laserlm.searching.race import choose, is_significantly_worse, rung_sizes
from laserlm.searching.result import ComposeStep, sort_key
from laserlm.searching.screen import Prediction


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
    config: SearchConfig,
    on_try: Callable[[int, Intervention], None] = lambda *_: None,
    is_allowed: Callable[[Intervention], bool] = lambda _: True,
) -> Iterator[ComposeStep]:
    """Try the candidates one after the other on top of what was accepted so far; yield each accepted step.

    A trial is scored in rungs of examples, and is rejected after the first rung in which it does not look better. It is
    accepted only after all rungs, if it is significantly better at the level ``delta`` divided by the number of candidates.
    So if no candidate helps, one is accepted with a probability of ``delta`` at most. A matrix is reduced once.

    Args:
        ledger: scores the interventions.
        candidates: in the order in which they are tried.
        metric: what has to improve.
        config: first rung, error probability.
        on_try: called before each trial with its place in the order and what is tried.
        is_allowed: says of a trial that helps whether its harm is within the bound.
    """
    current = Intervention()
    ledger.extend([current], len(ledger.split))
    reduced: list[Candidate] = []
    level = config.delta / max(2, len(candidates))  # two-sided for a single one, as its interval is
    for number, candidate in enumerate(candidates):
        if any(candidate.matrix.overlaps(c.matrix) for c in reduced):
            continue
        tried = Intervention((*current.reductions, *candidate.intervention.reductions))
        on_try(number, tried)
        if _helps(ledger, current, tried, metric, config.first_rung, level) and is_allowed(tried):
            n = len(ledger.split)
            comparison = compare(ledger.first(current, n), ledger.first(tried, n))
            current = tried
            reduced.append(candidate)
            yield ComposeStep(str(candidate.intervention), str(current), comparison)


def _helps(ledger: ScoreLedger, current: Intervention, tried: Intervention, metric: Metric, first: int, level: float) -> bool:
    """Return whether a trial looks better than what it adds to in every rung, and is significantly better in the last."""
    for stop in rung_sizes(len(ledger.split), first):
        ledger.extend([tried], stop)
        if ledger.fails(tried, stop):
            return False
        before, after = ledger.first(current, stop), ledger.first(tried, stop)
        # Few examples may not show a gain in accuracy yet: then the loss decides.
        if sort_key(after, metric) <= sort_key(before, metric):
            return False
    return is_significantly_worse(after, before, metric, level)
