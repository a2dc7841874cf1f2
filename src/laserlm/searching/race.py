"""The race: candidates meet the examples in rungs, and the worse ones leave after each."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain

from scipy import stats

from laserlm.edit.apply import Edit
from laserlm.errors import ScoringError
from laserlm.reductions import Intervention
from laserlm.scoring.records import Evaluation
from laserlm.searching.candidates import Candidate
from laserlm.searching.ledger import ScoreLedger
from laserlm.searching.result import Metric, RungReport, sort_key
from laserlm.searching.screen import Prediction

__all__ = ["RaceOptions", "choose", "is_significantly_worse", "race", "rung_sizes", "shuffled_order"]

BASE = Intervention()


@dataclass(frozen=True)
class RaceOptions:
    """How a race is run.

    Args:
        width: candidates that the screen sends into it.
        sizes: sizes of one matrix among them at most; more of the leader's join on the way.
        controls: others drawn at random, which tell what the screen misses.
        screened: examples that the screen takes its gradient over at most.
        first: examples of the first rung; each next one doubles their number at least, and the last has all.
        keep: share of the candidates that goes on from a rung at most, the better looking ones; 1 drops only what is
            beaten beyond the bound.
        delta: probability at most that the bound drops the best candidate of the grid where that has entered, over all
            rungs and whoever leads, for independent examples. What ``keep`` drops has no such bound.
    """

    width: int = 48
    sizes: int = 3
    controls: int = 4
    screened: int = 100
    first: int = 32
    keep: float = 0.34
    delta: float = 0.05

    def __post_init__(self) -> None:
        for name in ("width", "sizes", "screened", "first"):
            if getattr(self, name) < 1:
                raise ScoringError(f"{name} {getattr(self, name)} leaves a race with nothing to do; write 1 or more")
        if self.controls < 0 or not (0 <= self.keep <= 1 and 0 <= self.delta <= 1):
            raise ScoringError(f"controls must be 0 or more, keep and delta from 0 to 1; got {self}")


def shuffled_order(ids: Sequence[str], seed: int) -> list[int]:
    """Return places in an order that depends on the seed and the ids alone."""
    return sorted(range(len(ids)), key=lambda i: hashlib.sha256(f"{seed} {ids[i]}".encode()).digest())


def rung_sizes(examples: int, first: int) -> list[int]:
    """Return the numbers of examples of the rungs: ``first``, doubled until less than a doubling is left, then all."""
    sizes = []
    while 2 * first <= examples:
        sizes.append(first)
        first *= 2
    return [*sizes, examples]


def choose(
    candidates: Sequence[Candidate], predictions: dict[str, Prediction], options: RaceOptions, seed: int
) -> tuple[list[Candidate], list[Candidate]]:
    """Return the candidates that the screen expects most of, the best first, and controls drawn from the others."""
    ranked = sorted(
        (c for c in candidates if str(c.intervention) in predictions),
        key=lambda c: predictions[str(c.intervention)].expected,
    )
    chosen: list[Candidate] = []
    sizes: dict[str, int] = {}
    for candidate in ranked:
        if len(chosen) < options.width and sizes.get(candidate.matrix.id, 0) < options.sizes:
            chosen.append(candidate)
            sizes[candidate.matrix.id] = sizes.get(candidate.matrix.id, 0) + 1
    taken = {str(c.intervention) for c in chosen}
    others = [c for c in candidates if str(c.intervention) not in taken]
    order = shuffled_order([str(c.intervention) for c in others], seed)
    return chosen, [others[i] for i in order[: options.controls]]


def is_significantly_worse(leader: Evaluation, other: Evaluation, metric: Metric, delta: float) -> bool:
    """Return whether the leader is better on the same examples, in pairs, with an error of ``delta`` at most.

    Accuracy: an exact one-sided McNemar test, a fair coin over the discordant pairs. Loss: a one-sided paired t-test.
    """
    pairs = list(zip(leader.scores, other.scores, strict=True))
    if metric == "accuracy":
        ahead = sum(a.correct and not b.correct for a, b in pairs)
        behind = sum(b.correct and not a.correct for a, b in pairs)
        return bool(stats.binom.sf(ahead - 1, ahead + behind, 0.5) <= delta) if ahead else False
    differences = [b.loss - a.loss for a, b in pairs]
    n = len(differences)
    mean = math.fsum(differences) / n
    spread = math.sqrt(math.fsum((d - mean) ** 2 for d in differences) / (n - 1)) if n > 1 else math.inf
    if not spread:
        return mean > 0
    return bool(stats.t.sf(mean / spread * math.sqrt(n), n - 1) <= delta) if n > 1 else False


def race(
    trials: ScoreLedger,
    entered: Sequence[Candidate],
    every: Sequence[Candidate],
    metric: Metric,
    options: RaceOptions,
    on_rung: Callable[[int, int, Sequence[Intervention], int], None] = lambda *_: None,
) -> Iterator[RungReport]:
    """Score candidates on rungs of examples and drop the worse ones after each; yield the rungs as they end.

    The unchanged model runs along to the end. What is left at the end was scored on every example, and so were the
    neighbours in rho of the last leader, until none of them leads; those that were beaten before are left out.

    Args:
        trials: scores the candidates.
        entered: candidates to begin with.
        every: all of the grid, from which neighbours in rho join.
        metric: what decides.
        options: how.
        on_rung: called before each rung with its number, how many there are, what runs in it, and its examples.
    """
    stops = rung_sizes(len(trials.split), options.first)
    alive = list(dict.fromkeys(c.intervention for c in entered))
    # What follows looks at no more examples than the rung has, for after an interruption there are scores of later ones.
    seen, out = set(alive), set[Intervention]()
    bound = options.delta / ((len(every) + 1) * len(stops))  # any of them, or the unchanged model, may lead
    for number, stop in enumerate(stops, start=1):
        on_rung(number, len(stops), [BASE, *alive], stop)
        last = number == len(stops)
        most = max(1, math.floor(options.keep * len(alive)))
        trials.extend(
            [BASE, *alive],
            stop,
            then=None if last else stops[number],
            promising=partial(_ahead, trials, alive, metric, stop, most),
        )
        here = [i for i in alive if not trials.fails(i, stop)]
        order = _best_first(trials, [BASE, *here], metric, stop)
        leader, best = order[0], trials.first(order[0], stop)
        lost = {i for i in here if i != leader and is_significantly_worse(best, trials.first(i, stop), metric, bound)}
        out |= lost
        left = [i for i in order if i in here and i not in lost]
        kept = left if last else _promising(trials, left, metric, stop, most)
        new = [] if last else [i for i in _neighbours(leader, every) if i not in seen]
        seen |= set(new)
        yield RungReport(stop, len(alive), len(lost), len(left) - len(kept), len(alive) - len(here), len(new), str(leader))
        alive = [*kept, *new]
    # The last rung's leader may have neighbours that never ran, or left without proof.
    tried = {*alive, *out}
    stop = stops[-1]
    while new := [i for i in _neighbours(leader, every) if i not in tried]:
        on_rung(len(stops), len(stops), new, stop)
        trials.extend(new, stop)
        tried |= set(new)
        here = [i for i in new if not trials.fails(i, stop)]
        leader = _best_first(trials, [leader, *here], metric, stop)[0]
        yield RungReport(stop, len(new), 0, 0, len(new) - len(here), 0, str(leader))


def _best_first(trials: ScoreLedger, interventions: Sequence[Intervention], metric: Metric, n: int) -> list[Intervention]:
    """Return interventions by their scores on the first ``n`` examples; of equals the earlier first."""
    return sorted(interventions, key=lambda i: sort_key(trials.first(i, n), metric), reverse=True)


def _promising(trials: ScoreLedger, ranked: Sequence[Intervention], metric: Metric, n: int, most: int) -> list[Intervention]:
    """Return those that go on: the best by the metric; for accuracy, by turns with the best by loss.

    Few examples tell losses apart far better than hit rates, whose leaders on 32 examples are often lucky ones.
    """
    if metric == "loss":
        return list(ranked[:most])
    by_loss = _best_first(trials, ranked, "loss", n)
    return list(dict.fromkeys(chain.from_iterable(zip(ranked, by_loss, strict=True))))[:most]


def _ahead(trials: ScoreLedger, alive: Sequence[Intervention], metric: Metric, n: int, most: int) -> list[Intervention]:
    """Return what the next rung will hold, as far as can be told while this one runs: the unchanged model, and the best."""
    done = [i for i in [BASE, *alive] if trials.n(i) >= n]
    best = _promising(trials, [i for i in _best_first(trials, done, metric, n) if i], metric, n, most)
    return [i for i in done if not i] + best


def _neighbours(intervention: Intervention, every: Sequence[Candidate]) -> list[Intervention]:
    """Return the same matrix's next larger and next smaller size of the grid."""
    here = next((c for c in every if c.intervention == intervention), None)
    if here is None:
        return []
    (reduction,) = intervention.reductions
    same = [
        (Edit.of(c.matrix, other).rank, c)
        for c in every
        for other in c.intervention.reductions
        if c.matrix == here.matrix and other == replace(reduction, size=other.size)
    ]
    same.sort(key=lambda pair: pair[0])
    at = [c for _, c in same].index(here)
    return [same[i][1].intervention for i in (at - 1, at + 1) if 0 <= i < len(same)]
