"""The race: candidates are scored on more and more examples, and the worse ones leave after each rung."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain, islice

from laserlm.edit.apply import Edit
from laserlm.reductions import Intervention
from laserlm.scoring.records import Evaluation
from laserlm.scoring.statistics import mean_test, sign_flip_test
from laserlm.searching.candidates import Candidate
from laserlm.searching.config import Metric, SearchConfig
from laserlm.searching.ledger import BASE, ScoreLedger
from laserlm.searching.result import RungReport, sort_key
from laserlm.searching.screen import Prediction


def shuffled_order(ids: Sequence[str], seed: int) -> list[int]:
    """Return the indices of ids in an order that depends on the seed and the ids alone."""
    return sorted(range(len(ids)), key=lambda i: hashlib.sha256(f"{seed} {ids[i]}".encode()).digest())


def rung_sizes(examples: int, first: int) -> list[int]:
    """Return the numbers of examples of the rungs: ``first``, doubled until less than a doubling is left, then all."""
    sizes = []
    while 2 * first <= examples:
        sizes.append(first)
        first *= 2
    return [*sizes, examples]


def choose(
    candidates: Sequence[Candidate], predictions: dict[str, Prediction], config: SearchConfig
) -> tuple[list[Candidate], list[Candidate]]:
    """Return the candidates that the screen ranks best, the best first, and random ones drawn from all others."""
    ranked = sorted(
        (c for c in candidates if str(c.intervention) in predictions),
        key=lambda c: predictions[str(c.intervention)].expected,
    )
    chosen: list[Candidate] = []
    sizes: Counter[str] = Counter()
    for candidate in ranked:
        if len(chosen) < config.candidates and sizes[candidate.matrix.id] < config.sizes_per_matrix:
            chosen.append(candidate)
            sizes[candidate.matrix.id] += 1
    taken = {str(c.intervention) for c in chosen}
    others = [c for c in candidates if str(c.intervention) not in taken]
    order = shuffled_order([str(c.intervention) for c in others], config.seed)
    return chosen, [others[i] for i in order[: config.random_candidates]]


def is_significantly_worse(leader: Evaluation, other: Evaluation, metric: Metric, delta: float) -> bool:
    """Return whether the leader is significantly better on the same examples, at the error probability ``delta``.

    Accuracy: an exact one-sided sign-flip test over facts, McNemar's where each fact has one question. Loss: a one-sided
    paired t-test, with the variance between facts.
    """
    pairs = list(zip(leader.scores, other.scores, strict=True))
    if metric == "accuracy":
        return sign_flip_test([a.correct - b.correct for a, b in pairs], leader.facts, one_sided=True) <= delta
    return mean_test([b.loss - a.loss for a, b in pairs], leader.facts) <= delta


def race(
    ledger: ScoreLedger,
    entered: Sequence[Candidate],
    candidates: Sequence[Candidate],
    metric: Metric,
    config: SearchConfig,
    on_rung: Callable[[int, int, Sequence[Intervention], int], None] = lambda *_: None,
    is_allowed: Callable[[Intervention], bool] = lambda _: True,
) -> Iterator[RungReport]:
    """Score candidates on rungs of examples, drop the worse ones after each, and yield a report of each rung.

    The unchanged model runs along to the end. What is left at the end was scored on every example. So were the neighbours in
    rank of the last leader, until none of them leads, except those that were eliminated before.

    Args:
        ledger: scores the candidates.
        entered: candidates to begin with.
        candidates: all of the grid, from which neighbours of the leader are added.
        metric: what decides.
        config: first rung, share kept, error probability.
        on_rung: called before each rung with its number, the number of rungs, what runs in it, and its examples.
        is_allowed: whether the harm of a candidate is within the bound. It is asked of those that would lead or stay after a
            rung, and of all in the last rung. Others leave, and the next best take their place.
    """
    sizes = rung_sizes(len(ledger.split), config.first_rung)
    alive = list(dict.fromkeys(c.intervention for c in entered))
    seen, eliminated, harmful = set(alive), set[Intervention](), set[Intervention]()

    def is_within(intervention: Intervention) -> bool:
        if intervention == BASE or is_allowed(intervention):
            return True
        harmful.add(intervention)
        return False

    # Any candidate, or the unchanged model, may lead any rung.
    delta = config.delta / ((len(candidates) + 1) * len(sizes))
    for number, stop in enumerate(sizes, start=1):
        on_rung(number, len(sizes), [BASE, *alive], stop)
        is_last = number == len(sizes)
        most = len(alive) if is_last else max(1, math.floor(config.keep * len(alive)))
        ledger.extend(
            [BASE, *alive],
            stop,
            next_stop=None if is_last else sizes[number],
            promising=partial(_likely_next, ledger, alive, metric, stop, most),
        )
        # Nothing below looks at more than ``stop`` examples: after an interruption there are scores of later ones.
        finite = [i for i in alive if not ledger.fails(i, stop)]
        order = _best_first(ledger, [BASE, *finite], metric, stop)
        leader = next(filter(is_within, order))
        best = ledger.first(leader, stop)
        worse = {i for i in finite if i != leader and is_significantly_worse(best, ledger.first(i, stop), metric, delta)}
        left = [i for i in order if i in finite and i not in worse]
        # The harm of those that would leave anyhow is not looked at.
        staying = list(islice(filter(is_within, left if is_last else _promising(ledger, left, metric, stop)), most))
        too_harmful = harmful & {*finite}
        eliminated |= worse | too_harmful
        added = [] if is_last else [i for i in _neighbours(leader, candidates) if i not in seen]
        seen |= set(added)
        yield RungReport(
            examples=stop,
            entered=len(alive),
            eliminated=len(worse),
            pruned=len({*left} - {*staying} - too_harmful),
            failed=len(alive) - len(finite),
            added=len(added),
            leader=str(leader),
            harmful=len(too_harmful),
        )
        alive = [*staying, *added]
    # The last leader may have neighbours that never ran, or were pruned.
    tried = {*alive, *eliminated}
    on_last = partial(on_rung, len(sizes), len(sizes))
    yield from _neighbour_rungs(ledger, leader, tried, candidates, metric, on_last, is_allowed)


def _neighbour_rungs(
    ledger: ScoreLedger,
    leader: Intervention,
    tried: set[Intervention],
    candidates: Sequence[Candidate],
    metric: Metric,
    on_rung: Callable[[Sequence[Intervention], int], None],
    is_allowed: Callable[[Intervention], bool],
) -> Iterator[RungReport]:
    """Score the neighbours of the leader on every example until none of them leads; yield a report each time."""
    stop = len(ledger.split)
    while added := [i for i in _neighbours(leader, candidates) if i not in tried]:
        on_rung(added, stop)
        ledger.extend(added, stop)
        tried |= set(added)
        finite = [i for i in added if not ledger.fails(i, stop)]
        scored = list(filter(is_allowed, finite))
        leader = _best_first(ledger, [leader, *scored], metric, stop)[0]
        yield RungReport(
            examples=stop,
            entered=len(added),
            eliminated=0,
            pruned=0,
            failed=len(added) - len(finite),
            added=0,
            leader=str(leader),
            harmful=len(finite) - len(scored),
        )


def _best_first(ledger: ScoreLedger, interventions: Sequence[Intervention], metric: Metric, n: int) -> list[Intervention]:
    """Return interventions by their scores on the first ``n`` examples; of equals the earlier first."""
    return sorted(interventions, key=lambda i: sort_key(ledger.first(i, n), metric), reverse=True)


def _promising(ledger: ScoreLedger, ranked: Sequence[Intervention], metric: Metric, n: int) -> list[Intervention]:
    """Return the order in which they stay: the best by the metric first; for accuracy, in turns with the best by loss.

    On few examples, losses separate candidates far better than hit rates, whose leaders on 32 examples are often lucky ones.
    """
    if metric == "loss":
        return list(ranked)
    by_loss = _best_first(ledger, ranked, "loss", n)
    return list(dict.fromkeys(chain.from_iterable(zip(ranked, by_loss, strict=True))))


def _likely_next(ledger: ScoreLedger, alive: Sequence[Intervention], metric: Metric, n: int, most: int) -> list[Intervention]:
    """Return what the next rung will score as far as this one tells: the unchanged model, and the best so far."""
    scored = [i for i in [BASE, *alive] if ledger.n(i) >= n]
    best = _promising(ledger, [i for i in _best_first(ledger, scored, metric, n) if i], metric, n)
    return [i for i in scored if not i] + best[:most]


def _neighbours(intervention: Intervention, candidates: Sequence[Candidate]) -> list[Intervention]:
    """Return the next smaller and the next larger size of the same matrix in the grid."""
    candidate = next((c for c in candidates if c.intervention == intervention), None)
    if candidate is None:
        return []
    (reduction,) = intervention.reductions
    same = [
        (Edit.of(c.matrix, other).rank, c)
        for c in candidates
        for other in c.intervention.reductions
        if c.matrix == candidate.matrix and other == replace(reduction, size=other.size)
    ]
    same.sort(key=lambda pair: pair[0])
    index = [c for _, c in same].index(candidate)
    return [same[i][1].intervention for i in (index - 1, index + 1) if 0 <= i < len(same)]
